"""examples/train.py with weights, or the optimizer's state, shared out between processes on CPUs.

python tests/shared_train.py fsdp|deepspeed [arguments of train.py]
"""

import runpy
import sys
from pathlib import Path

from tiny_run import share_on_cpus

share_on_cpus(sys.argv.pop(1))
runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "train.py"), run_name="__main__")
