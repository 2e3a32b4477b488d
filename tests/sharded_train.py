"""examples/train.py with weights sharded between processes on CPUs."""

import runpy
from pathlib import Path

from tiny_run import shard_on_cpus

shard_on_cpus()
runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "train.py"), run_name="__main__")
