"""Train a captioner with Accelerate.

    accelerate launch examples/train.py                                          # drawn shapes, from scratch, minutes
    accelerate launch examples/train.py examples/recipes/flickr8k.yaml           # Flickr8k from the Hub
    accelerate launch examples/train.py RECIPE.yaml --epochs 5 --output_dir out  # any field, overridden
    accelerate launch examples/train.py RECIPE.yaml --resume                     # go on where it was interrupted
    accelerate launch examples/train.py RECIPE.yaml --push_to_hub your-name/captioner --license cc-by-nc-4.0

The output folder holds the best model so far (`AutoModel.from_pretrained(folder)`), `log.jsonl` with a line an epoch,
`curves.png` and `checkpoints/` to resume from; at the end also `scores.json`, `predictions.json` and `attention.png`.
On several machines it must be a folder that all of them see.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset

from ..data.cells import Split, cached_cells
from ..data.collator import CaptionCollator
from ..data.datasets import load_captions
from ..data.loading import StepLoader, StepSampler, num_cores
from ..data.rows import check_captions, drop_broken_images, undecoded
from ..evaluation.predictions import (
    Prediction,
    collapse_warnings,
    decode_captions,
    evaluate_predictions,
    score_captions,
)
from ..evaluation.protocol import describe_decoding
from ..interruption import Interruption
from ..model.captions import bad_endings, build_tokenizer
from ..model.image_processing_captioner import CaptionerImageProcessor
from ..model.modeling_captioner import CaptionerModel
from ..model.processing_captioner import CaptionerProcessor
from ..publishing.hub import check_push, push
from .accelerator import build_accelerator, precision_here
from .checkpoints import Checkpoint, Checkpoints, replace_files, said_if_full
from .recipe import MAY_CHANGE, Recipe
from .report import epoch_line, report_best, summary, write_log
from .rewards import CaptionReward, Rewards
from .run import Run
from .stages import EncoderTraining, Likelihood, Optimization, Stage
from .tracking import log_epoch, start_trackers, tracker_names
from .word_vectors import load_word_vectors


def train(recipe: Recipe) -> None:
    """Train, validate, keep the best model, and show what came out."""
    precision = precision_here(recipe.optimization.mixed_precision)
    accelerator = build_accelerator(
        precision,
        recipe.run.num_threads,
        recipe.optimization.gradient_accumulation_steps,
        log_with=tracker_names(recipe.run.tracking) or None,
        project_dir=recipe.run.output_dir,
    )
    if precision != recipe.optimization.mixed_precision:
        accelerator.print("This processor has no instructions for bf16: training in single precision, which is faster.")
        recipe = replace(recipe, optimization=replace(recipe.optimization, mixed_precision=precision))
    with Interruption() as interruption:
        train_and_report(recipe, accelerator, interruption)
    accelerator.end_training()


def train_and_report(recipe: Recipe, accelerator: Accelerator, interruption: Interruption) -> None:
    """From the recipe to the report."""
    set_seed(recipe.run.seed)
    output_dir = Path(recipe.run.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    say = accelerator.print
    checkpoints = Checkpoints(output_dir / "checkpoints", keep=recipe.run.keep_checkpoints)
    checkpoint = find_checkpoint(recipe, checkpoints, accelerator)

    once = functools.cache(say)  # what is said of a whole data set
    splits = {name: Split(load_split(recipe, name, accelerator, once)) for name in ("train", "validation")}
    model, processor = build_captioner(recipe, splits["train"].rows["captions"], report=say)
    if recipe.run.push_to_hub and accelerator.is_main_process:
        check_push(model.config, recipe.run.push_to_hub, recipe=recipe.as_fields())  # now, not after hours of training
    model.to(accelerator.device)
    say(
        f"{recipe.data.dataset}: {len(splits['train'].rows)} images to train on, {len(splits['validation'].rows)} to "
        f"validate, a vocabulary of {len(processor.tokenizer)} ({recipe.data.tokenizer}). "
        f"{recipe.model.encoder_name} with {recipe.model.decoder_type} decoder."
    )
    sampler = StepSampler(
        len(splits["train"].rows),
        recipe.optimization.batch_size,
        seed=recipe.run.seed,
        num_processes=accelerator.num_processes,
        process=accelerator.process_index,
        accumulation=accelerator.gradient_accumulation_steps,
    )
    facts = {name: value for name, value in recipe.as_fields().items() if name not in MAY_CHANGE}
    sizes = {"number of processes": accelerator.num_processes, "number of images": len(splits["train"].rows)}
    run = Run(
        model,
        build_stages(recipe, model, processor, splits["train"]),
        accelerator,
        num_steps=sampler.num_steps,
        optimization=Optimization(**{field.name: recipe.as_fields()[field.name] for field in fields(Optimization)}),
        checkpoints=checkpoints,
        minutes=recipe.run.checkpoint_minutes,
        facts={**facts, **sizes, "vocabulary": model.config.vocab_size},
        interruption=interruption,
    )
    set_seed(recipe.run.seed, device_specific=True)  # processes begin with the same weights and draw different dropout
    if checkpoint is not None:
        run.restore(checkpoint)
        say(f"Going on from {str(checkpoint.path)!r}: {len(run.progress.log)} epochs and {run.progress.step} steps.")
    start_trackers(accelerator, recipe.as_fields())
    train_stages(recipe, run, sampler, processor, splits)

    best = CaptionerModel.from_pretrained(output_dir).to(accelerator.device)
    predictions = decode_captions(
        best,
        processor,
        splits["validation"].rows,
        accelerator,
        cells=splits["validation"].cells,
        num_beams=recipe.decoding.final_num_beams,
    )
    if accelerator.is_main_process:
        protocol = (
            f"{recipe.data.dataset}, validation, {len(predictions)} images, {recipe.decoding.final_num_beams} beams"
        )
        report_best(output_dir, predictions, splits["validation"].rows, protocol)
        print(f"\n{summary(run, recipe.stages.select_by)}")
        if recipe.run.push_to_hub:
            publish(recipe, best, processor, predictions)


def find_checkpoint(recipe: Recipe, checkpoints: Checkpoints, accelerator: Accelerator) -> Checkpoint | None:
    """What to go on from, and a clean folder where there is nothing.

    Raises:
        ValueError: an unfinished run would be lost.
    """
    checkpoint = checkpoints.newest(accelerator.print)
    accelerator.wait_for_everyone()
    if recipe.run.resume:
        if checkpoint is None:
            accelerator.print(f"No checkpoint in {recipe.run.output_dir!r} to go on from: the training begins.")
        return checkpoint
    has_begun = checkpoint is not None and any(checkpoint.progress[name] for name in ("stage", "epoch", "step"))
    if checkpoint is not None and has_begun and not checkpoint.progress["is_over"]:
        raise ValueError(
            f"{recipe.run.output_dir!r} holds a run that is not over ({len(checkpoint.progress['log'])} epochs so far). "
            f"Go on with --resume, name another --output_dir, or delete {str(checkpoints.folder)!r}."
        )
    if accelerator.is_main_process:
        checkpoints.clear()
    return None


def load_split(recipe: Recipe, name: str, accelerator: Accelerator, report: Callable[[str], None]) -> Dataset:
    """Load and check one split."""
    with accelerator.local_main_process_first():
        dataset = load_captions(
            recipe.data.dataset,
            name,
            format=recipe.data.dataset_format,
            skip_broken=recipe.data.skip_broken,
            report=report,
        )
    if recipe.data.max_images is not None:
        dataset = dataset.select(range(min(recipe.data.max_images, len(dataset))))
    dataset = check_captions(dataset, skip_broken=recipe.data.skip_broken, report=accelerator.print)
    if recipe.data.skip_broken:
        dataset = drop_broken_images(dataset, report=accelerator.print)
    return undecoded(dataset)


MODEL_FIELDS = (
    "encoder_type",
    "attention_type",
    "attention_size",
    "decoder_type",
    "embedding_size",
    "hidden_size",
    "gate",
    "deep_output",
    "memory_dropout",
    "embedding_dropout",
    "output_dropout",
    "label_smoothing",
    "doubly_stochastic_weight",
    "doubly_stochastic_reduction",
)
MODEL_FIELDS_AS_YAML = ("encoder_kwargs", "attention_kwargs", "decoder_kwargs")


def build_captioner(
    recipe: Recipe, captions: Sequence[Sequence[str]], report: Callable[[str], None] = print
) -> tuple[CaptionerModel, CaptionerProcessor]:
    """A new captioner with the vocabulary of these captions."""
    if recipe.model.word_vectors is not None and recipe.data.tokenizer != "words":
        raise ValueError(
            f"word_vectors is given and the tokenizer is {recipe.data.tokenizer!r}, whose pieces have no such vectors. "
            "Use --tokenizer words, or no --word_vectors."
        )
    tokenizer = build_tokenizer(
        (c for row in captions for c in row),
        kind=recipe.data.tokenizer,
        min_count=recipe.data.min_count,
        vocab_size=recipe.data.vocab_size,
    )
    model = CaptionerModel.from_encoder(
        recipe.model.encoder_name,
        pretrained=recipe.model.pretrained,
        encoder_weights=recipe.model.encoder_weights,
        data_config=yaml.safe_load(recipe.model.data_config),
        vocab_size=len(tokenizer),
        tie_word_embeddings=recipe.model.tie_word_embeddings,
        **{name: recipe.as_fields()[name] for name in MODEL_FIELDS},
        **{name: yaml.safe_load(recipe.as_fields()[name]) for name in MODEL_FIELDS_AS_YAML},
    )
    model.generation_config = model.default_generation_config(unknown_token_id=tokenizer.unk_token_id)
    model.generation_config.update(
        max_length=recipe.decoding.max_length,
        length_penalty=recipe.decoding.length_penalty,
        no_repeat_ngram_size=recipe.decoding.no_repeat_ngram_size,
        min_length=recipe.decoding.min_length,
        bad_words_ids=bad_endings(tokenizer) or None if recipe.decoding.suppress_bad_endings else None,
    )
    if recipe.model.word_vectors is not None:
        found = load_word_vectors(recipe.model.word_vectors, model.decoder.embedding, tokenizer.get_vocab())
        report(f"{found} of {len(tokenizer)} words start from {recipe.model.word_vectors}.")
    if recipe.optimization.gradient_checkpointing:
        model.encoder.part.checkpoint_gradients()
    return model, CaptionerProcessor(CaptionerImageProcessor.from_data_config(model.data_config), tokenizer)


def train_stages(
    recipe: Recipe, run: Run, sampler: StepSampler, processor: CaptionerProcessor, splits: dict[str, Split]
) -> None:
    """Train stage by stage, each from the best weights so far; the best epoch's model is in the output."""
    output_dir = Path(recipe.run.output_dir)
    accelerator, say = run.accelerator, run.accelerator.print
    if accelerator.is_main_process:
        with said_if_full("The recipe", output_dir):
            (output_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe.as_fields(), sort_keys=False))
        write_log(output_dir, run)
    while run.stage is not None:
        if not run.is_under_way:
            is_first = run.progress.stage == 0
            run.start_stage(None if is_first else CaptionerModel.from_pretrained(output_dir).state_dict())
        cache_what_is_frozen(recipe, run, processor, splits)
        loader = build_loader(recipe, processor, splits["train"], sampler, accelerator)
        while run.epochs_left:
            run.train_epoch(loader)
            predictions, scores = validate(recipe, run, processor, splits["validation"])
            is_best = run.end_epoch(scores, scores[recipe.stages.select_by])
            if accelerator.is_main_process:
                write_log(output_dir, run)
                if is_best:
                    replace_files(output_dir, lambda folder: save_captioner(folder, run.kept, processor))
                log_epoch(accelerator, run, processor, predictions, splits["validation"].rows)
            say(epoch_line(run, is_best=is_best))
            for warning in collapse_warnings(scores):
                say(f"  Warning: {warning}")
            accelerator.wait_for_everyone()
        if run.progress.without_better == recipe.stages.patience:
            say(f"No better {recipe.stages.select_by} in {recipe.stages.patience} epochs: stopping early.")
        run.end_stage()
        if run.stage is None:
            run.save()


def validate(
    recipe: Recipe, run: Run, processor: CaptionerProcessor, split: Split
) -> tuple[list[Prediction], dict[str, float]]:
    """The captions that the model gives the validation images, and their scores."""
    assert run.stage is not None
    started = time.monotonic()
    run.prepare_to_validate()
    predictions = decode_captions(
        run.kept,
        processor,
        split.rows,
        run.accelerator,
        cells=split.cells,
        description=f"{run.stage.name} {run.progress.epoch + 1}/{run.stage.epochs}, validating",
        num_beams=recipe.decoding.num_beams,
    )
    return predictions, {**score_captions(predictions), "validation_seconds": time.monotonic() - started}


def save_captioner(folder: Path, model: CaptionerModel, processor: CaptionerProcessor) -> None:
    """Model and processor, as `from_pretrained` reads them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def cache_what_is_frozen(recipe: Recipe, run: Run, processor: CaptionerProcessor, splits: dict[str, Split]) -> None:
    """The cells of an encoder that the stage leaves as it is; none for one that it trains."""
    assert run.stage is not None
    accelerator, is_cached = run.accelerator, run.stage.encoder is None and recipe.data.cache_cells

    def cache(split: Split, *, mirrored: bool = False) -> np.ndarray:
        with accelerator.local_main_process_first():  # one process of each machine computes them
            return cached_cells(
                run.model.encoder,
                processor.image_processor,
                split.rows,
                mirrored=mirrored,
                cache_dir=recipe.data.cache_dir,
                show_progress=accelerator.is_local_main_process,
            )

    for split in splits.values():
        split.cells = cache(split) if is_cached else None
    train = splits["train"]
    train.mirrored_cells = cache(train, mirrored=True) if is_cached and recipe.data.mirror else None


def build_loader(
    recipe: Recipe, processor: CaptionerProcessor, split: Split, sampler: StepSampler, accelerator: Accelerator
) -> StepLoader:
    """Batches of the training split, in an order drawn anew each epoch."""
    collator = CaptionCollator(
        processor,
        cells=split.cells,
        mirror=recipe.data.mirror,
        mirrored_cells=split.mirrored_cells,
        max_words=recipe.data.max_words,
        augment=recipe.data.augment,
    )
    rows = split.rows if split.cells is None else split.rows.select_columns("captions")
    num_workers = recipe.data.num_workers
    if num_workers is None:
        num_workers = 0 if split.cells is not None else min(8, max(1, num_cores() // accelerator.num_processes))
    return StepLoader(rows, sampler, collator, device=accelerator.device, num_workers=num_workers)


def build_stages(recipe: Recipe, model: CaptionerModel, processor: CaptionerProcessor, split: Split) -> list[Stage]:
    """Likelihood of people's captions, then with the encoder, then rewards of the model's own, as the recipe has it."""
    frozen = (
        recipe.model.pretrained
        if recipe.optimization.freeze_batch_norm is None
        else recipe.optimization.freeze_batch_norm
    )

    def encoder(learning_rate: float) -> EncoderTraining:
        return EncoderTraining(
            recipe.optimization.encoder_learning_rate or learning_rate, recipe.optimization.encoder_from_stage, frozen
        )

    joint = None if recipe.optimization.freeze_encoder else encoder(recipe.stages.learning_rate)
    likelihood = Likelihood(recipe.stages.scheduled_sampling, recipe.stages.scheduled_sampling_course)
    stages = [Stage("Epoch", recipe.stages.epochs, recipe.stages.learning_rate, likelihood, joint)]
    if recipe.stages.finetune_epochs:
        rate, after = recipe.stages.finetune_learning_rate, Likelihood(recipe.stages.scheduled_sampling, "constant")
        stages.append(Stage("Encoder", recipe.stages.finetune_epochs, rate, after, encoder(rate)))
    if recipe.stages.reward_epochs:
        rewards = Rewards(
            model,
            processor,
            CaptionReward(split.rows["captions"], bleu_weight=recipe.stages.reward_bleu_weight),
            num_samples=recipe.stages.reward_samples,
            baseline=recipe.stages.reward_baseline,
            top_k=recipe.stages.reward_top_k,
            max_length=recipe.data.max_words + 1,
            likelihood_weight=recipe.stages.reward_likelihood_weight,
        )
        rate = recipe.stages.reward_learning_rate
        joint = None if recipe.optimization.freeze_encoder else encoder(rate)
        stages.append(Stage("Rewards", recipe.stages.reward_epochs, rate, rewards, joint))
    return stages


def publish(
    recipe: Recipe, model: CaptionerModel, processor: CaptionerProcessor, predictions: list[Prediction]
) -> None:
    """Push the best model, its scores stamped with their protocol."""
    assert recipe.run.push_to_hub
    evaluation = evaluate_predictions(
        predictions,
        system=recipe.run.push_to_hub,
        dataset=recipe.data.dataset,
        split="validation",
        decoding=describe_decoding(model.generation_config, num_beams=recipe.decoding.final_num_beams),
    )
    try:
        url = push(model, processor, recipe.run.push_to_hub, evaluation, recipe=recipe.as_fields())
    except OSError as e:
        command = f"python -m hf_captioner.publishing.hub {recipe.run.output_dir} {recipe.run.push_to_hub}"
        raise OSError(f"{e} The model is in {recipe.run.output_dir!r}; to push it: {command}") from e
    print(f"\nPublished: {url}")
