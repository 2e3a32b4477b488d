"""Recipes: all settings of a training, from a YAML file and the command line.

Fields are grouped, here and in `--help`. In YAML files and on the command line their names are flat.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import yaml

from ..cli import CommandParser
from ..files import parse_fields

logger = logging.getLogger(__name__)

MAX_BYTES = 2**20  # of a recipe
RECIPE_FOLDER = Path(__file__).with_name("recipes")
CONTINUE = "continue"  # the recipe of a training that goes on from a captioner


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    is_yaml: bool = False,
    flag: str | None = None,
) -> Any:
    """Declare a field of a recipe.

    Args:
        default: Default of the field.
        help: Text in `--help`.
        low: Lowest value of a number.
        high: Highest value of a number.
        is_yaml: The field is YAML text with names and values.
        flag: Name of the option on the command line, where it may be a keyword of Python.
    """
    metadata = {"help": help, "low": low, "high": high, "is_yaml": is_yaml, "flag": flag}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """Base of the groups of fields, whose types and ranges are checked whoever fills them in."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            if problem := _problem(getattr(self, option.name), hints[option.name], option.metadata):
                raise ValueError(f"{option.name} is {getattr(self, option.name)!r}; it must be {problem}.")


def _problem(value: Any, hint: Any, metadata: Mapping[str, Any]) -> str | None:
    """Return what a field must be, for the end of a sentence, or None if its value is just that."""
    if value is None and type(None) in get_args(hint):
        return None
    kind, choices = _kind(hint)
    if choices:
        return None if value in choices else f"one of {', '.join(choices)}"
    if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]
    if kind in (int, float):
        low, high = (metadata[name] for name in ("low", "high"))
        is_low, is_high = low is not None and value < low, high is not None and value > high
        is_number = kind is int or math.isfinite(cast(float, value))
        limits = " and ".join(
            f"{word} {limit}" for word, limit in (("at least", low), ("at most", high)) if limit is not None
        )
        return None if is_number and not is_low and not is_high else limits or "a finite number"
    if value == "":
        return "given, not empty"
    if metadata["is_yaml"]:
        try:
            parse_fields(cast(str, value))
        except ValueError as e:
            return f"names with values in YAML, such as {{a: 1}}: {e}"
    return None


def _kind(hint: Any) -> tuple[type, tuple[str, ...]]:
    """Return the type of a field, without None, and the values that it is limited to, if it is."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    return (str, get_args(hint)) if get_origin(hint) is Literal else (hint, ())


@dataclass(frozen=True)
class DataOptions(Options):
    """Options of the images and captions to train on, and of how they are read."""

    dataset: str = option("shapes", "Name of a data set, folder or file in any usual form, or id on the Hub.")
    dataset_format: str | None = option(None, "Form of its files, such as coco or kaggle; recognised by default.")
    max_images: int | None = option(None, "Use only the first images of each split, to try things out.", low=1)
    skip_broken: bool = option(False, "Leave out unreadable images and empty captions, naming each.")
    allow_urls: bool = option(False, "Download images that the data set names by URLs.")
    allow_outside: bool = option(False, "Follow paths and links out of the data set's folder.")
    tokenizer: Literal["words", "bpe"] = option("words", "Words, or pieces (BPE) for languages without spaces.")
    min_count: int = option(1, "How often a word (or a pair of pieces) must occur to enter the vocabulary.", low=1)
    vocab_size: int | None = option(None, "Largest vocabulary; by default unlimited for words and 4096 for BPE.", low=1)
    max_words: int = option(30, "Training captions are cut after this many words or pieces.", low=1)
    mirror: bool = option(False, "Train on mirrored images too. Not where captions tell left from right.")
    augment: bool = option(False, "Crop images a little and vary their colours, where no cells are cached.")
    cache_cells: bool = option(True, "Keep the image cells of a frozen encoder on disk.")
    cache_dir: str | None = option(None, "Folder for these cells (default: beside the Hub's cache).")
    num_workers: int | None = option(None, "Processes that read images; by default one per core, at most 8.", low=0)


@dataclass(frozen=True)
class ModelOptions(Options):
    """Options of the captioner's architecture: its encoder, attention and decoder, and their sizes."""

    from_captioner: str | None = option(
        None, "Captioner to go on from: photographs, a folder, or an id on the Hub.", flag="from"
    )
    encoder_type: str = option("timm", "Name among the encoders; timm wraps any of its models with a grid of cells.")
    encoder_name: str = option("test_resnet", "Architecture of that encoder, for timm one such as resnet101.")
    encoder_kwargs: str = option("{output_stride: 16}", "Further arguments of the encoder, as YAML.", is_yaml=True)
    pretrained: bool = option(False, "Start from timm's weights for the encoder.")
    encoder_weights: str | None = option(None, "Safetensors file with these weights, instead of the Hub.")
    data_config: str = option(
        "{input_size: [3, 96, 96], crop_pct: 1.0}", "Changes to timm's preprocessing, as YAML.", is_yaml=True
    )
    attention_type: str = option("additive", "Name among the attentions.")
    attention_size: int = option(256, "Width of the attention's hidden layer.", low=1)
    attention_kwargs: str = option(
        "{}", "Further arguments of the attention, as YAML, such as {num_heads: 4}.", is_yaml=True
    )
    decoder_type: str = option("spatial", "Name among the decoders, such as lstm, that of Show, Attend and Tell.")
    decoder_kwargs: str = option(
        "{}", "Further arguments of the decoder, as YAML, such as {num_layers: 2}.", is_yaml=True
    )
    embedding_size: int = option(128, "Width of a word embedding.", low=1)
    hidden_size: int = option(256, "Width of the decoder's hidden state.", low=1)
    projection_size: int | None = option(
        None, "Width to which image cells are projected; by default they keep the encoder's.", low=1
    )
    tie_word_embeddings: bool = option(False, "Use the word embeddings as weights of the output layer too.")
    word_vectors: str | None = option(None, "Text file of word vectors, such as GloVe's, that embeddings start from.")
    gate: bool = option(False, "Scale the attended context by a learned gate.")
    deep_output: bool = option(False, "Compute logits from state, context and the previous word.")
    memory_dropout: float = option(0.0, "Dropout on image cells.", low=0, high=1)
    embedding_dropout: float = option(0.0, "Dropout on word embeddings.", low=0, high=1)
    output_dropout: float = option(0.1, "Dropout before the output layer.", low=0, high=1)


@dataclass(frozen=True)
class OptimizationOptions(Options):
    """Options of the optimization, the same in all stages."""

    batch_size: int = option(32, "Images per batch on each process; every image brings all its captions.", low=1)
    gradient_accumulation_steps: int = option(1, "Batches on each process per optimizer step.", low=1)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = option("cosine", "Learning-rate schedule.")
    warmup: float = option(0.1, "Fraction of the steps in which the learning rate rises.", low=0, high=1)
    weight_decay: float = option(0.0, "Weight decay of AdamW.", low=0)
    max_grad_norm: float = option(5.0, "Largest gradient norm; longer gradients are scaled down.", low=1e-6)
    ema_decay: float = option(0.0, "Decay of a running average of the weights to validate and keep; 0 for none.")
    label_smoothing: float = option(0.0, "Probability spread over the vocabulary.", low=0, high=1)
    doubly_stochastic_weight: float = option(
        0.0, "Weight of the loss term that asks for attention to every cell.", low=0
    )
    doubly_stochastic_reduction: Literal["mean", "sum"] = option("mean", "Reduction of that term over cells.")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "Precision of training.")
    freeze_encoder: bool = option(False, "Train the decoder only, except in finetune_epochs.")
    encoder_learning_rate: float | None = option(
        None, "Highest learning rate of the encoder; by default the decoder's.", low=0
    )
    encoder_from_stage: int = option(0, "First stage of the encoder to train; 0 is the stem.", low=0)
    freeze_batch_norm: bool | None = option(None, "Keep the encoder's batch norms; by default if it is pretrained.")
    gradient_checkpointing: bool = option(False, "Recompute the encoder's activations: less memory, a third slower.")


@dataclass(frozen=True)
class StageOptions(Options):
    """Options of the stages of training: likelihood of the captions, fine-tuning of the encoder, rewards."""

    epochs: int = option(4, "Passes over the training images.", low=1)
    learning_rate: float = option(2e-3, "Highest learning rate.", low=0)
    scheduled_sampling: float = option(
        0.0, "Highest probability of reading a sampled word instead of the caption's.", low=0, high=1
    )
    scheduled_sampling_course: Literal["linear", "exponential", "inverse_sigmoid", "constant"] = option(
        "linear", "How that probability rises from 0."
    )
    select_by: Literal["cider", "bleu_4"] = option("bleu_4", "Validation score by which the best epoch is kept.")
    patience: int = option(5, "End a stage after this many epochs without a better score.", low=1)
    finetune_epochs: int = option(0, "Passes that follow, training the encoder too.", low=0)
    finetune_learning_rate: float = option(1e-4, "Highest learning rate of the decoder in these.", low=0)
    reward_epochs: int = option(
        0, "Passes that follow, in which sampled captions are rewarded by their CIDEr-D.", low=0
    )
    reward_learning_rate: float = option(1e-4, "Highest learning rate in these.", low=0)
    reward_samples: int = option(5, "Captions sampled per image.", low=1)
    reward_baseline: Literal["others", "greedy"] = option(
        "others", "What rewards are compared with: the mean of the image's other samples, or its greedy caption."
    )
    reward_top_k: int = option(10, "Top-k for sampling; 0 disables it.", low=0)
    reward_bleu_weight: float = option(0.0, "Weight of BLEU-4 beside CIDEr-D in the reward.", low=0)
    reward_likelihood_weight: float = option(
        0.0, "Weight of the likelihood of the reference captions beside rewards.", low=0
    )


@dataclass(frozen=True)
class DecodingOptions(Options):
    """Options of decoding; all but the numbers of beams are saved with the model."""

    num_beams: int = option(5, "Beams when validating each epoch.", low=1)
    final_num_beams: int = option(5, "Beams for the scores of the best model, at the end.", low=1)
    max_length: int = option(31, "Longest caption, <start> and <end> included.", low=2, high=1024)
    min_length: int = option(0, "Shortest caption, <start> and <end> included.", low=0, high=1024)
    length_penalty: float = option(
        1.0, "Power of the length by which beam search divides a caption's score.", low=-100, high=100
    )
    no_repeat_ngram_size: int = option(0, "Never repeat this many words in a row; 0 allows it.", low=0, high=1024)
    suppress_bad_endings: bool = option(False, "Never end a caption in an English word such as 'a' or 'of'.")


@dataclass(frozen=True)
class RunOptions(Options):
    """Options of where results are written and how the program runs."""

    output_dir: str = option("outputs/shapes", "Folder for the best model, the log and the pictures.")
    seed: int = option(0, "Seed of weights, shuffling and dropout.", low=0, high=2**31)
    resume: bool = option(False, "Go on exactly from the newest checkpoint in the output folder.")
    checkpoint_minutes: float = option(10.0, "Minutes between checkpoints within an epoch.", low=0)
    keep_checkpoints: int = option(2, "How many of the newest checkpoints are kept.")
    tracking: Literal["auto", "tensorboard", "wandb", "none"] = option(
        "auto", "Where scores, captions and pictures of each epoch go; auto is TensorBoard where it is installed."
    )
    num_threads: int | None = option(None, "Threads per process on a CPU (default: all cores, shared out).", low=1)
    push_to_hub: str | None = option(None, "Publish the best model at the end under this id on the Hub.")
    license: str | None = option(None, "Licence of its weights, for push_to_hub: apache-2.0, cc-by-nc-4.0, ...")


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run. The defaults train on drawn shapes from scratch."""

    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    optimization: OptimizationOptions = OptimizationOptions()
    stages: StageOptions = StageOptions()
    decoding: DecodingOptions = DecodingOptions()
    run: RunOptions = RunOptions()
    given: frozenset[str] = field(
        default=frozenset(), compare=False, repr=False
    )  # fields that were given, not defaults

    @classmethod
    def from_fields(cls, **values: Any) -> Recipe:
        """Build a recipe from flat fields, such as `Recipe.from_fields(dataset="flickr8k", epochs=5)`.

        Raises:
            TypeError: A field is unknown.
        """
        groups, given = {}, frozenset(values)
        for name, group in GROUPS.items():
            groups[name] = group(
                **{field.name: values.pop(field.name) for field in fields(group) if field.name in values}
            )
        if values:
            raise TypeError(f"A recipe has no field {_with_suggestions(values, cls().as_fields())}.")
        return cls(**groups, given=given)

    def as_fields(self) -> dict[str, Any]:
        """Return all fields with their values, flat."""
        return {name: value for group in GROUPS for name, value in asdict(getattr(self, group)).items()}

    def fixed_fields(self) -> dict[str, Any]:
        """Return the fields that must stay the same when a run is resumed."""
        return {name: value for name, value in self.as_fields().items() if name not in MAY_CHANGE}


GROUPS: dict[str, Any] = {
    "data": DataOptions,
    "model": ModelOptions,
    "optimization": OptimizationOptions,
    "stages": StageOptions,
    "decoding": DecodingOptions,
    "run": RunOptions,
}

# Fields that do not affect the trained weights, and so may change when a run is resumed.
MAY_CHANGE = (
    *(
        "output_dir",
        "from_captioner",
        "encoder_weights",
        "final_num_beams",
        "resume",
        "checkpoint_minutes",
        "keep_checkpoints",
    ),
    *("push_to_hub", "license", "tracking", "gradient_checkpointing", "cache_dir", "num_workers", "num_threads"),
    *("allow_urls", "allow_outside"),  # what was read by them is compared
)


def parse_recipe(argv: Sequence[str], *, prog: str | None = None, description: str | None = None) -> Recipe:
    """Read a recipe from the arguments `[RECIPE] [--field value ...]`; a typed option overrides the recipe.

    Arguments that argparse refuses, such as a wrong type, end the program with exit code 2.

    Args:
        argv: Command-line arguments without the program's name. RECIPE is a name in `recipes()` or a YAML file.
        prog: Name of the program, for `--help`.
        description: What the program does, for `--help`.

    Raises:
        ValueError: An option is unknown, or the file is not a mapping of known fields.
        FileNotFoundError: There is no such recipe.
    """
    parser = _build_parser(prog, description)
    typed, unknown = parser.parse_known_args(argv)
    if options := [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]:
        known = [f"--{name}" for name in Recipe().as_fields()]
        raise ValueError(f"There is no option {_with_suggestions(options, known)}. See --help.")
    if unknown:
        raise ValueError(f"Unknown arguments: {' '.join(unknown)}. Give one recipe, then options. See --help.")
    values = vars(typed)
    name = values.pop("recipe")
    if name is None and values.get("from_captioner"):
        name = CONTINUE
    if name is not None:
        recipe = read_recipe(name)
        try:
            read = vars(_build_parser(None, None, _RecipeParser).parse_args(_as_arguments(recipe)))
            Recipe.from_fields(**{field: value for field, value in read.items() if field != "recipe"})
        except ValueError as e:
            raise ValueError(f"The recipe {name!r} has a wrong value: {e}") from e
        values = read | values
        del values["recipe"]
    if values.get("from_captioner") and "dataset" not in values:
        raise ValueError("Name the images and captions to train on: --dataset FOLDER.")
    return Recipe.from_fields(**values)


def _build_parser(
    prog: str | None, description: str | None, kind: type[CommandParser] = CommandParser
) -> CommandParser:
    """Build the parser of a command line or of a recipe; it returns only the fields that are given."""
    parser = kind(
        prog=prog,
        description=description,
        usage="%(prog)s [RECIPE] [--field value ...]",
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36),
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", default=None, help="Name of a recipe, or a YAML file.")
    parser.add_argument("--list", action=_ListRecipes, nargs=0, help="List the recipes of the package, and exit.")
    for title, group in GROUPS.items():
        section, hints = parser.add_argument_group(title, group.__doc__), get_type_hints(group)
        for option in fields(group):
            names = [f"--{name}" for name in (option.metadata["flag"], option.name) if name]
            section.add_argument(*names, dest=option.name, **_argument_settings(option, hints[option.name]))
            if option.default is True:
                section.add_argument(
                    f"--no_{option.name}", dest=option.name, action="store_false", help=argparse.SUPPRESS
                )
    return parser


class _ListRecipes(argparse.Action):
    """The option `--list`, which prints the recipes of the package and ends the program, as `--help` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        width = max(map(len, recipes()))
        for name, summary in recipes().items():
            print(f"{name:<{width}}  {summary}")
        parser.exit()


def _argument_settings(option: Any, hint: Any) -> dict[str, Any]:
    """Return argparse's settings for a field of type str, int, float, bool, one of these or None, or Literal."""
    kind, choices = _kind(hint)
    text = option.metadata["help"] + (f" One of {', '.join(choices)}." if choices else "")
    if option.default not in (None, False):
        text = f"{text} [{option.default}]"
    settings: dict[str, Any] = {"help": text.replace("%", "%%")}
    if choices:
        return {"choices": choices, "metavar": "NAME", **settings}
    if kind is bool:
        return {"type": _parse_bool, "nargs": "?", "const": True, "metavar": "BOOL", **settings}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind], **settings}


def _parse_bool(text: str) -> bool:
    """Parse the value of a switch: true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def recipes() -> dict[str, str]:
    """Return the names of the package's recipes, with the first line of comment in each."""
    files = sorted(RECIPE_FOLDER.glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files}


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Read the fields of a recipe by its name or from a YAML file.

    Raises:
        ValueError: The file is not a mapping of known fields.
        FileNotFoundError: There is no such recipe.
    """
    is_ours = name_or_path in recipes()
    path = RECIPE_FOLDER / f"{name_or_path}.yaml" if is_ours else Path(name_or_path)
    if is_ours and Path(name_or_path).is_file():
        logger.warning(f"{name_or_path} is the package's recipe; for the file of that name, give ./{name_or_path}.")
    if not path.is_file():
        raise FileNotFoundError(f"No recipe at {name_or_path!r}. Give a YAML file, or one of {', '.join(recipes())}.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{str(path)!r} is no recipe: it has more than {MAX_BYTES / 2**20:.0f} MiB.")
    try:
        recipe = parse_fields(path.read_text(encoding="utf-8-sig"))
    except ValueError as e:
        raise ValueError(f"The recipe {str(path)!r} is not YAML with fields and values: {e}") from e
    known = Recipe().as_fields()
    if unknown := [str(name) for name in recipe if name not in known]:
        raise ValueError(f"The recipe {str(path)!r} has no known field {_with_suggestions(unknown, known)}.")
    return recipe


class _RecipeParser(CommandParser):
    """A parser of the values in a recipe, whose errors are ValueErrors."""

    def error(self, message: str) -> Any:
        """Raise a ValueError with the message."""
        raise ValueError(message.removeprefix("argument --"))


def _as_arguments(recipe: Mapping[str, Any]) -> list[str]:
    """Return the fields of a recipe as command-line arguments; mappings become YAML text."""
    arguments = []
    for name, value in recipe.items():
        if value is not None:
            if not isinstance(value, dict | str | int | float):
                raise ValueError(f"{name}: {value!r} is a {type(value).__name__}, not a number or a text")
            text = yaml.safe_dump(value, default_flow_style=True).strip() if isinstance(value, dict) else str(value)
            arguments.append(f"--{name}={text}")
    return arguments


def _with_suggestions(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Return unknown names for a message, each with the known name that is most like it, if one is."""
    known = list(known)
    suggestions = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
    return ", ".join(f"{name} (did you mean {close[0]}?)" if close else name for name, close in suggestions.items())
