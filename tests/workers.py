"""Processes that run one piece of code after another, so that their imports are paid for once.

Tests need them for what is fixed when a process starts, such as the Hub's address or which packages can be imported.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOOP = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # all that is printed goes to the log
names = {"__name__": "__main__"}
for line in sys.stdin:
    request = json.loads(line)
    names |= request["values"] | {"answer": None}
    try:
        exec(compile(request["code"], "request", "exec"), names)
        reply = {"answer": names["answer"]}
    except BaseException as e:
        reply = {"error": f"{type(e).__name__}: {e}"}
    print(json.dumps(reply), file=answers, flush=True)
"""

# Makes everything unimportable but these distributions and what they require.
ONLY = """
import re, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
name_of = lambda text: re.sub(r"[-_.]+", "-", re.match(r"[\\w.-]+", text)[0]).lower()
todo, known = list(only), set()
while todo:
    name = name_of(todo.pop())
    if name not in known:
        known.add(name)
        try:
            todo += [text for text in requires(name) or [] if "extra ==" not in text]
        except PackageNotFoundError:
            pass
for module, distributions in packages_distributions().items():
    if not {name_of(name) for name in distributions} & known:
        sys.modules[module] = None
for module in without:
    sys.modules[module] = None
"""


# A test forks a worker: after computations with several OpenMP threads, the fork would wait for these threads for ever.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class FailedError(Exception):
    """An error that the code raised, as `Type: message`."""


class Worker:
    """A process that runs code and answers.

    Args:
        folder: Working directory of the process, which also gets its log.
        environment: Environment variables to add to those of this process.
        only: Distributions that the process may import, with what they require (default: all).
        without: Modules that it may not import in any case.
    """

    def __init__(
        self, folder: Path, environment: Mapping[str, str], *, only: tuple[str, ...] = (), without: tuple[str, ...] = ()
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "worker.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LOOP], cwd=folder, env=os.environ | ONE_THREAD | dict(environment), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        if only:
            self.run(ONLY, only=only, without=without)

    def run(self, code: str, **values: Any) -> Any:
        """Run code, and return what it assigns to `answer`; all names that it binds stay for the next run.

        Args:
            code: Python code.
            values: Names to bind first, with values that JSON can hold.

        Raises:
            FailedError: the code raised an error.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"code": code, "values": values}) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        assert reply, self.log.read_text()[-3000:]
        if "error" in (record := json.loads(reply)):
            raise FailedError(record["error"])
        return record["answer"]

    def close(self) -> None:
        """Kill the process and its forks, which have nothing to clean up."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
