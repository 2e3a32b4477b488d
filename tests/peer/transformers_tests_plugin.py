"""A plug-in of pytest that makes the tests of transformers importable as the package `transformers_tests`.

`run.py` loads it, and sets the folder of the tests. `pyproject.toml` keeps pytest from collecting this folder itself, so
that the suite of this package needs no download.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType

import pytest

FOLDER = os.environ["TRANSFORMERS_TESTS"]

# What the tests of the source distribution import of folders that it lacks, and what stands in for it.
LACKING: dict[str, tuple[str, dict[str, object]]] = {
    "exporters": ("test_export", {"ExportTesterMixin": type("ExportTesterMixin", (), {})}),
    "generation": ("test_utils", {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})}),
    "utils": ("test_configuration_utils", {"config_common_kwargs": {"output_attentions": True, "return_dict": False}}),
}

MARKERS = """accelerate_tests flash_attn_3_test flash_attn_4_test flash_attn_test generate is_pipeline_test is_training_test
    order torch_compile_test"""


def _add_package(name: str, **attributes: object) -> None:
    module = module_from_spec(ModuleSpec(name, None, is_package=True))
    vars(module).update(attributes)
    sys.modules[name] = module


_add_package("transformers_tests", __path__=[FOLDER])
for folder, (name, attributes) in LACKING.items():
    if not os.path.isdir(os.path.join(FOLDER, folder)):
        _add_package(f"transformers_tests.{folder}")
        _add_package(f"transformers_tests.{folder}.{name}", **attributes)
if not os.path.isfile(os.path.join(FOLDER, os.pardir, "utils", "fetch_hub_objects_for_ci.py")):
    objects = ModuleType("fetch_hub_objects_for_ci")
    objects.url_to_local_path = lambda url: url  # type: ignore[attr-defined]
    sys.modules["fetch_hub_objects_for_ci"] = objects


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers of transformers' tests known."""
    for name in MARKERS.split():
        config.addinivalue_line("markers", f"{name}: of transformers")
