"""Train a captioner from a recipe.

    hf-captioner train                                   # drawn shapes, from scratch, in minutes
    hf-captioner train --list                            # the recipes of the package
    hf-captioner train flickr8k --epochs 5               # one of them, with a field overridden
    hf-captioner train my_recipe.yaml --resume           # go on where it was interrupted
    accelerate launch -m hf_captioner train flickr8k     # on several processes

The output folder holds the best model so far, `log.jsonl` with a line per epoch, `curves.png` and the checkpoints; at
the end also `scores.json`, `predictions.json` and `attention.png`. Several machines need a folder that all of them see.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..training.recipe import parse_recipe, recipes


def main(argv: Sequence[str]) -> None:
    """Train, validate, keep the best model, and show what came out."""
    if list(argv) == ["--list"]:
        for name, summary in recipes().items():
            print(f"{name:<24}{summary}")
        return
    recipe = parse_recipe(argv, prog="hf-captioner train", description=__doc__)
    from ..training.train import train

    train(recipe)
