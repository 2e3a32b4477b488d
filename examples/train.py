"""Train a captioner, step by step: from a recipe to a saved captioner and its scores.

    accelerate launch examples/train.py                                      # drawn shapes, from scratch, in minutes
    accelerate launch examples/train.py flickr8k --epochs 5                  # a recipe of the package, with a change
    accelerate launch examples/train.py my_recipe.yaml --resume              # go on where it was interrupted

`hf-captioner train` calls `hf_captioner.training.train.train`, which takes the same steps. Copy this script to change
one of them: to train on other data, to build another model, or to do something after each epoch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hf_captioner.cli import run_command
from hf_captioner.interruption import Interruption
from hf_captioner.training.accelerator import owned_folder
from hf_captioner.training.build import build_captioner, build_run, find_checkpoint, load_data, prepare_accelerator
from hf_captioner.training.continuing import with_options_of_captioner
from hf_captioner.training.recipe import parse_recipe
from hf_captioner.training.report import report_best
from hf_captioner.training.train import end_epoch, evaluate_best, start_output, start_stage, validate


def main(argv: Sequence[str]) -> None:
    """Train a captioner from a recipe and report the scores of its best model."""
    # All settings: a recipe by its name or from a YAML file, overridden by `--field value`.
    recipe = parse_recipe(argv, prog="examples/train.py", description=__doc__)
    if recipe.run.push_to_hub:
        raise ValueError("This script does not publish. Use hf-captioner train, or hf-captioner push afterwards.")
    recipe = with_options_of_captioner(recipe)  # those of --from, if it is given
    output_dir = Path(recipe.run.output_dir)
    accelerator = prepare_accelerator(recipe)

    # Ctrl-C and SIGTERM save a checkpoint before they end the training. No other run may use its output folder.
    with Interruption() as interruption, owned_folder(output_dir, accelerator):
        checkpoint = find_checkpoint(recipe, accelerator)  # None unless --resume is given

        # Images with their reference captions. Images are opened when they are needed.
        data = load_data(recipe, accelerator)

        # A new model. Its processor turns images into pixels, and captions into ids of the vocabulary.
        model, processor = build_captioner(recipe, data.train.rows["captions"])

        # The run holds the weights, the optimizer, the stages and how far the training is.
        run = build_run(recipe, model, processor, data, accelerator, checkpoint=checkpoint, interruption=interruption)
        start_output(recipe, run)

        # Stages: likelihood of the captions, then optionally the whole encoder, then rewards of sampled captions.
        while run.stage is not None:
            # Each stage starts from the best weights so far. Cells of a frozen encoder are computed once.
            loader = start_stage(recipe, run, processor, data)
            while run.has_epochs_left:
                run.train_epoch(loader)
                # Captions of the validation images, found by beam search, and their scores.
                predictions, scores = validate(recipe, run, processor, data)
                # Logs the epoch, and saves its model if it is the best so far.
                end_epoch(recipe, run, processor, data, predictions, scores)
            run.end_stage()

        # The best model, as `CaptionerModel.from_pretrained(output_dir)` loads it, and its scores.
        best = evaluate_best(recipe, run, processor, data)
        if accelerator.is_main_process:
            report_best(output_dir, best.evaluation, data.validation.rows, run, recipe)
    accelerator.end_training()


if __name__ == "__main__":
    # `run_command` shows log messages, and ends errors that the user can fix in one line.
    sys.exit(run_command(main, sys.argv[1:]))
