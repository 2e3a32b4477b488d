"""Caption images: `python examples/caption.py MODEL photo.jpg`."""

import sys

from hf_captioner.cli import run_command
from hf_captioner.commands.caption import main

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
