"""Imports run one way: registry, then parts, then the model, then what is built on it. Read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from hf_captioner.publishing.hub import TRAVELLING

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hf_captioner"

# What a module may import of this package. Those that are not named are held by the test for cycles alone.
ALLOWED = {
    "registry": set(),
    "configuration_captioner": set(),
    "modes": set(),
    "errors": set(),
    "encoders": {"registry", "modes"},
    "attentions": {"registry"},
    "recurrence": set(),
    "decoders": {"registry", "recurrence"},
    "objectives": {"registry"},
    "decoding": {"decoders"},
    "guided_decoding": {"decoding"},
    "captions": set(),
    "images": set(),
    "image_processing_captioner": {"images"},
    "onnx_search": set(),
    "onnx_runner": {"images", "onnx_search"},
    "inspection": {"captions", "visualization"},
    "data": {
        *("registry", "errors", "images", "image_processing_captioner", "inspection"),
        *("layouts", "layouts.damage", "layouts.splits", "layouts.stored_tables"),
    },
    "shapes": set(),
    "processing_captioner": {"captions", "image_processing_captioner", "images", "objectives"},
    "modeling_captioner": {
        *("configuration_captioner", "encoders", "attentions", "decoders", "decoding", "objectives", "registry"),
    },
    "pipeline_captioner": {
        *("configuration_captioner", "modeling_captioner", "processing_captioner", "images", "captions"),
    },
    "attention_maps": set(),
    "fonts": set(),
    "visualization": {"attention_maps", "fonts", "images"},
    "overlay": {"attention_maps", "fonts", "images"},
    "attention_page": {"attention_maps", "images"},
    "pointing": {"attention_maps", "shapes"},
}

# What files may import that go to the Hub with a model.
LIBRARIES = {"torch", "timm", "transformers", "huggingface_hub", "PIL", "numpy", "tokenizers"}


def imports(file: Path) -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
    """Absolute dotted names of the modules that a file imports, anywhere in it, each with its statement."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                name = f"{module}.{alias.name}"
                yield name if is_internal(name) else module, node


def is_internal(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return name.split(".")[0] == PACKAGE and (path.is_dir() or path.with_suffix(".py").is_file())


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted((ROOT / PACKAGE).rglob("*.py"))}
GRAPH = {name: {target for target, _ in imports(file) if is_internal(target)} for name, file in FILES.items()}


def external(files: list[Path]) -> set[str]:
    """Top-level names of everything imported from elsewhere, the standard library left out."""
    names = {target.split(".")[0] for file in files for target, _ in imports(file)}
    return names - {PACKAGE} - sys.stdlib_module_names


def travelling_modules() -> set[str]:
    modules, todo = set(), {f"{PACKAGE}.{name}" for name in TRAVELLING}
    while todo:
        modules |= todo
        todo = set().union(*(GRAPH[name] for name in todo)) - modules
    return modules


@pytest.mark.parametrize("module", ALLOWED)
def test_module_imports_only_what_lies_below_it(module: str) -> None:
    assert GRAPH[f"{PACKAGE}.{module}"] <= {f"{PACKAGE}.{name}" for name in ALLOWED[module]}


def test_metrics_import_only_the_registry_and_each_other() -> None:
    metrics = {name for name in FILES if name.startswith(f"{PACKAGE}.metrics")}
    assert set().union(*(GRAPH[name] for name in metrics)) <= metrics | {f"{PACKAGE}.registry"}


def test_layouts_import_only_each_other() -> None:
    layouts = {name for name in FILES if name.startswith(f"{PACKAGE}.layouts")}
    assert set().union(*(GRAPH[name] for name in layouts)) <= layouts


def test_no_import_cycles() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as e:
        pytest.fail(f"cycle: {' -> '.join(e.args[1])}")


def test_registry_needs_only_the_standard_library() -> None:
    assert external([FILES[f"{PACKAGE}.registry"]]) == set()


def test_package_does_not_import_examples() -> None:
    assert "examples" not in external(list(FILES.values()))


@pytest.mark.parametrize("module", sorted(travelling_modules()))
def test_travelling_file_can_be_loaded_from_the_hub(module: str) -> None:
    file = FILES[module]
    assert file.parent == ROOT / PACKAGE, "transformers loads flat siblings only"
    for target, node in imports(file):
        if is_internal(target):
            # Of all spellings, transformers' copying of remote code sees `from .x import y` alone.
            assert isinstance(node, ast.ImportFrom) and node.level == 1 and node.module, ast.unparse(node)
    assert external([file]) <= LIBRARIES


def test_what_goes_along_with_an_export_needs_little() -> None:
    files = [FILES[f"{PACKAGE}.{name}"] for name in ("images", "onnx_search", "onnx_runner")]
    optional = {"huggingface_hub"}  # to download images
    assert external(files) - optional == {"numpy", "PIL", "tokenizers", "onnxruntime"}


def test_import_leaves_heavy_libraries_alone() -> None:
    program = f"import sys, {PACKAGE}; print(*sorted({{'matplotlib', 'datasets', 'evaluate'}} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
