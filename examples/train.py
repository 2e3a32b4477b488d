"""Train a captioner with Accelerate: `accelerate launch examples/train.py [RECIPE] [--field value ...]`."""

import sys

from hf_captioner.cli import run_command
from hf_captioner.commands.train import main

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
