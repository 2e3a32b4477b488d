"""Time `hf-captioner caption photo.jpg` from the start of the process to its end, with and without torch.

    python benchmarks/cold_start.py photographs photo.jpg --out benchmarks/results/cold_start.json

Whole processes take turns: one that only imports the libraries which captioning without torch needs; the command by
onnxruntime; and the command by torch, with a copy of the captioner that has no export. One more process captions the
image several times by onnxruntime, which gives the time of the captioning itself. The command by onnxruntime is to
take at most 1.5 times the first and the last together, and less than 300 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from hf_captioner.pretrained import captioner_path

IMPORTS = "import onnxruntime, PIL, tokenizers"
WARM = """
import sys, time
from hf_captioner import OnnxCaptioner
captioner = OnnxCaptioner(sys.argv[1])
for _ in range(8):
    started = time.perf_counter(), time.process_time()
    captioner([sys.argv[2]])
    print(time.perf_counter() - started[0], time.process_time() - started[1])
"""
BAR, BAR_MEGABYTES = 1.5, 300

Usage = tuple[float, float, float]  # seconds, seconds of processor time, megabytes at most


def run(command: list[str], output: Path) -> Usage:
    """Run a program with its output in a file, and return what it used."""
    # pip compiles what it installs; a checkout is compiled in the first round.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with output.open("w") as file:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status != 0:
        sys.exit(f"error: {' '.join(command[:4])} failed.")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000  # kilobytes on Linux


def captioning(output: Path) -> tuple[float, float]:
    """Return seconds and seconds of processor time of a caption, from the output of `WARM`; the first warm it up."""
    times = [[float(number) for number in line.split()] for line in output.read_text().splitlines()][3:]
    return median(wall for wall, _ in times), median(cpu for _, cpu in times)


def measure(folder: Path, photo: str, rounds: int) -> dict[str, object]:
    """Run all programs in turns, and return the medians."""
    with tempfile.TemporaryDirectory() as temporary:
        unexported, output = Path(temporary, "captioner"), Path(temporary, "output")
        shutil.copytree(folder, unexported, ignore=shutil.ignore_patterns("onnx", "checkpoints"))
        command = [str(Path(sys.executable).with_name("hf-captioner")), "caption"]
        programs = {
            "imports": [sys.executable, "-c", IMPORTS],
            "onnxruntime": [*command, str(folder), photo],
            "warm": [sys.executable, "-c", WARM, str(folder / "onnx"), photo],
            "torch": [*command, str(unexported), photo],
        }
        used: dict[str, list[Usage]] = {name: [] for name in programs}
        itself: list[tuple[float, float]] = []
        captions = {}
        for number in range(rounds + 1):
            for name, program in programs.items():
                usage = run(program, output)
                if name == "warm":
                    itself += [captioning(output)] * (number > 0)
                else:
                    captions[name] = output.read_text().strip().rpartition("\t")[2]
                used[name] += [usage] * (number > 0)  # the first round reads the files into memory
    del used["warm"]  # which takes longer for its repetitions
    names = ("seconds", "processor_seconds", "megabytes")
    ratios = [
        [command[kind] / (imports[kind] + caption[kind]) for kind in range(2)]
        for command, imports, caption in zip(used["onnxruntime"], used["imports"], itself, strict=True)
    ]
    return {
        "rounds": rounds,
        **{
            name: dict(zip(names, map(median, zip(*usages, strict=True)), strict=True)) for name, usages in used.items()
        },
        "captioning_itself": dict(zip(names, map(median, zip(*itself, strict=True)), strict=False)),
        "ratio": median(wall for wall, _ in ratios),
        "ratio_of_processor_time": median(cpu for _, cpu in ratios),
        "captions": {name: caption for name, caption in captions.items() if caption},
        "bar": {"ratio": BAR, "megabytes": BAR_MEGABYTES},
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captioner", help="folder of a captioner with its export in onnx/, or photographs")
    parser.add_argument("photo", help="image file to caption")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    folder = Path(captioner_path(arguments.captioner))
    if not (folder / "onnx" / "captioner.json").is_file():
        parser.error(f"{folder} has no export beside it: run hf-captioner export {folder} --int8")
    result = measure(folder, arguments.photo, arguments.rounds)
    # Not above: it imports torch, and what a program uses at most includes what the one that starts it uses.
    from timing import write_result

    write_result(arguments.out, json.loads(json.dumps(result)))


if __name__ == "__main__":
    main()
