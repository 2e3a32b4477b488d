"""The table in docs/encoders.md agrees with new results of benchmarks/encoders.py."""

from __future__ import annotations

import gc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm

ROOT = Path(__file__).resolve().parents[1]


def benchmark() -> ModuleType:
    """Import benchmarks/encoders.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("benchmark_encoders", ROOT / "benchmarks" / "encoders.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


ENCODERS = benchmark()
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split(" | ")]
    for line in (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| family")
]


def test_table_has_every_family() -> None:
    assert {row[0] for row in ROWS} >= set(timm.list_modules())
    assert sum(row[5] == "works" for row in ROWS) > 0.8 * len(ROWS)
    assert all(row[5] == "works" or row[5].startswith(f"refused: Encoder {row[1]!r}") for row in ROWS)


# All families take minutes, so the fast tests try one of each of three layouts of features.
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row[0], marks=() if row[0] in ("efficientnet", "levit", "resnet") else pytest.mark.slow)
        for row in ROWS
    ],
)
def test_family(row: list[str]) -> None:
    result = ENCODERS.try_family(row[0])
    gc.collect()
    page = ENCODERS.page([result]).splitlines()[-1]
    assert [cell.strip() for cell in page.strip("|").split(" | ")] == row
