"""Convert a checkpoint of the PyTorch captioning tutorial."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..cli import CommandParser
from ..publishing.convert import convert, read_checkpoint, read_word_map


def main(argv: Sequence[str]) -> None:
    """Convert, save, say what to do with it."""
    arguments = parse(argv)
    output: Path = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{str(output)!r} exists already; name a folder that does not.")
    model, processor = convert(
        read_checkpoint(arguments.checkpoint),
        read_word_map(arguments.word_map),
        encoder_name=arguments.encoder_name,
        grid_size=arguments.grid_size,
    )
    model.save_pretrained(output)
    processor.save_pretrained(output)
    print(f"A captioner with {model.config.encoder_name} and {model.config.vocab_size} words is in {output}. Try it:")
    print(f"  python examples/caption.py {shlex.quote(str(output))} photo.jpg")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = CommandParser(
        prog="hf-captioner convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="file of torch.save with the two state dicts")
    parser.add_argument("word_map", type=Path, help="JSON file with the id of each word")
    parser.add_argument("output", type=Path, help="folder for the captioner; must not hold anything yet")
    parser.add_argument("--encoder_name", default="resnet101", help="the encoder's ResNet (default: %(default)s)")
    parser.add_argument(
        "--grid_size", type=int, default=14, help="rows of its grid, enc_image_size there (default: %(default)s)"
    )
    return parser.parse_args(argv)
