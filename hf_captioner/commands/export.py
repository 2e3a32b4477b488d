"""Export a captioner to ONNX: a folder that captions images with onnxruntime, without torch.

    hf-captioner export outputs/shapes --int8
    hf-captioner export outputs/shapes outputs/shapes_onnx
    python outputs/shapes_onnx/caption.py photo.jpg

Without a FOLDER, the export is the folder `onnx` in the captioner's own, where `hf-captioner caption` finds it: plain
captions then need no torch. In another FOLDER it has a program of its own, which needs only its requirements.txt.
Exporting needs `pip install 'hf_captioner[export]'`.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..cli import CommandParser, load_captioner
from ..pretrained import captioner_path
from ..publishing.export import export_onnx
from ..publishing.exported import BESIDE


def main(argv: Sequence[str]) -> None:
    """Export a captioner, and print how to try the export."""
    arguments = parse(argv)
    source, output = captioner_path(arguments.captioner), arguments.output
    if output is None and not Path(source).is_dir():
        raise ValueError(f"{source!r} is no folder, so name one for the export: hf-captioner export {source} FOLDER")
    model, processor = load_captioner(source)
    folder = output or Path(source, BESIDE)
    export_onnx(model, processor, folder, int8=arguments.int8, beside=output is None)
    program = f"python {shlex.quote(str(folder / 'caption.py'))}"
    if output is None:
        program = f"hf-captioner caption {shlex.quote(source)}"
    print(f"Exported a captioner that runs without torch to {folder}. Try it:\n  {program} photo.jpg")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `hf-captioner export`."""
    parser = CommandParser(
        prog="hf-captioner export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("captioner", metavar="CAPTIONER", help="folder of a saved captioner, or its id on the Hub")
    add("output", type=Path, metavar="FOLDER", nargs="?", help="new or empty folder for the export (default: "
        "CAPTIONER/onnx, in place of an earlier export)")  # fmt: skip
    add("--int8", action="store_true", help="large weights in 8 bits: a third of the size")
    return parser.parse_args(argv)
