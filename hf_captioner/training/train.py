"""Training from a recipe, from the data to the scores of the best model.

`train` does it all; `examples/train.py` shows the same steps one by one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..data.loading import StepLoader
from ..errors import first_line, is_out_of_memory
from ..evaluation.predictions import Prediction, decode_captions
from ..evaluation.protocol import describe_decoding
from ..evaluation.scoring import Evaluation, collapse_warnings, evaluate_predictions, score_captions
from ..files import explain_write_errors, replace_files, write_atomically
from ..interruption import Interruption
from ..model.modeling_captioner import CaptionerModel
from ..model.processing_captioner import CaptionerProcessor
from .accelerator import owned_folder
from .build import (
    TrainingData,
    build_captioner,
    build_loader,
    build_run,
    cache_features,
    find_checkpoint,
    load_data,
    prepare_accelerator,
)
from .checkpoints import HOW_TO_GO_ON
from .continuing import with_options_of_captioner
from .recipe import Recipe
from .report import epoch_line, report_best, write_log
from .run import Run
from .tracking import log_epoch, start_trackers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedCaptioner:
    """The best model of a training.

    Args:
        model: Model of the best epoch.
        processor: Processor of the model.
        evaluation: Scores of the model on the validation images.
    """

    model: CaptionerModel
    processor: CaptionerProcessor
    evaluation: Evaluation


def train(recipe: Recipe, *, before_training: Callable[[CaptionerModel], None] | None = None) -> TrainedCaptioner:
    """Train a captioner, save its best model in the output folder, and report its scores.

    Args:
        recipe: Recipe of the training.
        before_training: Function that the main process calls with the new model before the first step. An error that
            it raises ends the training.

    Returns:
        The best model, with its scores.

    Raises:
        ValueError: The recipe has a wrong value, the data is broken, or the output folder holds an unfinished run or
            is in use.
        OSError: The output folder can't be written to.
        Interrupted: A signal arrived; the state is saved.
    """
    recipe = with_options_of_captioner(recipe)
    accelerator = prepare_accelerator(recipe)
    with Interruption() as interruption, owned_folder(recipe.run.output_dir, accelerator):
        checkpoint = find_checkpoint(recipe, accelerator)
        data = load_data(recipe, accelerator)
        model, processor = build_captioner(recipe, data.train.rows["captions"])
        if before_training is not None and accelerator.is_main_process:
            before_training(model)
        run = build_run(recipe, model, processor, data, accelerator, checkpoint=checkpoint, interruption=interruption)
        start_output(recipe, run)
        while run.stage is not None:
            loader = start_stage(recipe, run, processor, data)
            while run.has_epochs_left:
                run.train_epoch(loader)
                predictions, scores = validate(recipe, run, processor, data)
                end_epoch(recipe, run, processor, data, predictions, scores)
            run.end_stage()
        trained = evaluate_best(recipe, run, processor, data)
        if accelerator.is_main_process:
            report_best(Path(recipe.run.output_dir), trained.evaluation, data.validation.rows, run, recipe)
    accelerator.end_training()
    return trained


def start_output(recipe: Recipe, run: Run) -> None:
    """Write the recipe and the log so far to the output folder, and start the trackers."""
    start_trackers(run.accelerator, recipe.as_fields())
    if run.accelerator.is_main_process:
        output_dir = Path(recipe.run.output_dir)
        with explain_write_errors("The recipe", output_dir):
            write_atomically(output_dir / "recipe.yaml", yaml.safe_dump(recipe.as_fields(), sort_keys=False))
        write_log(output_dir, run)


def start_stage(recipe: Recipe, run: Run, processor: CaptionerProcessor, data: TrainingData) -> StepLoader:
    """Start the current stage and return the loader of its training batches.

    A later stage starts from the best weights so far. If the run was resumed within this stage, it is already started.
    """
    if not run.is_under_way:
        is_first = run.progress.stage == 0
        run.start_stage(None if is_first else load_best(recipe, run.model).state_dict())
    cache_features(recipe, run, processor, data)
    return build_loader(recipe, processor, data.train, run.accelerator)


def validate(
    recipe: Recipe, run: Run, processor: CaptionerProcessor, data: TrainingData
) -> tuple[list[Prediction], dict[str, float]]:
    """Caption the validation images; return the captions, and their scores with `validation_seconds`."""
    assert run.stage is not None
    started = time.monotonic()
    run.prepare_to_validate()
    predictions = decode_captions(
        run.validated_model,
        processor,
        data.validation.rows,
        run.accelerator,
        cells=data.validation.features,
        from_stage=data.validation.from_stage,
        description=f"{run.stage.name} {run.progress.epoch + 1}/{run.stage.epochs}, validating",
        num_beams=recipe.decoding.num_beams,
    )
    return predictions, {**score_captions(predictions), "validation_seconds": time.monotonic() - started}


def end_epoch(
    recipe: Recipe,
    run: Run,
    processor: CaptionerProcessor,
    data: TrainingData,
    predictions: list[Prediction],
    scores: dict[str, float],
) -> None:
    """Log the epoch just validated, and save its model if it is the best so far."""
    output_dir = Path(recipe.run.output_dir)

    def save(folder: Path) -> None:
        run.validated_model.save_pretrained(folder)
        processor.save_pretrained(folder)

    is_best = run.end_epoch(scores, scores[recipe.stages.select_by])
    if run.accelerator.is_main_process:
        write_log(output_dir, run)
        if is_best:
            with explain_write_errors("The model", output_dir, then=HOW_TO_GO_ON):
                replace_files(output_dir, save)
        log_epoch(run, processor, predictions, data.validation.rows)
    logger.info(epoch_line(run, is_best=is_best))
    for warning in collapse_warnings(scores):
        logger.warning(warning)
    if run.progress.epochs_since_best == recipe.stages.patience:
        logger.info(f"No better {recipe.stages.select_by} in {recipe.stages.patience} epochs: stopping early.")
    run.accelerator.wait_for_everyone()


def load_best(recipe: Recipe, model: CaptionerModel) -> CaptionerModel:
    """Load the best model from the output folder.

    Args:
        recipe: Recipe of the training.
        model: Captioner in training, whose weights have the same names and shapes.

    Raises:
        ValueError: The files were deleted or changed since they were saved.
    """
    folder = recipe.run.output_dir
    try:
        best = CaptionerModel.from_pretrained(folder, local_files_only=True)
        shapes, others = ({name: x.shape for name, x in m.state_dict().items()} for m in (model, best))
        if shapes != others:
            raise ValueError("its weights are those of another model")
    except Exception as e:  # whatever a library raises about a file that is not what was saved
        if is_out_of_memory(e):
            raise
        raise ValueError(
            f"The best model so far can't be loaded from {folder!r}, where the training saved it: {first_line(e)} Put "
            f"it back and go on with --resume, or train anew: delete {str(Path(folder) / 'checkpoints')!r}."
        ) from e
    return best


def evaluate_best(recipe: Recipe, run: Run, processor: CaptionerProcessor, data: TrainingData) -> TrainedCaptioner:
    """Load the best model from the output folder, and score it on the validation images."""
    accelerator = run.accelerator
    model = load_best(recipe, run.model).to(accelerator.device)
    num_beams = recipe.decoding.final_num_beams
    predictions = decode_captions(
        model,
        processor,
        data.validation.rows,
        accelerator,
        cells=data.validation.features,
        from_stage=data.validation.from_stage,
        num_beams=num_beams,
    )
    evaluation = evaluate_predictions(
        predictions,
        system=recipe.run.push_to_hub or recipe.run.output_dir,
        dataset=recipe.data.dataset,
        split="validation",
        split_images=data.num_validation_images,
        decoding=describe_decoding(model.generation_config, num_beams=num_beams),
    )
    return TrainedCaptioner(model, processor, evaluation)
