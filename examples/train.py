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
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset

from hf_captioner import (
    CaptionerImageProcessor,
    CaptionerModel,
    CaptionerProcessor,
    build_tokenizer,
    load_captions,
    push,
)
from hf_captioner.captions import bad_endings
from hf_captioner.cells import Split, cached_cells
from hf_captioner.checkpoints import Checkpoint, Checkpoints, replace_files, said_if_full
from hf_captioner.cli import build_accelerator, parse_recipe, precision_here, run_main
from hf_captioner.data import CaptionCollator, check_captions, drop_broken_images, undecoded
from hf_captioner.evaluation import (
    Prediction,
    collapse_warnings,
    decode_captions,
    evaluate_predictions,
    score_captions,
)
from hf_captioner.hub import check_push
from hf_captioner.interruption import Interruption
from hf_captioner.loading import StepLoader, StepSampler, num_cores
from hf_captioner.protocol import describe_decoding
from hf_captioner.rewards import CaptionReward, Rewards
from hf_captioner.stages import EncoderTraining, Likelihood, Optimization, Stage
from hf_captioner.tracking import log_epoch, start_trackers, tracker_names
from hf_captioner.training import Run
from hf_captioner.training_report import epoch_line, report_best, summary, write_log
from hf_captioner.word_vectors import load_word_vectors


def option(default: Any, help: str) -> Any:
    """A field of the recipe with its line in --help."""
    return field(default=default, metadata={"help": help})


@dataclass
class Recipe:
    """Everything that decides a training run. The defaults train on drawn shapes from scratch."""

    dataset: str = option("shapes", "Name of a data set, a folder or file in any usual form, or an id on the Hub.")
    dataset_format: str | None = option(None, "Form of its files, such as coco or kaggle; recognised by default.")
    output_dir: str = option("outputs/shapes", "Folder for the best model, the log and the pictures.")
    seed: int = option(0, "Seed of weights, shuffling and dropout.")

    encoder_type: str = option("timm", "Name among the encoders; timm wraps any of its models with a grid of cells.")
    encoder_name: str = option("test_resnet", "Architecture for that encoder, for timm one such as resnet101.")
    encoder_kwargs: str = option(
        "{output_stride: 16}", "Further arguments of the encoder, for timm those of timm.create_model, as YAML."
    )
    pretrained: bool = option(False, "Start from timm's weights for the encoder.")
    encoder_weights: str | None = option(None, "Safetensors file with these weights, instead of the Hub.")
    data_config: str = option(
        "{input_size: [3, 96, 96], crop_pct: 1.0}",
        "What the encoder wants of pixels where it differs from timm's account, as YAML.",
    )
    freeze_encoder: bool = option(False, "Train the decoder only, but in finetune_epochs.")
    encoder_learning_rate: float | None = option(
        None, "Highest learning rate of the encoder; the decoder's by default."
    )
    encoder_from_stage: int = option(0, "First stage of the encoder to train; 0 is the stem, the last is at the cells.")
    freeze_batch_norm: bool | None = option(
        None, "Keep the encoder's batch norms as they are; by default where it starts from trained weights."
    )
    gradient_checkpointing: bool = option(False, "Train the encoder in little memory, a third slower.")

    attention_type: str = option("additive", "Name among the attentions.")
    attention_size: int = option(256, "Width of the attention's hidden layer.")
    attention_kwargs: str = option("{}", "Further arguments of the attention, as YAML, such as {num_heads: 4}.")
    decoder_type: str = option("spatial", "Name among the decoders, such as lstm, Show, Attend and Tell's.")
    decoder_kwargs: str = option("{}", "Further arguments of the decoder, as YAML, such as {num_layers: 2}.")
    embedding_size: int = option(128, "Width of a word embedding.")
    hidden_size: int = option(256, "Width of the decoder's state.")
    tie_word_embeddings: bool = option(False, "Score words by their embeddings, which are trained once for both.")
    word_vectors: str | None = option(None, "Text file of word vectors, as GloVe's, that embeddings start from.")
    gate: bool = option(False, "Scale the context by a gate.")
    deep_output: bool = option(False, "Compute words from state, context and the word before.")
    memory_dropout: float = option(0.0, "Dropout on image cells.")
    embedding_dropout: float = option(0.0, "Dropout on word embeddings.")
    output_dropout: float = option(0.1, "Dropout before the last layer.")
    tokenizer: Literal["words", "bpe"] = option("words", "Words, or pieces (BPE) for languages without spaces.")
    min_count: int = option(1, "How often a word (or two pieces in a row) must occur to be in the vocabulary.")
    vocab_size: int | None = option(None, "Largest vocabulary; by default no limit for words and 4096 for BPE.")
    max_words: int = option(30, "Longer training captions are cut after so many words, or pieces.")

    mirror: bool = option(False, "Train on mirrored images too. Not where captions tell left from right.")
    augment: bool = option(False, "Train on images cropped a little and of other light, where no cells are cached.")
    epochs: int = option(4, "Passes over the training images.")
    batch_size: int = option(32, "Images in a batch on each process; every image brings all its captions.")
    gradient_accumulation_steps: int = option(1, "Batches on each process that make one step of the optimizer.")
    learning_rate: float = option(2e-3, "Highest learning rate.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = option("cosine", "Course of the learning rate.")
    warmup: float = option(0.1, "Share of the steps in which the learning rate rises.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = option(5.0, "Longest gradient; longer ones are scaled down.")
    ema_decay: float = option(0.0, "Validate and keep a running average of the weights that decays so; 0 for none.")
    scheduled_sampling: float = option(
        0.0, "Probability by the end with which words are read that the model draws, not people's."
    )
    scheduled_sampling_course: Literal["linear", "exponential", "inverse_sigmoid", "constant"] = option(
        "linear", "How it gets there from 0."
    )
    label_smoothing: float = option(0.0, "Probability spread over the vocabulary.")
    doubly_stochastic_weight: float = option(0.0, "Weight of the term that asks every cell to be attended to.")
    doubly_stochastic_reduction: Literal["mean", "sum"] = option("mean", "That term's reduction over cells.")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "Precision of training.")

    select_by: Literal["cider", "bleu_4"] = option("bleu_4", "Validation score by which the best epoch is kept.")
    finetune_epochs: int = option(0, "Passes over the images that follow, training the encoder too.")
    finetune_learning_rate: float = option(1e-4, "Highest learning rate of the decoder in these.")
    reward_epochs: int = option(0, "Passes over the images that follow, rewarding sampled captions by CIDEr-D.")
    reward_learning_rate: float = option(1e-4, "Highest learning rate of these.")
    reward_samples: int = option(5, "Captions sampled for each image.")
    reward_baseline: Literal["others", "greedy"] = option(
        "others", "What a caption's reward is held against: the mean of the image's others, or greedy decoding's."
    )
    reward_top_k: int = option(10, "They are drawn among so many likeliest words each time; 0 for all words.")
    reward_bleu_weight: float = option(0.0, "Weight of BLEU-4 beside CIDEr-D in the reward.")
    reward_likelihood_weight: float = option(0.0, "Weight of the likelihood of people's captions beside the rewards.")
    patience: int = option(5, "End a stage after so many epochs without a better score.")
    num_beams: int = option(5, "Beams when validating each epoch.")
    final_num_beams: int = option(5, "Beams for the scores of the best model, at the end.")
    max_length: int = option(31, "Longest caption to generate, <start> and <end> included.")
    length_penalty: float = option(1.0, "Power of the length by which beam search divides a caption's score.")
    no_repeat_ngram_size: int = option(0, "No so many words in a row are generated twice in a caption.")
    min_length: int = option(0, "Shortest caption to generate, <start> and <end> included.")
    suppress_bad_endings: bool = option(False, "Never end a caption in an English word such as 'a' or 'of'.")

    resume: bool = option(False, "Go on from the newest checkpoint in the output folder, exactly.")
    checkpoint_minutes: float = option(10.0, "Minutes between checkpoints within an epoch.")
    keep_checkpoints: int = option(2, "How many of the newest are kept.")

    push_to_hub: str | None = option(
        None, "Publish the best model in the end, with four validation images: its id on the Hub."
    )
    license: str | None = option(None, "Of its weights, for push_to_hub: apache-2.0, cc-by-nc-4.0, …")

    tracking: Literal["auto", "tensorboard", "wandb", "none"] = option(
        "auto", "Where figures, captions and pictures of each epoch go; auto is TensorBoard where it is installed."
    )
    cache_cells: bool = option(True, "Keep a frozen encoder's cells on disk.")
    cache_dir: str | None = option(None, "Folder for these cells.")
    num_workers: int | None = option(
        None, "Processes that read images; by default one a core, 8 at most, and none where cells are cached."
    )
    num_threads: int | None = option(None, "Threads of each process on a CPU; all cores, shared out, by default.")
    skip_broken: bool = option(False, "Go on without unreadable images and empty captions, naming each.")
    max_images: int | None = option(None, "Use only so many images of each split, to try things out.")


# Fields that do not change what is trained, and so may differ when a run is resumed.
MAY_CHANGE = (
    *("output_dir", "encoder_weights", "final_num_beams", "resume", "checkpoint_minutes", "keep_checkpoints"),
    *("push_to_hub", "license", "tracking", "gradient_checkpointing", "cache_dir", "num_workers", "num_threads"),
)


def main(argv: Sequence[str]) -> None:
    """Train, validate, keep the best, and show what came out."""
    asked = parse_recipe(Recipe, argv, description=__doc__.splitlines()[0])
    recipe = replace(asked, mixed_precision=precision_here(asked.mixed_precision))
    accelerator = build_accelerator(
        recipe.mixed_precision,
        recipe.num_threads,
        recipe.gradient_accumulation_steps,
        log_with=tracker_names(recipe.tracking) or None,
        project_dir=recipe.output_dir,
    )
    if recipe != asked:
        accelerator.print("This processor has no instructions for bf16: training in single precision, which is faster.")
    with Interruption() as interruption:
        train_and_report(recipe, accelerator, interruption)
    accelerator.end_training()


def train_and_report(recipe: Recipe, accelerator: Accelerator, interruption: Interruption) -> None:
    """From the recipe to the report."""
    set_seed(recipe.seed)
    output_dir = Path(recipe.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    say = accelerator.print
    checkpoints = Checkpoints(output_dir / "checkpoints", keep=recipe.keep_checkpoints)
    checkpoint = find_checkpoint(recipe, checkpoints, accelerator)

    once = functools.cache(say)  # what is said of a whole data set
    splits = {name: Split(load_split(recipe, name, accelerator, once)) for name in ("train", "validation")}
    model, processor = build_captioner(recipe, splits["train"].rows["captions"], report=say)
    if recipe.push_to_hub and accelerator.is_main_process:
        check_push(model.config, recipe.push_to_hub, recipe=asdict(recipe))  # now, not after hours of training
    model.to(accelerator.device)
    say(
        f"{recipe.dataset}: {len(splits['train'].rows)} images to train on, {len(splits['validation'].rows)} to "
        f"validate, a vocabulary of {len(processor.tokenizer)} ({recipe.tokenizer}). "
        f"{recipe.encoder_name} with {recipe.decoder_type} decoder."
    )
    sampler = StepSampler(
        len(splits["train"].rows),
        recipe.batch_size,
        seed=recipe.seed,
        num_processes=accelerator.num_processes,
        process=accelerator.process_index,
        accumulation=accelerator.gradient_accumulation_steps,
    )
    facts = {name: value for name, value in asdict(recipe).items() if name not in MAY_CHANGE}
    sizes = {"number of processes": accelerator.num_processes, "number of images": len(splits["train"].rows)}
    run = Run(
        model,
        build_stages(recipe, model, processor, splits["train"]),
        accelerator,
        num_steps=sampler.num_steps,
        optimization=Optimization(**{field.name: getattr(recipe, field.name) for field in fields(Optimization)}),
        checkpoints=checkpoints,
        minutes=recipe.checkpoint_minutes,
        facts={**facts, **sizes, "vocabulary": model.config.vocab_size},
        interruption=interruption,
    )
    set_seed(recipe.seed, device_specific=True)  # processes begin with the same weights and draw different dropout
    if checkpoint is not None:
        run.restore(checkpoint)
        say(f"Going on from {str(checkpoint.path)!r}: {len(run.progress.log)} epochs and {run.progress.step} steps.")
    start_trackers(accelerator, asdict(recipe))
    train(recipe, run, sampler, processor, splits)

    best = CaptionerModel.from_pretrained(output_dir).to(accelerator.device)
    predictions = decode_captions(
        best,
        processor,
        splits["validation"].rows,
        accelerator,
        cells=splits["validation"].cells,
        num_beams=recipe.final_num_beams,
    )
    if accelerator.is_main_process:
        protocol = f"{recipe.dataset}, validation, {len(predictions)} images, {recipe.final_num_beams} beams"
        report_best(output_dir, predictions, splits["validation"].rows, protocol)
        print(f"\n{summary(run, recipe.select_by)}")
        if recipe.push_to_hub:
            publish(recipe, best, processor, predictions)


def find_checkpoint(recipe: Recipe, checkpoints: Checkpoints, accelerator: Accelerator) -> Checkpoint | None:
    """What to go on from, and a clean folder where there is nothing.

    Raises:
        ValueError: an unfinished run would be lost.
    """
    checkpoint = checkpoints.newest(accelerator.print)
    accelerator.wait_for_everyone()
    if recipe.resume:
        if checkpoint is None:
            accelerator.print(f"No checkpoint in {recipe.output_dir!r} to go on from: the training begins.")
        return checkpoint
    has_begun = checkpoint is not None and any(checkpoint.progress[name] for name in ("stage", "epoch", "step"))
    if checkpoint is not None and has_begun and not checkpoint.progress["is_over"]:
        raise ValueError(
            f"{recipe.output_dir!r} holds a run that is not over ({len(checkpoint.progress['log'])} epochs so far). "
            f"Go on with --resume, name another --output_dir, or delete {str(checkpoints.folder)!r}."
        )
    if accelerator.is_main_process:
        checkpoints.clear()
    return None


def load_split(recipe: Recipe, name: str, accelerator: Accelerator, report: Callable[[str], None]) -> Dataset:
    """Load and check one split."""
    with accelerator.local_main_process_first():
        dataset = load_captions(
            recipe.dataset, name, format=recipe.dataset_format, skip_broken=recipe.skip_broken, report=report
        )
    if recipe.max_images is not None:
        dataset = dataset.select(range(min(recipe.max_images, len(dataset))))
    dataset = check_captions(dataset, skip_broken=recipe.skip_broken, report=accelerator.print)
    if recipe.skip_broken:
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
    if recipe.word_vectors is not None and recipe.tokenizer != "words":
        raise ValueError(
            f"word_vectors is given and the tokenizer is {recipe.tokenizer!r}, whose pieces have no such vectors. "
            "Use --tokenizer words, or no --word_vectors."
        )
    tokenizer = build_tokenizer(
        (c for row in captions for c in row),
        kind=recipe.tokenizer,
        min_count=recipe.min_count,
        vocab_size=recipe.vocab_size,
    )
    model = CaptionerModel.from_encoder(
        recipe.encoder_name,
        pretrained=recipe.pretrained,
        encoder_weights=recipe.encoder_weights,
        data_config=yaml.safe_load(recipe.data_config),
        vocab_size=len(tokenizer),
        tie_word_embeddings=recipe.tie_word_embeddings,
        **{name: getattr(recipe, name) for name in MODEL_FIELDS},
        **{name: yaml.safe_load(getattr(recipe, name)) for name in MODEL_FIELDS_AS_YAML},
    )
    model.generation_config = model.default_generation_config(unknown_token_id=tokenizer.unk_token_id)
    model.generation_config.update(
        max_length=recipe.max_length,
        length_penalty=recipe.length_penalty,
        no_repeat_ngram_size=recipe.no_repeat_ngram_size,
        min_length=recipe.min_length,
        bad_words_ids=bad_endings(tokenizer) or None if recipe.suppress_bad_endings else None,
    )
    if recipe.word_vectors is not None:
        found = load_word_vectors(recipe.word_vectors, model.decoder.embedding, tokenizer.get_vocab())
        report(f"{found} of {len(tokenizer)} words start from {recipe.word_vectors}.")
    if recipe.gradient_checkpointing:
        model.encoder.part.checkpoint_gradients()
    return model, CaptionerProcessor(CaptionerImageProcessor.from_data_config(model.data_config), tokenizer)


def train(
    recipe: Recipe, run: Run, sampler: StepSampler, processor: CaptionerProcessor, splits: dict[str, Split]
) -> None:
    """Train stage by stage, each from the best weights so far; the best epoch's model is in the output."""
    output_dir = Path(recipe.output_dir)
    accelerator, say = run.accelerator, run.accelerator.print
    if accelerator.is_main_process:
        with said_if_full("The recipe", output_dir):
            (output_dir / "recipe.yaml").write_text(yaml.safe_dump(asdict(recipe), sort_keys=False))
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
            is_best = run.end_epoch(scores, scores[recipe.select_by])
            if accelerator.is_main_process:
                write_log(output_dir, run)
                if is_best:
                    replace_files(output_dir, lambda folder: save_captioner(folder, run.kept, processor))
                log_epoch(accelerator, run, processor, predictions, splits["validation"].rows)
            say(epoch_line(run, is_best=is_best))
            for warning in collapse_warnings(scores):
                say(f"  Warning: {warning}")
            accelerator.wait_for_everyone()
        if run.progress.without_better == recipe.patience:
            say(f"No better {recipe.select_by} in {recipe.patience} epochs: stopping early.")
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
        num_beams=recipe.num_beams,
    )
    return predictions, {**score_captions(predictions), "validation_seconds": time.monotonic() - started}


def save_captioner(folder: Path, model: CaptionerModel, processor: CaptionerProcessor) -> None:
    """Model and processor, as `from_pretrained` reads them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def cache_what_is_frozen(recipe: Recipe, run: Run, processor: CaptionerProcessor, splits: dict[str, Split]) -> None:
    """The cells of an encoder that the stage leaves as it is; none for one that it trains."""
    assert run.stage is not None
    accelerator, is_cached = run.accelerator, run.stage.encoder is None and recipe.cache_cells

    def cache(split: Split, *, mirrored: bool = False) -> np.ndarray:
        with accelerator.local_main_process_first():  # one process of each machine computes them
            return cached_cells(
                run.model.encoder,
                processor.image_processor,
                split.rows,
                mirrored=mirrored,
                cache_dir=recipe.cache_dir,
                show_progress=accelerator.is_local_main_process,
            )

    for split in splits.values():
        split.cells = cache(split) if is_cached else None
    train = splits["train"]
    train.mirrored_cells = cache(train, mirrored=True) if is_cached and recipe.mirror else None


def build_loader(
    recipe: Recipe, processor: CaptionerProcessor, split: Split, sampler: StepSampler, accelerator: Accelerator
) -> StepLoader:
    """Batches of the training split, in an order drawn anew each epoch."""
    collator = CaptionCollator(
        processor,
        cells=split.cells,
        mirror=recipe.mirror,
        mirrored_cells=split.mirrored_cells,
        max_words=recipe.max_words,
        augment=recipe.augment,
    )
    rows = split.rows if split.cells is None else split.rows.select_columns("captions")
    num_workers = recipe.num_workers
    if num_workers is None:
        num_workers = 0 if split.cells is not None else min(8, max(1, num_cores() // accelerator.num_processes))
    return StepLoader(rows, sampler, collator, device=accelerator.device, num_workers=num_workers)


def build_stages(recipe: Recipe, model: CaptionerModel, processor: CaptionerProcessor, split: Split) -> list[Stage]:
    """Likelihood of people's captions, then with the encoder, then rewards of the model's own, as the recipe has it."""
    frozen = recipe.pretrained if recipe.freeze_batch_norm is None else recipe.freeze_batch_norm

    def encoder(learning_rate: float) -> EncoderTraining:
        return EncoderTraining(recipe.encoder_learning_rate or learning_rate, recipe.encoder_from_stage, frozen)

    joint = None if recipe.freeze_encoder else encoder(recipe.learning_rate)
    likelihood = Likelihood(recipe.scheduled_sampling, recipe.scheduled_sampling_course)
    stages = [Stage("Epoch", recipe.epochs, recipe.learning_rate, likelihood, joint)]
    if recipe.finetune_epochs:
        rate, after = recipe.finetune_learning_rate, Likelihood(recipe.scheduled_sampling, "constant")
        stages.append(Stage("Encoder", recipe.finetune_epochs, rate, after, encoder(rate)))
    if recipe.reward_epochs:
        rewards = Rewards(
            model,
            processor,
            CaptionReward(split.rows["captions"], bleu_weight=recipe.reward_bleu_weight),
            num_samples=recipe.reward_samples,
            baseline=recipe.reward_baseline,
            top_k=recipe.reward_top_k,
            max_length=recipe.max_words + 1,
            likelihood_weight=recipe.reward_likelihood_weight,
        )
        rate = recipe.reward_learning_rate
        joint = None if recipe.freeze_encoder else encoder(rate)
        stages.append(Stage("Rewards", recipe.reward_epochs, rate, rewards, joint))
    return stages


def publish(
    recipe: Recipe, model: CaptionerModel, processor: CaptionerProcessor, predictions: list[Prediction]
) -> None:
    """Push the best model, its scores stamped with their protocol."""
    assert recipe.push_to_hub
    evaluation = evaluate_predictions(
        predictions,
        system=recipe.push_to_hub,
        dataset=recipe.dataset,
        split="validation",
        decoding=describe_decoding(model.generation_config, num_beams=recipe.final_num_beams),
    )
    try:
        url = push(model, processor, recipe.push_to_hub, evaluation, recipe=asdict(recipe))
    except OSError as e:
        command = f"python -m hf_captioner.hub {recipe.output_dir} {recipe.push_to_hub}"
        raise OSError(f"{e} The model is in {recipe.output_dir!r}; to push it: {command}") from e
    print(f"\nPublished: {url}")


if __name__ == "__main__":
    run_main(main)
