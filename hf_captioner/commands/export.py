"""Export a captioner to ONNX: a folder that captions images with onnxruntime, without torch.

    hf-captioner export outputs/shapes outputs/shapes_onnx
    hf-captioner export outputs/shapes outputs/shapes_int8 --int8
    python outputs/shapes_onnx/caption.py photo.jpg

Exporting needs `pip install 'hf_captioner[export]'`; the export itself needs only its requirements.txt.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..cli import CommandParser, load_captioner
from ..publishing.export import export_onnx


def main(argv: Sequence[str]) -> None:
    """Export a captioner, and print how to try the export."""
    arguments = parse(argv)
    model, processor = load_captioner(arguments.captioner)
    export_onnx(model, processor, arguments.output, int8=arguments.int8)
    print(f"Exported a captioner that runs without torch to {arguments.output}. Try it:")
    print(f"  python {shlex.quote(str(arguments.output / 'caption.py'))} photo.jpg")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `hf-captioner export`."""
    parser = CommandParser(
        prog="hf-captioner export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("captioner", metavar="CAPTIONER", help="folder of a saved captioner, or its id on the Hub")
    add("output", type=Path, metavar="FOLDER", help="new or empty folder for the export")
    add("--int8", action="store_true", help="quantize the weights of matrix products to 8 bits: smaller and faster")
    return parser.parse_args(argv)
