"""Publish a captioner on the Hub, or write the folder that would be published."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..cli import CommandParser, load_captioner
from ..publishing.hub import export_folder, push


def main(argv: Sequence[str]) -> None:
    """Publish a saved captioner, or write the folder that would be."""
    arguments = parse(argv)
    names = ("license", "datasets", "language", "base_model", "recipe", "limits")
    facts = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    model, processor = load_captioner(arguments.folder)
    if arguments.output_dir is not None:
        shared = {"images": arguments.image, **facts}
        folder = export_folder(arguments.output_dir, model, processor, arguments.repo_id, _results(arguments), **shared)
        print(f"Written: {folder}")
        return
    url = push(
        model,
        processor,
        arguments.repo_id,
        _results(arguments),
        images=arguments.image,
        private=arguments.private or None,
        revision=arguments.revision,
        token=arguments.token,
        message=arguments.message,
        **facts,
    )
    print(f"Published: {url}")


def _results(arguments: argparse.Namespace) -> Path | None:
    """The file named, or the best of those that lie in the folder."""
    if arguments.results is not None:
        return arguments.results
    found = [Path(arguments.folder, name) for name in ("evaluation/results.json", "scores.json")]
    return next((path for path in found if path.is_file()), None)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = CommandParser(
        prog="hf-captioner push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a saved captioner, such as the output folder of train.py")
    add("repo_id", metavar="ID", help="where to, such as your-name/captioner; it is made if it is not there")
    add(
        "--license", metavar="L", help="of the weights, as the Hub names it, such as apache-2.0 (default: the recipe's)"
    )
    add("--datasets", nargs="+", metavar="D", help="trained on, names or ids on the Hub (default: the recipe's)")
    add("--language", metavar="L", help="of the captions (default: en)")
    add("--base_model", metavar="ID", help="whose weights the encoder started from (default: timm's, "
        "if the recipe says so)")  # fmt: skip
    add("--results", type=Path, metavar="FILE", help="results.json of evaluate.py or scores.json of train.py (default: "
        "FOLDER/evaluation/results.json, else FOLDER/scores.json)")  # fmt: skip
    add("--recipe", type=Path, metavar="FILE", help="of the training (default: FOLDER/recipe.yaml)")
    add("--image", nargs="*", metavar="IMAGE", help="to publish with captions in the card; none if none is named "
        "(default: a few of the validation split)")  # fmt: skip
    add("--limits", metavar="TEXT", help="for the section of that name in the card")
    add("--private", action="store_true", help="a new repository is to be private; one that is public is refused")
    add("--revision", metavar="BRANCH", help="made if it is not there (default: main)")
    add("--token", help="of a user who may write there (default: HF_TOKEN, or the one logged in)")
    add("--message", default="Upload captioner", help="of the commit (default: %(default)s)")
    add("--output_dir", metavar="DIR", help="write the folder there instead of pushing it")
    return parser.parse_args(argv)
