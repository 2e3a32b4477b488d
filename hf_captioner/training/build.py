"""The objects of a training, built from its recipe: accelerator, data, captioner, stages, run and data loader."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from datasets import Dataset

from ..data.cells import Split, cached_cells
from ..data.collator import CaptionCollator
from ..data.datasets import load_captions, pick_split
from ..data.digests import data_digests
from ..data.loading import StepLoader, StepSampler, num_cores
from ..data.rows import select_usable_rows
from ..errors import first_line, is_out_of_memory
from ..files import parse_fields
from ..interruption import Interruption
from ..model.captions import bad_endings, build_tokenizer
from ..model.image_processing_captioner import CaptionerImageProcessor
from ..model.modeling_captioner import CaptionerModel
from ..model.processing_captioner import CaptionerProcessor
from .accelerator import build_accelerator, raise_everywhere
from .checkpoints import Checkpoint, Checkpoints
from .continuing import captioner_digest, continued_captioner
from .recipe import Recipe
from .rewards import CaptionReward, Rewards
from .run import DIGEST, Run
from .stages import EncoderTraining, Likelihood, Objective, Optimization, Stage
from .tracking import tracker_names
from .word_vectors import load_word_vectors

logger = logging.getLogger(__name__)


@dataclass
class TrainingData:
    """The two splits of a data set that a training reads.

    Args:
        train: Images to train on.
        validation: Images by which the best epoch is selected.
        num_validation_images: Number of images in the whole validation split, of which `max_images` may use a part.
    """

    train: Split
    validation: Split
    num_validation_images: int


def prepare_accelerator(recipe: Recipe) -> Accelerator:
    """Build the accelerator that a recipe asks for, with its trackers."""
    return build_accelerator(
        recipe.optimization.mixed_precision,
        recipe.run.num_threads,
        recipe.optimization.gradient_accumulation_steps,
        log_with=tracker_names(recipe.run.tracking) or None,
        project_dir=recipe.run.output_dir,
    )


def open_checkpoints(recipe: Recipe) -> Checkpoints:
    """Return the folder of the run's checkpoints."""
    return Checkpoints(Path(recipe.run.output_dir) / "checkpoints", keep=recipe.run.keep_checkpoints)


def find_checkpoint(recipe: Recipe, accelerator: Accelerator) -> Checkpoint | None:
    """Return the checkpoint to resume from; without `--resume` return None, and delete those of a finished run.

    Raises:
        ValueError: The output folder holds an unfinished run, and `--resume` is not given.
    """
    checkpoints = open_checkpoints(recipe)
    checkpoint = checkpoints.newest()
    accelerator.wait_for_everyone()
    if recipe.run.resume:
        if checkpoint is None:
            logger.info(f"No checkpoint in {recipe.run.output_dir!r} to resume from: the training begins.")
        return checkpoint
    if checkpoint is not None and checkpoint.is_begun and not checkpoint.is_over:
        raise ValueError(
            f"{recipe.run.output_dir!r} holds an unfinished run. Go on with --resume, name another --output_dir, or "
            f"delete {str(checkpoints.folder)!r}."
        )
    if accelerator.is_main_process:
        checkpoints.clear()
    return None


def load_data(recipe: Recipe, accelerator: Accelerator) -> TrainingData:
    """Load the training and validation splits, and refuse or skip what is broken, as the recipe has it."""
    options = recipe.data
    with accelerator.local_main_process_first():
        dataset = load_captions(
            options.dataset,
            format=options.dataset_format,
            skip_broken=options.skip_broken,
            allow_urls=options.allow_urls,
            allow_outside=options.allow_outside,
            report=logger.info,
        )
    train, validation = (pick_split(dataset, name, options.dataset) for name in ("train", "validation"))

    def usable(split: Dataset) -> Split:
        rows = select_usable_rows(
            split, max_images=options.max_images, skip_broken=options.skip_broken, report=logger.info
        )
        return Split(rows)

    return TrainingData(usable(train), usable(validation), len(validation))


def build_captioner(recipe: Recipe, captions: Sequence[Sequence[str]]) -> tuple[CaptionerModel, CaptionerProcessor]:
    """Build the captioner to train, whose random weights are drawn with the recipe's seed, and its processor.

    Args:
        recipe: Recipe of the training.
        captions: Captions of each training image, whose words become the vocabulary, or are added to it.
    """
    decoding = recipe.decoding
    if decoding.min_length > decoding.max_length:
        raise ValueError(f"min_length is {decoding.min_length}, but max_length {decoding.max_length}.")
    build = _new_captioner if recipe.model.from_captioner is None else continued_captioner
    model, processor = build(recipe, captions)
    model.generation_config.update(
        max_length=decoding.max_length,
        length_penalty=decoding.length_penalty,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        min_length=decoding.min_length,
        bad_words_ids=bad_endings(processor.tokenizer) or None if decoding.suppress_bad_endings else None,
    )
    if recipe.optimization.gradient_checkpointing:
        model.encoder.part.checkpoint_gradients()
    return model, processor


def _new_captioner(recipe: Recipe, captions: Sequence[Sequence[str]]) -> tuple[CaptionerModel, CaptionerProcessor]:
    """Build a new captioner, and its processor."""
    options = recipe.model
    if options.word_vectors is not None and recipe.data.tokenizer != "words":
        raise ValueError(
            f"word_vectors is given and the tokenizer is {recipe.data.tokenizer!r}, whose pieces have no such vectors. "
            "Use --tokenizer words, or no --word_vectors."
        )
    if options.encoder_weights is not None and not options.pretrained:
        raise ValueError(
            "encoder_weights is given, but pretrained is false: nothing would read them. Add --pretrained."
        )
    tokenizer = build_tokenizer(
        (caption for row in captions for caption in row),
        kind=recipe.data.tokenizer,
        min_count=recipe.data.min_count,
        vocab_size=recipe.data.vocab_size,
    )
    set_seed(recipe.run.seed)
    with explain_wrong_options():
        model = CaptionerModel.from_encoder(
            options.encoder_name,
            pretrained=options.pretrained,
            encoder_weights=options.encoder_weights,
            data_config=parse_fields(options.data_config),
            encoder_type=options.encoder_type,
            encoder_kwargs=parse_fields(options.encoder_kwargs),
            attention_type=options.attention_type,
            attention_size=options.attention_size,
            attention_kwargs=parse_fields(options.attention_kwargs),
            decoder_type=options.decoder_type,
            decoder_kwargs=parse_fields(options.decoder_kwargs),
            vocab_size=len(tokenizer),
            embedding_size=options.embedding_size,
            hidden_size=options.hidden_size,
            projection_size=options.projection_size,
            tie_word_embeddings=options.tie_word_embeddings,
            gate=options.gate,
            deep_output=options.deep_output,
            memory_dropout=options.memory_dropout,
            embedding_dropout=options.embedding_dropout,
            output_dropout=options.output_dropout,
            label_smoothing=recipe.optimization.label_smoothing,
            doubly_stochastic_weight=recipe.optimization.doubly_stochastic_weight,
            doubly_stochastic_reduction=recipe.optimization.doubly_stochastic_reduction,
        )
    model.generation_config = model.default_generation_config(unknown_token_id=tokenizer.unk_token_id)
    if options.word_vectors is not None:
        found = load_word_vectors(options.word_vectors, model.decoder.embedding, tokenizer.get_vocab())
        logger.info(f"{found} of {len(tokenizer)} words start from {options.word_vectors}.")
    return model, CaptionerProcessor(CaptionerImageProcessor.from_data_config(model.data_config), tokenizer)


@contextmanager
def explain_wrong_options() -> Iterator[None]:
    """Turn what libraries raise about an architecture that can't be built into a ValueError."""
    try:
        yield
    except Exception as e:
        if isinstance(e, ValueError | OSError | ImportError) or is_out_of_memory(e):
            raise
        # huggingface_hub puts errors of a configuration's checks into errors of its own.
        raise ValueError(f"No captioner can be built with these options: {first_line(e.__cause__ or e)}") from e


def build_stages(
    recipe: Recipe, model: CaptionerModel, processor: CaptionerProcessor, captions: Sequence[Sequence[str]]
) -> list[Stage]:
    """Build the stages: likelihood of captions and, if the recipe has them, fine-tuning of the encoder and rewards."""
    options, optimization = recipe.stages, recipe.optimization
    freeze_batch_norm = optimization.freeze_batch_norm
    if freeze_batch_norm is None:
        freeze_batch_norm = recipe.model.pretrained

    def stage(name: str, epochs: int, learning_rate: float, objective: Objective, *, finetunes: bool = False) -> Stage:
        """Build a stage; it trains the encoder if `finetunes` is set or if the recipe does not freeze the encoder."""
        encoder_rate = optimization.encoder_learning_rate or learning_rate
        encoder = EncoderTraining(encoder_rate, optimization.encoder_from_stage, freeze_batch_norm)
        is_frozen = optimization.freeze_encoder and not finetunes
        return Stage(name, epochs, learning_rate, objective, None if is_frozen else encoder)

    likelihood = Likelihood(options.scheduled_sampling, options.scheduled_sampling_course)
    stages = [stage("Epoch", options.epochs, options.learning_rate, likelihood)]
    if options.finetune_epochs:
        likelihood = Likelihood(options.scheduled_sampling, "constant")
        stages.append(
            stage("Encoder", options.finetune_epochs, options.finetune_learning_rate, likelihood, finetunes=True)
        )
    if options.reward_epochs:
        rewards = Rewards(
            model,
            processor,
            CaptionReward(captions, bleu_weight=options.reward_bleu_weight),
            num_samples=options.reward_samples,
            baseline=options.reward_baseline,
            top_k=options.reward_top_k,
            max_length=recipe.data.max_words + 1,
            likelihood_weight=options.reward_likelihood_weight,
        )
        stages.append(stage("Rewards", options.reward_epochs, options.reward_learning_rate, rewards))
    return stages


def build_run(
    recipe: Recipe,
    model: CaptionerModel,
    processor: CaptionerProcessor,
    data: TrainingData,
    accelerator: Accelerator,
    *,
    checkpoint: Checkpoint | None = None,
    interruption: Interruption | None = None,
) -> Run:
    """Build the run of a training, at its beginning or where a checkpoint left it; move the model to its device.

    Raises:
        ValueError: An option has no such value, or the checkpoint is of a run with other settings.
    """
    num_images, values = len(data.train.rows), recipe.as_fields()
    is_new = recipe.model.from_captioner is None
    source = {} if is_new else {f"{DIGEST}the captioner's weights and words": captioner_digest(model, processor)}
    if checkpoint is not None:  # of a version without some of the fields, whose defaults are what it did
        checkpoint.settings = Recipe().fixed_fields() | checkpoint.settings
    run = Run(
        model.to(accelerator.device),
        build_stages(recipe, model, processor, data.train.rows["captions"]),
        accelerator,
        num_steps=build_sampler(recipe, num_images, accelerator).num_steps,
        optimization=Optimization(**{field.name: values[field.name] for field in fields(Optimization)}),
        checkpoints=open_checkpoints(recipe),
        checkpoint_minutes=recipe.run.checkpoint_minutes,
        # The names are part of the format of checkpoints.
        settings={
            **recipe.fixed_fields(),
            "mixed_precision": accelerator.mixed_precision,
            "number of processes": accelerator.num_processes,
            "number of images": num_images,
            "vocabulary": model.config.vocab_size,
            **source,
            **digests_of_data(data, accelerator),
        },
        interruption=interruption,
    )
    logger.info(
        f"{recipe.data.dataset}: {num_images} images to train on, {len(data.validation.rows)} to validate, a "
        f"vocabulary of {len(processor.tokenizer)} ({recipe.data.tokenizer}). {recipe.model.encoder_name} with "
        f"{recipe.model.decoder_type} decoder."
    )
    # All processes began with the same weights; from here on each draws its own dropout.
    set_seed(recipe.run.seed, device_specific=True)
    if checkpoint is not None:
        run.restore(checkpoint)
        epochs, steps = len(run.progress.log), run.progress.step
        logger.info(f"Going on from {str(checkpoint.path)!r}: {epochs} epochs and {steps} steps are done.")
    return run


def digests_of_data(data: TrainingData, accelerator: Accelerator) -> dict[str, str]:
    """Return digests of both splits' images, captions and image ids, by which a resumed run knows them. Collective."""
    digests: list[dict[str, str]] = [{}]
    with raise_everywhere(accelerator):
        if accelerator.is_main_process:
            for name, split in (("training", data.train), ("validation", data.validation)):
                for part, digest in data_digests(split.rows).items():
                    digests[0][f"{DIGEST}the {name} {part}"] = digest
    return broadcast_object_list(digests)[0] if accelerator.num_processes > 1 else digests[0]


def build_sampler(recipe: Recipe, num_images: int, accelerator: Accelerator) -> StepSampler:
    """Build the sampler that assigns the training images of each step to processes and batches."""
    return StepSampler(
        num_images,
        recipe.optimization.batch_size,
        seed=recipe.run.seed,
        num_processes=accelerator.num_processes,
        process=accelerator.process_index,
        accumulation=accelerator.gradient_accumulation_steps,
    )


def build_loader(recipe: Recipe, processor: CaptionerProcessor, split: Split, accelerator: Accelerator) -> StepLoader:
    """Build the loader of training batches, which reads cached cells if there are any, else images."""
    collator = CaptionCollator(
        processor,
        cells=split.features,
        mirror=recipe.data.mirror,
        mirrored_cells=split.mirrored_features,
        from_stage=split.from_stage,
        max_words=recipe.data.max_words,
        pad_to_longest=True,
        read_words=False,
        augment=recipe.data.augment,
    )
    rows = split.rows if split.features is None else split.rows.select_columns("captions")
    num_workers = recipe.data.num_workers
    if num_workers is None:
        num_workers = 0 if split.features is not None else min(8, max(1, num_cores() // accelerator.num_processes))
    sampler = build_sampler(recipe, len(split.rows), accelerator)
    return StepLoader(rows, sampler, collator, device=accelerator.device, num_workers=num_workers)


def cache_features(recipe: Recipe, run: Run, processor: CaptionerProcessor, data: TrainingData) -> None:
    """Cache what the current stage's frozen part of the encoder computes, and drop what the stage before had cached.

    That is the image cells if the stage freezes the encoder, and what enters the first trained stage of the encoder if
    it trains only the last ones and the encoder can be divided there. Nothing is cached if images are augmented, or
    if the recipe has no cache.
    """
    assert run.stage is not None
    encoder, options = run.model.encoder, recipe.data
    is_trained = run.stage.encoder is not None
    from_stage = recipe.optimization.encoder_from_stage if is_trained or recipe.stages.finetune_epochs else 0
    can_divide = options.cache_cells and not options.augment and encoder.can_divide(from_stage)
    is_cached = options.cache_cells and (can_divide or not is_trained)

    def cached(split: Split, **kwargs: Any) -> np.ndarray:
        """Compute or load features of a split, on one process of each machine first."""
        with run.accelerator.local_main_process_first():
            return cached_cells(
                encoder,
                processor.image_processor,
                split.rows,
                cache_dir=options.cache_dir,
                check=run.accelerator.is_local_main_process,
                show_progress=run.accelerator.is_local_main_process,
                **kwargs,
            )

    def features_of(split: Split, *, mirrored: bool) -> np.ndarray | None:
        """Return what the stage reads of a split's images; None for the images themselves."""
        if not is_cached:
            return None
        if is_trained:
            return cached(split, mirrored=mirrored, stage=from_stage)
        # Where the encoder is trained in any stage, the part of it that stays frozen is run only once.
        return cached(split, mirrored=mirrored, through_stage=from_stage if can_divide else None)

    for split, is_mirrored in ((data.train, options.mirror), (data.validation, False)):
        split.from_stage = from_stage if is_cached and is_trained else None
        split.features = features_of(split, mirrored=False)
        split.mirrored_features = features_of(split, mirrored=True) if is_mirrored else None
