"""Damaged and hostile inputs: what the package makes of each, and whether it opens what it was not given.

    python benchmarks/robustness.py --out benchmarks/results/robustness.json
    python benchmarks/robustness.py --size small
    python benchmarks/robustness.py --only images,captions --seed 3 --keep /tmp/faults

Inputs of four kinds are made from seeds and tried one after the other in processes of their own:

- images: damaged files of every format that is read, and small files that ask for much memory;
- captions: data sets in every layout, with one file damaged, whose images and captions are compared with what of the
  intact data is left;
- paths: data sets that name files, folders, devices and addresses elsewhere;
- models: folders of a captioner that are damaged, or whose settings name files and addresses elsewhere.

Each input is read, or refused by a ValueError or an OSError in one line. Anything else is a fault: other exceptions and
longer messages (`raw`), more than 5 s on a processor (`hang`), a growth of the process by more than 1 GB (`peak`),
images or captions that are missing or changed although the file has them, without an error or a line about it, or
captions of a model whose weights are not what they were (`silent`), files opened elsewhere (`opened`), and requests
sent, to a server on this machine (`request`). With a fault, the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from hostile.pool import FAULTS, Case, Outcome, try_inputs
from timing import write_result
from tqdm.auto import tqdm

SIZES = {
    "full": {"images": 5_000, "captions": 3_300, "paths": 200, "models": 400},
    "small": {"images": 160, "captions": 120, "paths": 40, "models": 30},
}


def main() -> int:
    """Try all inputs, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--only", help="kinds of inputs, separated by commas (default: all)")
    parser.add_argument("--count", type=int, help="number of inputs of each kind, instead of that of the size")
    parser.add_argument("--match", default="", help="try only inputs whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="number of processes (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="folder for copies of the inputs that show a fault")
    parser.add_argument("--out", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    keep = arguments.keep and arguments.keep.absolute()
    out = arguments.out and arguments.out.absolute()
    counts = SIZES[arguments.size]
    kinds = arguments.only.split(",") if arguments.only else [*counts]
    if unknown := {*kinds} - {*counts}:
        parser.error(f"unknown kinds: {', '.join(unknown)}; known: {', '.join(counts)}")
    started = time.perf_counter()
    outcomes: dict[str, list[tuple[Case, Outcome]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="robustness-") as folder:
        os.chdir(folder)  # or worker processes import the package from the folder where this was started
        os.environ |= {"HF_HOME": f"{folder}/huggingface", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        # Requests to the Hub shall not be hidden; they are heard, and nobody answers at this port.
        os.environ |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "TRANSFORMERS_VERBOSITY": "error"}
        cases = [
            case
            for kind in kinds
            for case in importlib.import_module(f"hostile.{kind}").cases(
                arguments.count or counts[kind], arguments.seed
            )
            if arguments.match in case.name
        ]
        tried = try_inputs(cases, Path(folder), arguments.workers, keep)
        for case, outcome in tqdm(tried, total=len(cases), unit="input", disable=None):
            outcomes[case.kind].append((case, outcome))
            if outcome.faults:
                tqdm.write(
                    f"{case.kind} {case.name} (seed {case.seed}): {json.dumps(outcome.faults, ensure_ascii=False)}"
                )
    faults = [(case, outcome) for kind in kinds for case, outcome in outcomes[kind] if outcome.faults]
    table = {kind: count(outcomes[kind]) for kind in kinds}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "kinds": table,
        "faults": [{"kind": case.kind, "input": case.name, "seed": case.seed, **o.faults} for case, o in faults],
    }
    if out:
        write_result(out, result)
    print_table(table)
    return 1 if faults else 0


def count(outcomes: list[tuple[Case, Outcome]]) -> dict[str, int]:
    """Count inputs, those that were read and refused, and faults by kind."""
    faults = Counter(fault for _, outcome in outcomes for fault in outcome.faults)
    num_read = sum(outcome.is_read for _, outcome in outcomes)
    return {
        "inputs": len(outcomes),
        "read": num_read,
        "refused": len(outcomes) - num_read,
        **{fault: faults[fault] for fault in FAULTS},
    }


def print_table(table: dict[str, Any]) -> None:
    """Print a row of numbers for each kind."""
    names = ["inputs", "read", "refused", *FAULTS]
    print(f"{'':10}" + "".join(f"{name:>9}" for name in names))
    for kind, numbers in table.items():
        print(f"{kind:10}" + "".join(f"{numbers[name]:9,}" for name in names))


if __name__ == "__main__":
    sys.exit(main())
