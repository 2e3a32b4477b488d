"""Runs transformers' own tests on captioners; see `tests/peer/run.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PEER = Path(__file__).resolve().parent / "peer"


@pytest.mark.slow
def test_transformers_own_tests_pass():
    pytest.importorskip("parameterized", reason="transformers' tests need parameterized")
    run = subprocess.run([sys.executable, PEER / "run.py"], capture_output=True, text=True)
    if run.returncode == 75:
        pytest.skip("there is no package index to fetch transformers' tests from")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
