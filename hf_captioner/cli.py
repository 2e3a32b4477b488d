"""What the scripts in examples/ share: arguments, recipes, models from folders, errors in one line."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from accelerate import Accelerator
from transformers import HfArgumentParser

from .errors import first_line
from .interruption import Interrupted
from .loading import num_cores
from .modeling_captioner import CaptionerModel
from .processing_captioner import CaptionerProcessor
from .steps import steps_of

Arguments = TypeVar("Arguments")
Precision = Literal["no", "bf16", "fp16"]


def parse_recipe(kind: type[Arguments], argv: Sequence[str], description: str) -> Arguments:
    """Arguments from `[RECIPE.yaml] [--field value …]`; the command line overrides the recipe.

    Args:
        kind: a dataclass, parsed by the conventions of `HfArgumentParser`.
        argv: command-line arguments without the program's name.
        description: for `--help`.

    Raises:
        ValueError: a recipe that is not a mapping, or has an unknown field.
        FileNotFoundError: no such recipe.
    """
    parser = HfArgumentParser(kind, description=description)  # type: ignore[arg-type]
    parser.usage = "%(prog)s [RECIPE.yaml] [--field value ...]"
    argv = list(argv)
    recipe: list[str] = []
    if argv and not argv[0].startswith("-"):
        recipe = _recipe_arguments(kind, Path(argv.pop(0)))
    # argparse takes the last of equal arguments, so what is typed wins.
    parsed, unknown = parser.parse_args_into_dataclasses(recipe + argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"Unknown arguments: {' '.join(unknown)}. {_known_fields(kind)} See --help.")
    return parsed


def _recipe_arguments(kind: type, path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"No recipe at {str(path)!r}. Give a YAML file, of examples/recipes/ or your own.")
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as e:
        raise ValueError(f"The recipe {str(path)!r} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {str(path)!r} holds a {type(recipe).__name__}, not fields with values.")
    unknown = recipe.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(
            f"The recipe {str(path)!r} has unknown fields: {', '.join(map(str, sorted(unknown)))}. "
            + _known_fields(kind)
        )
    arguments = []
    for name, value in recipe.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(_as_argument(v) for v in values)]
    return arguments


def _as_argument(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).strip() if isinstance(value, dict) else str(value)


def _known_fields(kind: type) -> str:
    return f"Known: {', '.join(field.name for field in fields(kind))}."


def add_hub_arguments(parser: ArgumentParser) -> None:
    """Where on the Hub, or in its cache, a captioner is read."""
    group = parser.add_argument_group("a captioner on the Hub")
    group.add_argument("--revision", help="its branch, tag or commit (default: main)")
    group.add_argument("--subfolder", help="where it lies in its repository, or in its folder")
    group.add_argument("--token", help="of a user who may read it (default: HF_TOKEN, or the one logged in)")
    group.add_argument("--cache_dir", "--cache-dir", help="keep downloads there (default: the Hub's own cache)")


def hub_arguments(arguments: Namespace) -> dict[str, str]:
    """Those of `add_hub_arguments` that were given, for `from_pretrained`."""
    values = {name: getattr(arguments, name) for name in ("revision", "subfolder", "token", "cache_dir")}
    return {name: value for name, value in values.items() if value is not None}


def load_captioner(folder: str | Path, **hub: str) -> tuple[CaptionerModel, CaptionerProcessor]:
    """A saved captioner and its processor, from a folder or the Hub.

    Args:
        folder: where it was saved, or its id.
        hub: what `from_pretrained` takes of `revision`, `subfolder`, `token` and `cache_dir`.

    Raises:
        ValueError: there is a model, but not a captioner, or none can be loaded.
        FileNotFoundError: a folder without a model.
    """
    path = Path(folder)
    if path.exists() and not (path / hub.get("subfolder", "") / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(path / hub.get('subfolder', ''))!r} holds no model: it has no config.json. Give the output folder "
            "of a training."
        )
    try:
        model = CaptionerModel.from_pretrained(folder, **hub)
        processor = CaptionerProcessor.from_pretrained(folder, **hub)
    except (OSError, ValueError) as e:
        raise ValueError(f"No captioner can be loaded from {str(folder)!r}: {first_line(e)}") from e
    return model.eval(), processor  # type: ignore[return-value]


def precision_here(mixed_precision: Precision) -> Precision:
    """`"no"` in the place of `"bf16"` on a processor that would take many times as long for it."""
    has_instructions = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    is_emulated = not (has_instructions or torch.accelerator.is_available())
    return "no" if mixed_precision == "bf16" and is_emulated else mixed_precision


def build_accelerator(
    mixed_precision: Precision | None = None,
    num_threads: int | None = None,
    gradient_accumulation_steps: int = 1,
    **kwargs: Any,
) -> Accelerator:
    """Accelerate's entry point, set up for what this machine has.

    Args:
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`; by default what `accelerate config` says.
        num_threads: threads of each process on a CPU, by default its share of the cores: `accelerate launch` leaves
            one thread to each process, which leaves most of a machine idle.
        gradient_accumulation_steps: batches that make a step, unless `accelerate launch` is told of others.
        kwargs: further arguments of `Accelerator`.

    Raises:
        ValueError: Accelerate is configured for what a captioner can't be trained with, such as Megatron-LM.
    """
    # Else FSDP has transformers read saved weights on one process only. All of them need the whole.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(
        # Several processes without an accelerator only find each other if Accelerate is told of the CPU.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        **kwargs,
    )
    steps_of(accelerator).configure(accelerator)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(num_threads or max(1, num_cores() // accelerator.num_processes))
    return accelerator


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Run a script's `main(argv)`.

    What the user can mend ends in one line on standard error and exit code 2, an interruption in one line and the exit
    code that shells give to its signal.
    """
    try:
        main(sys.argv[1:])
    except Interrupted as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all of a run's processes stop alike
            print(e, file=sys.stderr)
        sys.exit(128 + e.signal_number)
    except (ValueError, OSError, FloatingPointError) as e:
        # Python puts a number before the text of its OSErrors, and their file behind it.
        text = str(e) if getattr(e, "filename", None) else getattr(e, "strerror", None) or str(e)
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
