"""Run transformers' own tests on captioners: fetch those of the installed version by pip, then call pytest.

    python tests/peer/run.py                                          # all suites
    python tests/peer/run.py --write benchmarks/results/peer_suites.md
    python tests/peer/run.py --tests ~/transformers/tests             # a checkout, which also has the tests of generate()

Its exit status is that of pytest, or 75 if there is no package index.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

NO_INDEX = 75


def fetch_tests(folder: Path) -> Path | None:
    """Return the folder `tests` of the source distribution of the installed transformers; None without an index."""
    name = f"transformers-{version('transformers')}"
    command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    pip = [sys.executable, "-m", "pip", *command, name.replace("-", "==")]
    if subprocess.run(pip, capture_output=True, timeout=600).returncode:
        return None
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
        archive.extractall(folder, members, filter="data")
    (folder / name / "tests" / "__init__.py").touch()
    return folder / name / "tests"


def report(results: Path) -> str:
    """Return the counts of each suite, and the reasons of skipped tests, as Markdown."""
    counts: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {child.tag: child for child in case}
        kind = "skipped" if "skipped" in kinds else "failed" if kinds.keys() & {"failure", "error"} else "passed"
        counts.setdefault(case.get("classname", "").rpartition(".")[2], Counter())[kind] += 1
        if kind == "skipped":
            reasons[" ".join(kinds["skipped"].get("message", "").split())] += 1
    lines = [
        f"Tests of transformers {version('transformers')} on captioners: `python tests/peer/run.py --write FILE`.",
        "The source distribution lacks the tests of `generate()`, exporters and pipelines. A checkout has the first two,",
        "which `--tests CHECKOUT/tests` adds; those of pipelines need models of the Hub.",
        "",
        "| suite | passed | skipped | failed |",
        "|---|---|---|---|",
        *(f"| {name} | {c['passed']} | {c['skipped']} | {c['failed']} |" for name, c in sorted(counts.items())),
        "",
        "Why tests are skipped:",
        "",
        "| tests | reason |",
        "|---|---|",
        *(f"| {number} | {reason.replace('|', '/')} |" for reason, number in sorted(reasons.items())),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Fetch the tests, run them, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tests", type=Path, help="folder with transformers' tests, in place of those that are fetched"
    )
    parser.add_argument("--write", type=Path, help="Markdown file for the counts and the reasons of skipped tests")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        tests = arguments.tests or fetch_tests(Path(name))
        if tests is None:
            print("There is no package index to fetch transformers' tests from.", file=sys.stderr)
            return NO_INDEX
        results = Path(name, "results.xml")
        plugins = ["-p", "no:cacheprovider", "-p", "transformers_tests_plugin"]
        pytest = [sys.executable, "-m", "pytest", "-q", "-n", "0", *plugins, f"--junitxml={results}"]
        here = Path(__file__).resolve().parent
        environment = {**os.environ, "TRANSFORMERS_TESTS": str(tests.resolve()), "PYTHONPATH": str(here)}
        status = subprocess.run([*pytest, str(here)], env=environment, cwd=here.parents[1]).returncode
        if arguments.write and results.is_file():
            arguments.write.write_text(report(results), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
