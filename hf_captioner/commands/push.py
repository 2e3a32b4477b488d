"""Publish a captioner on the Hub: weights, code, model card and captioned images, in one commit.

    hf-captioner push outputs/shapes your-name/captioner --license apache-2.0
    hf-captioner push outputs/flickr8k your-name/captioner --license cc-by-nc-4.0 --image first.jpg second.jpg --private
    hf-captioner push outputs/shapes your-name/captioner --license apache-2.0 --output_dir published

The last one writes the folder and does not publish it. Publishing needs an access token: run `hf auth login`, set
HF_TOKEN, or give --token. An interrupted push publishes nothing; push again to continue.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..cli import CommandParser, load_captioner
from ..evaluation.results import find_results
from ..pretrained import captioner_path
from ..publishing.hub import export_folder, push

CARD_DETAILS = ("license", "datasets", "language", "base_model", "recipe", "limits")


def main(argv: Sequence[str]) -> None:
    """Publish a saved captioner, or write the folder that would be published."""
    arguments = parse(argv)
    details = {name: value for name in CARD_DETAILS if (value := getattr(arguments, name)) is not None}
    results = arguments.results or find_results(captioner_path(arguments.captioner))
    captioner = (*load_captioner(arguments.captioner), arguments.repo_id, results)
    if arguments.output_dir is not None:
        print(f"Written: {export_folder(arguments.output_dir, *captioner, images=arguments.image, **details)}")
        return
    url = push(
        *captioner,
        images=arguments.image,
        private=arguments.private or None,
        revision=arguments.revision,
        token=arguments.token,
        message=arguments.message,
        **details,
    )
    print(f"Published: {url}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `hf-captioner push`."""
    parser = CommandParser(
        prog="hf-captioner push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("captioner", metavar="CAPTIONER", help="folder of a saved captioner, or photographs, the one of this package")
    add("repo_id", metavar="ID", help="repository, such as your-name/captioner; created if it does not exist")
    add("--output_dir", metavar="FOLDER", help="write to this new folder instead of publishing")
    add = parser.add_argument_group("model card").add_argument
    add("--license", metavar="NAME", help="licence of the weights, such as apache-2.0 (default: the recipe's)")
    add("--datasets", nargs="+", metavar="NAME", help="data sets it was trained on (default: the recipe's)")
    add("--language", metavar="CODE", help="language of the captions (default: en)")
    add("--base_model", metavar="ID", help="model that the encoder started from (default: timm's, if the recipe's)")
    add("--recipe", type=Path, metavar="FILE", help="training recipe (default: CAPTIONER/recipe.yaml)")
    add("--results", type=Path, metavar="FILE", help="scores (default: the results.json in CAPTIONER)")
    add("--image", nargs="*", metavar="IMAGE", help="images to caption; none if none is named "
        "(default: some validation images)")  # fmt: skip
    add("--limits", metavar="TEXT", help="what the model cannot do (default: a general text)")
    add = parser.add_argument_group("repository").add_argument
    add("--private", action="store_true", help="create a private repository, or refuse if it exists and is public")
    add("--revision", metavar="BRANCH", help="branch, created if it does not exist (default: main)")
    add("--token", help="access token (default: HF_TOKEN, or the user who is logged in)")
    add("--message", default="Upload captioner", metavar="TEXT", help="commit message (default: %(default)s)")
    return parser.parse_args(argv)
