"""The command line: `hf-captioner COMMAND …`, `python -m hf_captioner COMMAND …`.

Commands are imported when they are called, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from . import __version__
from .cli import EXIT_REFUSED, run_command
from .interruption import ending_at_ctrl_c

# Title of each group, and its commands with one line of help. A command is `main` of the module of its name.
GROUPS: dict[str, dict[str, str]] = {
    "Use a captioner": {
        "caption": "caption images, folders and URLs",
        "evaluate": "score a captioner, or any captions, on a data set",
    },
    "Train one": {
        "train": "train from a recipe",
        "inspect": "look into a data set before training on it",
        "parts": "list encoders, attentions, decoders, data sets and metrics",
    },
    "Pass it on": {
        "push": "publish a captioner on the Hub",
        "export": "export to ONNX, to caption without torch",
        "convert": "convert a checkpoint of the PyTorch captioning tutorial",
    },
}
COMMANDS = [name for group in GROUPS.values() for name in group]


def help_text() -> str:
    """Return the text of `hf-captioner --help`."""
    lines = ["usage: hf-captioner COMMAND ...", "", "Write captions for photographs, and train models that do."]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<10}{text}" for name, text in commands.items())]
    lines += [
        "",
        "`hf-captioner COMMAND --help` explains a command, `hf-captioner --version` prints the version.",
        "Several processes: accelerate launch -m hf_captioner COMMAND ...",
        "Exit codes: 0 success, 1 problems found, 2 wrong usage or input, 70 unexpected error, 128 + n stopped by",
        "signal n. HF_CAPTIONER_TRACEBACK=1 shows where in the code an error arose.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, by default that of this program, and return its exit code."""
    if argv is None:
        code = main(sys.argv[1:])
        if "onnxruntime" in sys.modules and "torch" not in sys.modules:
            # Nothing is left to do, and onnxruntime would take as long to put its memory in order as for a caption.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"hf-captioner {__version__}")
        return 0
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Commands are {', '.join(COMMANDS)}."
        print(f"error: There is no command {name!r}. {hint}\nSee: hf-captioner --help", file=sys.stderr)
        return EXIT_REFUSED
    return run_command(lambda rest: import_command(name).main(rest), argv[1:])


def import_command(name: str) -> ModuleType:
    """Import the module of a command, which takes seconds."""
    with ending_at_ctrl_c():
        return import_module(f".commands.{name}", __package__)


if __name__ == "__main__":
    sys.exit(main())
