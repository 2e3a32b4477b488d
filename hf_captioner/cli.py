"""Helpers of all commands: options, loading of a captioner, and errors that end in one line."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import first_line, is_out_of_memory, shortened_message
from .interruption import Interrupted
from .pretrained import captioner_path

if TYPE_CHECKING:
    from .model.modeling_captioner import CaptionerModel
    from .model.processing_captioner import CaptionerProcessor

# Exit codes. An interrupted command ends with 128 plus the number of the signal, as in shells.
EXIT_PROBLEM = 1  # the command ran and found something wrong
EXIT_REFUSED = 2  # wrong usage, or an error that the user can fix
EXIT_UNEXPECTED = 70  # a mistake in this package or in a library; sysexits.h has this number for it

SHOW_TRACEBACK = "HF_CAPTIONER_TRACEBACK"  # environment variable; with any value, errors are raised as they are
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
SECONDS_OF_OTHERS = 10  # that the main process has to report an error before another process of the run does


class CommandParser(argparse.ArgumentParser):
    """A parser whose options may be written with `-` or `_` between words, and never abbreviated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse arguments in which options may be written `--a-b` or `--a_b`; they are declared as `--a_b`."""
        return super().parse_known_args(underscored(sys.argv[1:] if args is None else args), namespace)

    def error(self, message: str) -> Any:
        """End the program with the message in one line, which also says where to find help."""
        self.exit(EXIT_REFUSED, f"error: {message}\nSee: {self.prog} --help\n")


def underscored(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments in which long options have `_` between words, such as `--num_beams=3`."""
    spelled = []
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            argument = f"--{name.replace('-', '_')}{equals}{value}"
        spelled.append(argument)
    return spelled


def positive_int(text: str) -> int:
    """Parse an option's value as a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the version of a captioner on the Hub to load."""
    group = parser.add_argument_group("captioners on the Hub")
    group.add_argument("--revision", help="branch, tag or commit (default: main)")
    group.add_argument("--subfolder", help="folder within the repository, or within a local folder")
    group.add_argument("--token", help="access token (default: HF_TOKEN, or the user who is logged in)")
    group.add_argument("--cache_dir", help="folder for downloads (default: the Hub's own cache)")


def hub_arguments(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the options of `add_hub_arguments` that were given, as arguments of `from_pretrained`."""
    values = {name: getattr(arguments, name) for name in ("revision", "subfolder", "token", "cache_dir")}
    return {name: value for name, value in values.items() if value is not None}


def add_access_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options that say what a data set may have opened besides its own folder."""
    parser.add_argument("--allow_urls", action="store_true", help="download images that the data set names by URLs")
    parser.add_argument("--allow_outside", action="store_true", help="follow paths and links out of the data set's "
        "folder")  # fmt: skip


def load_captioner(folder: str | Path, **hub: str) -> tuple[CaptionerModel, CaptionerProcessor]:
    """Load a saved captioner and its processor from a folder or the Hub.

    Args:
        folder: Folder in which it was saved, its id on the Hub, or `photographs`, the captioner of this package.
        hub: `revision`, `subfolder`, `token` and `cache_dir`, as `from_pretrained` takes them.

    Raises:
        ValueError: There is a model, but not a captioner, or none can be loaded.
        FileNotFoundError: The folder holds no model.
    """
    path = Path(folder := captioner_path(folder))
    if not path.exists() and not HUB_ID.fullmatch(folder):
        raise FileNotFoundError(f"There is no captioner {folder!r}: no such folder, and no id on the Hub (owner/name).")
    if path.exists() and not (path / hub.get("subfolder", "") / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(path / hub.get('subfolder', ''))!r} holds no model: it has no config.json. Give the output folder "
            "of a training."
        )
    from .model.modeling_captioner import CaptionerModel
    from .model.processing_captioner import CaptionerProcessor

    try:
        model = CaptionerModel.from_pretrained(folder, **hub)
        processor = CaptionerProcessor.from_pretrained(folder, **hub)
        _check_fit(model, processor)
    except (OSError, ValueError) as e:
        raise ValueError(f"No captioner can be loaded from {folder!r}: {first_line(e)}") from e
    return model.eval(), processor


def _check_fit(model: CaptionerModel, processor: CaptionerProcessor) -> None:
    """Raise a ValueError if a model can't read its processor's images, or has fewer words."""
    from .model.image_processing_captioner import CaptionerImageProcessor

    if not isinstance(processor.image_processor, CaptionerImageProcessor):
        raise ValueError(f"its image processor is a {type(processor.image_processor).__name__}, not a captioner's.")
    if len(processor.tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"its tokenizer has {len(processor.tokenizer)} words and its model {model.config.vocab_size}: they belong "
            "to different captioners."
        )
    size = processor.image_processor.size["height"], processor.image_processor.size["width"]
    if size != tuple(model.data_config["input_size"][1:]):  # else any encoder takes it
        model.encoder.part.grid_size(*size)


def show_messages() -> None:
    """Show the package's log messages on standard error; where it is used as a library, its user configures logging."""
    logger = logging.getLogger(__package__)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command and return its exit code; errors end in one line on standard error.

    Args:
        main: Function of the command, which returns an exit code, or None for success.
        argv: Arguments of the command.
    """
    show_messages()
    if not sys.stderr.isatty():  # Progress bars are for terminals.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if "transformers" in sys.modules:  # These variables are read at import, which is over in a script.
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
    try:
        return main(argv) or 0
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        return 0
    except KeyboardInterrupt as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line for all processes of a run
            print(str(e) or "Stopped by SIGINT.", file=sys.stderr)
        return 128 + (e.signal_number if isinstance(e, Interrupted) else 2)
    except Exception as e:
        if os.environ.get(SHOW_TRACEBACK):
            raise
        code, line = describe_error(e)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Mostly the main process has the same error. When it ends, the launcher ends this process, too.
            time.sleep(SECONDS_OF_OTHERS)
        print(f"error: {line}", file=sys.stderr)
        return code


def describe_error(error: Exception) -> tuple[int, str]:
    """Return the exit code and the line for an error that ends a command.

    Errors of these kinds say what the user can do. The traceback of any other error is written to a file.
    """
    if is_out_of_memory(error):
        return EXIT_REFUSED, f"Memory has run out: {first_line(error)} Lower --batch_size or --num_workers."
    if isinstance(error, ValueError | OSError | FloatingPointError | ImportError):
        # Python puts a number before the text of its OSErrors, and their file behind it.
        has_file = getattr(error, "filename", None)
        text = str(error) if has_file else getattr(error, "strerror", None) or str(error) or type(error).__name__
        return EXIT_REFUSED, shortened_message(" ".join(text.split()))
    import tempfile  # which takes longer to import than all the rest

    line = f"{type(error).__name__}: {first_line(error)} This should not happen: please report it"
    try:
        with tempfile.NamedTemporaryFile("wb", prefix="hf-captioner-", suffix=".txt", delete=False) as file:
            file.write("".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace"))
    except OSError:
        return EXIT_UNEXPECTED, f"{line}, with what {SHOW_TRACEBACK}=1 shows."
    return EXIT_UNEXPECTED, f"{line}, with {file.name!r}."
