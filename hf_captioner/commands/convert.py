"""Convert a checkpoint of the PyTorch captioning tutorial into a captioner that computes the same logits.

    hf-captioner convert CHECKPOINT.pth WORDMAP.json outputs/converted
    hf-captioner caption outputs/converted photo.jpg

The tutorial is https://github.com/sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning. CHECKPOINT must hold two state
dicts, {"encoder": ..., "decoder": ...}; no code in it is run. The tutorial itself saves whole modules, which cannot be
read safely: for these, the error message shows how to extract the state dicts.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..cli import CommandParser
from ..files import explain_write_errors, replace_files
from ..publishing.convert import convert, read_checkpoint, read_word_map
from ..publishing.folders import require_empty


def main(argv: Sequence[str]) -> None:
    """Convert and save a checkpoint, and print how to try the captioner."""
    arguments = parse(argv)
    require_empty(arguments.output)
    model, processor = convert(
        read_checkpoint(arguments.checkpoint),
        read_word_map(arguments.word_map),
        encoder_name=arguments.encoder_name,
        grid_size=arguments.grid_size,
    )

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    with explain_write_errors("The captioner", arguments.output):
        replace_files(arguments.output, save)
    config = model.config
    print(
        f"Saved: a captioner with {config.encoder_name} and {config.vocab_size} words, in {arguments.output}. Try it:"
    )
    print(f"  hf-captioner caption {shlex.quote(str(arguments.output))} photo.jpg")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `hf-captioner convert`."""
    parser = CommandParser(
        prog="hf-captioner convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="file with the two state dicts, written by torch.save")
    add("word_map", type=Path, metavar="WORDMAP", help="JSON file that maps each word to its id")
    add("output", type=Path, metavar="FOLDER", help="new or empty folder for the captioner")
    tutorial = parser.add_argument_group("settings of the tutorial's model")
    tutorial.add_argument("--encoder_name", default="resnet101", metavar="NAME", help="ResNet (default: %(default)s)")
    tutorial.add_argument(
        "--grid_size", type=int, default=14, metavar="N", help="its encoded_image_size (default: %(default)s)"
    )
    return parser.parse_args(argv)
