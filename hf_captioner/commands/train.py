"""Train a captioner from a recipe.

    hf-captioner train                                   # drawn shapes, from scratch, in minutes
    hf-captioner train --list                            # the recipes of the package
    hf-captioner train flickr8k --epochs 5               # one of them, with a field overridden
    hf-captioner train my_recipe.yaml --resume           # go on where it was interrupted
    hf-captioner train --from photographs --dataset FOLDER   # go on from a captioner, with photographs of your own
    accelerate launch -m hf_captioner train flickr8k     # on several processes

The output folder holds the best model so far, `log.jsonl` with a line per epoch, `curves.png` and the checkpoints; at
the end also `results.json`, `predictions.jsonl` and `attention.png`. Several machines need a folder that all of them
see. Text in brackets is the default of an option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..interruption import ending_at_ctrl_c
from ..training.recipe import Recipe, parse_recipe

if TYPE_CHECKING:
    from ..model.modeling_captioner import CaptionerModel
    from ..training.train import TrainedCaptioner


def main(argv: Sequence[str]) -> None:
    """Train, validate, save the best model and report its scores; publish it if `--push_to_hub` is given."""
    recipe = parse_recipe(argv, prog="hf-captioner train", description=__doc__)
    with ending_at_ctrl_c():  # Imported here, so that --help and wrong options answer at once.
        from accelerate import PartialState

        from ..training.train import train

    if not recipe.run.push_to_hub:
        train(recipe)
        return
    trained = train(recipe, before_training=lambda model: refuse_unpublishable(recipe, model))
    if PartialState().is_main_process:
        publish(recipe, trained)


def refuse_unpublishable(recipe: Recipe, model: CaptionerModel) -> None:
    """Raise the error of a push that will fail before hours of training rather than after them."""
    from ..publishing.hub import check_push

    assert recipe.run.push_to_hub is not None
    check_push(model.config, recipe.run.push_to_hub, recipe=recipe.as_fields())


def publish(recipe: Recipe, trained: TrainedCaptioner) -> None:
    """Publish the best model of a training on the Hub, with its scores."""
    from ..publishing.hub import push

    repo_id, folder = recipe.run.push_to_hub, recipe.run.output_dir
    assert repo_id is not None
    try:
        url = push(trained.model, trained.processor, repo_id, trained.evaluation, recipe=recipe.as_fields())
    except OSError as e:
        raise OSError(f"{e} The model is in {folder!r}. To push it: hf-captioner push {folder} {repo_id}") from e
    print(f"\nPublished: {url}")
