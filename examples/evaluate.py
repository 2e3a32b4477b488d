"""Score a captioner: `accelerate launch examples/evaluate.py MODEL --dataset flickr8k --split test`."""

import sys

from hf_captioner.cli import run_command
from hf_captioner.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
