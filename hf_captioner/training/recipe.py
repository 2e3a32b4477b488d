"""A recipe: everything that decides a training run, from a YAML file and the command line.

Fields are grouped here and in `--help`. In YAML files and on the command line their names are flat.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from transformers import HfArgumentParser

from ..cli import CommandParser

RECIPE_FOLDER = Path(__file__).with_name("recipes")


def option(default: Any, help: str) -> Any:
    """Declare a field of a recipe with its line in `--help`."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataOptions:
    """The images and captions to train on, and how they are read."""

    _argument_group_name: ClassVar[str] = "data"

    dataset: str = option("shapes", "Name of a data set, folder or file in any usual form, or id on the Hub.")
    dataset_format: str | None = option(None, "Form of its files, such as coco or kaggle; recognised by default.")
    max_images: int | None = option(None, "Use only the first images of each split, to try things out.")
    skip_broken: bool = option(False, "Leave out unreadable images and empty captions, naming each.")
    tokenizer: Literal["words", "bpe"] = option("words", "Words, or pieces (BPE) for languages without spaces.")
    min_count: int = option(1, "How often a word (or a pair of pieces) must occur to enter the vocabulary.")
    vocab_size: int | None = option(None, "Largest vocabulary; by default unlimited for words and 4096 for BPE.")
    max_words: int = option(30, "Training captions are cut after this many words or pieces.")
    mirror: bool = option(False, "Train on mirrored images too. Not where captions tell left from right.")
    augment: bool = option(False, "Crop images a little and vary their colours, where no cells are cached.")
    cache_cells: bool = option(True, "Keep the image cells of a frozen encoder on disk.")
    cache_dir: str | None = option(None, "Folder for these cells (default: beside the Hub's cache).")
    num_workers: int | None = option(
        None, "Processes that read images; by default one per core, at most 8, and none where cells are cached."
    )


@dataclass(frozen=True)
class ModelOptions:
    """The parts of the captioner and their sizes."""

    _argument_group_name: ClassVar[str] = "model"

    encoder_type: str = option("timm", "Name among the encoders; timm wraps any of its models with a grid of cells.")
    encoder_name: str = option("test_resnet", "Architecture of that encoder, for timm one such as resnet101.")
    encoder_kwargs: str = option(
        "{output_stride: 16}", "Further arguments of the encoder, for timm those of timm.create_model, as YAML."
    )
    pretrained: bool = option(False, "Start from timm's weights for the encoder.")
    encoder_weights: str | None = option(None, "Safetensors file with these weights, instead of the Hub.")
    data_config: str = option(
        "{input_size: [3, 96, 96], crop_pct: 1.0}", "What differs from timm's preprocessing for this encoder, as YAML."
    )
    attention_type: str = option("additive", "Name among the attentions.")
    attention_size: int = option(256, "Width of the attention's hidden layer.")
    attention_kwargs: str = option("{}", "Further arguments of the attention, as YAML, such as {num_heads: 4}.")
    decoder_type: str = option("spatial", "Name among the decoders, such as lstm, that of Show, Attend and Tell.")
    decoder_kwargs: str = option("{}", "Further arguments of the decoder, as YAML, such as {num_layers: 2}.")
    embedding_size: int = option(128, "Width of a word embedding.")
    hidden_size: int = option(256, "Width of the decoder's hidden state.")
    tie_word_embeddings: bool = option(False, "Use the word embeddings as weights of the output layer too.")
    word_vectors: str | None = option(None, "Text file of word vectors, such as GloVe's, that embeddings start from.")
    gate: bool = option(False, "Scale the attended context by a learned gate.")
    deep_output: bool = option(False, "Compute logits from state, context and the previous word.")
    memory_dropout: float = option(0.0, "Dropout on image cells.")
    embedding_dropout: float = option(0.0, "Dropout on word embeddings.")
    output_dropout: float = option(0.1, "Dropout before the output layer.")


@dataclass(frozen=True)
class OptimizationOptions:
    """How weights are trained, in all stages."""

    _argument_group_name: ClassVar[str] = "optimization"

    batch_size: int = option(32, "Images per batch on each process; every image brings all its captions.")
    gradient_accumulation_steps: int = option(1, "Batches on each process per optimizer step.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = option("cosine", "Learning-rate schedule.")
    warmup: float = option(0.1, "Fraction of the steps in which the learning rate rises.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = option(5.0, "Largest gradient norm; longer gradients are scaled down.")
    ema_decay: float = option(0.0, "Decay of a running average of the weights to validate and keep; 0 for none.")
    label_smoothing: float = option(0.0, "Probability spread over the vocabulary.")
    doubly_stochastic_weight: float = option(0.0, "Weight of the loss term that asks for attention to every cell.")
    doubly_stochastic_reduction: Literal["mean", "sum"] = option("mean", "Reduction of that term over cells.")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "Precision of training.")
    freeze_encoder: bool = option(False, "Train the decoder only, except in finetune_epochs.")
    encoder_learning_rate: float | None = option(
        None, "Highest learning rate of the encoder; the decoder's by default."
    )
    encoder_from_stage: int = option(0, "First stage of the encoder to train; 0 is the stem.")
    freeze_batch_norm: bool | None = option(
        None, "Keep the encoder's batch norms as they are; by default where it starts from trained weights."
    )
    gradient_checkpointing: bool = option(False, "Recompute the encoder's activations: less memory, a third slower.")


@dataclass(frozen=True)
class StageOptions:
    """The stages of training: likelihood of the captions, fine-tuning of the encoder, rewards."""

    _argument_group_name: ClassVar[str] = "stages"

    epochs: int = option(4, "Passes over the training images.")
    learning_rate: float = option(2e-3, "Highest learning rate.")
    scheduled_sampling: float = option(
        0.0, "Probability, by the end, of reading a word that the model sampled instead of the caption's."
    )
    scheduled_sampling_course: Literal["linear", "exponential", "inverse_sigmoid", "constant"] = option(
        "linear", "How that probability rises from 0."
    )
    select_by: Literal["cider", "bleu_4"] = option("bleu_4", "Validation score by which the best epoch is kept.")
    patience: int = option(5, "End a stage after this many epochs without a better score.")
    finetune_epochs: int = option(0, "Passes that follow, training the encoder too.")
    finetune_learning_rate: float = option(1e-4, "Highest learning rate of the decoder in these.")
    reward_epochs: int = option(0, "Passes that follow, in which sampled captions are rewarded by their CIDEr-D.")
    reward_learning_rate: float = option(1e-4, "Highest learning rate in these.")
    reward_samples: int = option(5, "Captions sampled per image.")
    reward_baseline: Literal["others", "greedy"] = option(
        "others", "What rewards are compared with: the mean of the image's other samples, or its greedy caption."
    )
    reward_top_k: int = option(10, "Top-k for sampling; 0 disables it.")
    reward_bleu_weight: float = option(0.0, "Weight of BLEU-4 beside CIDEr-D in the reward.")
    reward_likelihood_weight: float = option(0.0, "Weight of the likelihood of the reference captions beside rewards.")


@dataclass(frozen=True)
class DecodingOptions:
    """How captions are generated for validation, for the final scores, and by the saved model."""

    _argument_group_name: ClassVar[str] = "decoding"

    num_beams: int = option(5, "Beams when validating each epoch.")
    final_num_beams: int = option(5, "Beams for the scores of the best model, at the end.")
    max_length: int = option(31, "Longest caption, <start> and <end> included.")
    min_length: int = option(0, "Shortest caption, <start> and <end> included.")
    length_penalty: float = option(1.0, "Power of the length by which beam search divides a caption's score.")
    no_repeat_ngram_size: int = option(0, "Never repeat this many words in a row; 0 allows it.")
    suppress_bad_endings: bool = option(False, "Never end a caption in an English word such as 'a' or 'of'.")


@dataclass(frozen=True)
class RunOptions:
    """Where results go, and how the program runs."""

    _argument_group_name: ClassVar[str] = "run"

    output_dir: str = option("outputs/shapes", "Folder for the best model, the log and the pictures.")
    seed: int = option(0, "Seed of weights, shuffling and dropout.")
    resume: bool = option(False, "Go on exactly from the newest checkpoint in the output folder.")
    checkpoint_minutes: float = option(10.0, "Minutes between checkpoints within an epoch.")
    keep_checkpoints: int = option(2, "How many of the newest checkpoints are kept.")
    tracking: Literal["auto", "tensorboard", "wandb", "none"] = option(
        "auto", "Where scores, captions and pictures of each epoch go; auto is TensorBoard where it is installed."
    )
    num_threads: int | None = option(None, "Threads per process on a CPU (default: all cores, shared out).")
    push_to_hub: str | None = option(None, "Publish the best model at the end under this id on the Hub.")
    license: str | None = option(None, "Licence of its weights, for push_to_hub: apache-2.0, cc-by-nc-4.0, ...")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run. The defaults train on drawn shapes from scratch."""

    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    optimization: OptimizationOptions = OptimizationOptions()
    stages: StageOptions = StageOptions()
    decoding: DecodingOptions = DecodingOptions()
    run: RunOptions = RunOptions()

    @classmethod
    def from_fields(cls, **values: Any) -> Recipe:
        """Build a recipe from flat fields, such as `Recipe.from_fields(dataset="flickr8k", epochs=5)`.

        Raises:
            TypeError: an unknown field.
        """
        groups = {}
        for name, group in GROUPS.items():
            groups[name] = group(
                **{field.name: values.pop(field.name) for field in fields(group) if field.name in values}
            )
        if values:
            raise TypeError(f"Unknown fields of a recipe: {', '.join(values)}. {_known_fields()}")
        return cls(**groups)

    def as_fields(self) -> dict[str, Any]:
        """Return all fields, flat."""
        return {name: value for group in GROUPS for name, value in asdict(getattr(self, group)).items()}


GROUPS: dict[str, Any] = {
    "data": DataOptions,
    "model": ModelOptions,
    "optimization": OptimizationOptions,
    "stages": StageOptions,
    "decoding": DecodingOptions,
    "run": RunOptions,
}

# Fields that do not change what is trained, and so may differ when a run is resumed.
MAY_CHANGE = (
    *("output_dir", "encoder_weights", "final_num_beams", "resume", "checkpoint_minutes", "keep_checkpoints"),
    *("push_to_hub", "license", "tracking", "gradient_checkpointing", "cache_dir", "num_workers", "num_threads"),
)


class RecipeParser(CommandParser, HfArgumentParser):
    """The parser of `transformers` for dataclasses, with each option spelled once in `--help`."""

    def add_argument(self, *names: Any, **kwargs: Any) -> Any:
        """Add an option without its second spelling, which `CommandParser` understands anyway."""
        return (
            super().add_argument(*names[:1], **kwargs)
            if len(names) == 2 and names[0].startswith("--")
            else super().add_argument(*names, **kwargs)
        )


def parse_recipe(argv: Sequence[str], *, prog: str | None = None, description: str = "") -> Recipe:
    """Read a recipe from the arguments `[RECIPE] [--field value …]`; what is typed overrides the file.

    Args:
        argv: command-line arguments without the program's name; RECIPE is a name among `recipes` or a YAML file.
        prog: name of the program, for `--help`.
        description: what the program does, for `--help`.

    Raises:
        ValueError: an unknown argument, or a file that is not a mapping of known fields.
        FileNotFoundError: no such recipe.
    """
    parser = HfArgumentParser(
        list(GROUPS.values()), prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.usage = "%(prog)s [RECIPE] [--field value ...]"
    argv = list(argv)
    typed_over: list[str] = []
    if argv and not argv[0].startswith("-"):
        typed_over = _as_arguments(read_recipe(argv.pop(0)))
    # argparse takes the last of equal arguments, so what is typed wins.
    *groups, unknown = parser.parse_args_into_dataclasses(typed_over + argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"Unknown arguments: {' '.join(unknown)}. {_known_fields()} See --help.")
    return Recipe(*groups)


def recipes() -> dict[str, str]:
    """Return the names of the package's recipes, each with its first line of comment."""
    files = sorted(RECIPE_FOLDER.glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files}


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Read the fields of a recipe by its name or from a YAML file.

    Raises:
        ValueError: the file is not a mapping of known fields.
        FileNotFoundError: no such recipe.
    """
    path = RECIPE_FOLDER / f"{name_or_path}.yaml" if name_or_path in recipes() else Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(f"No recipe at {name_or_path!r}. Give a YAML file, or one of {', '.join(recipes())}.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as e:
        raise ValueError(f"The recipe {str(path)!r} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {str(path)!r} holds a {type(recipe).__name__}, not fields with values.")
    if unknown := recipe.keys() - Recipe().as_fields().keys():
        names = ", ".join(map(str, sorted(unknown)))
        raise ValueError(f"The recipe {str(path)!r} has unknown fields: {names}. {_known_fields()}")
    return recipe


def _as_arguments(recipe: Mapping[str, Any]) -> list[str]:
    arguments = []
    for name, value in recipe.items():
        if value is not None:
            text = yaml.safe_dump(value, default_flow_style=True).strip() if isinstance(value, dict) else str(value)
            arguments += [f"--{name}", text]
    return arguments


def _known_fields() -> str:
    return f"Known: {', '.join(Recipe().as_fields())}."
