"""The names that `hf_captioner` exports, and what importing it does and does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hf_captioner


@pytest.mark.parametrize("name", hf_captioner.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(hf_captioner, name) is not None


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "timm", "transformers", "datasets", "numpy", "PIL", "evaluate", "matplotlib"}
    program = f"import sys, hf_captioner; print(*sorted({heavy!r} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("modules", ["hf_captioner, transformers", "transformers, hf_captioner"])
def test_captioners_are_registered_in_either_order_of_imports(modules: str) -> None:
    program = (
        f"import {modules}; print(transformers.AutoConfig.for_model('hf_captioner').model_type);"
        "print(transformers.pipelines.PIPELINE_REGISTRY.check_task('image-captioning')[0])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["hf_captioner", "image-captioning"]
