"""Export a captioner to ONNX, to caption without torch."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..cli import CommandParser, load_captioner
from ..publishing.export import check_folder, export_onnx


def main(argv: Sequence[str]) -> None:
    """Load, export, say what to do with it."""
    arguments = parse(argv)
    check_folder(arguments.output)
    model, processor = load_captioner(arguments.model)
    export_onnx(model, processor, arguments.output, int8=arguments.int8, report=print)
    print(f"A captioner without torch is in {arguments.output}. Try it:")
    print(f"  python {shlex.quote(str(arguments.output / 'caption.py'))} photo.jpg")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = CommandParser(
        prog="hf-captioner export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a saved captioner: an output folder of train.py, or an id on the Hub")
    parser.add_argument("output", type=Path, help="folder for the export; must not hold anything yet")
    parser.add_argument("--int8", action="store_true", help="weights of matrix products in 8 bits: smaller and faster")
    return parser.parse_args(argv)
