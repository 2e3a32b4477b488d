"""The package keeps to its floor plan: who imports whom, read from the source, and the map in docs/architecture.md."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from hf_captioner.publishing.published_folder import TRAVELLING

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_captioner"

# The folders that each folder may import from, besides itself.
BELOW = {
    "model": set(),
    "data": {"model"},
    "metrics": {"model"},
    "evaluation": {"model", "data", "metrics"},
    "visualization": {"model"},
    "training": {"model", "data", "metrics", "evaluation", "visualization"},
    "publishing": {"model", "data", "metrics", "evaluation", "visualization"},
    "commands": {"model", "data", "metrics", "evaluation", "visualization", "training", "publishing"},
    "testing": {"model", "data", "metrics"},
}
# Modules beside the folders, and the folders that may import them.
SHARED = {
    "files": BELOW.keys() - {"model", "metrics", "testing"},
    "errors": BELOW.keys() - {"model", "metrics"},
    "interruption": {"training", "commands"},
    "cli": {"training", "commands"},
    "pretrained": {"model", "training", "publishing", "commands"},  # of model/, only the registration
}
# Libraries that files may import which go to the Hub with a model; pillow_heif only where it is installed.
MODEL_LIBRARIES = {
    "torch",
    "timm",
    "transformers",
    "huggingface_hub",
    "PIL",
    "pillow_heif",
    "numpy",
    "tokenizers",
    "safetensors",
}


def module_name(file: Path) -> str:
    """Return the dotted name of a file of the package, such as `model.encoders`; "" for the package itself."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(file: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the absolute name of each module that a file imports anywhere in it, with the import statement."""
    folder = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                name = f"{module}.{alias.name}"
                yield name if name.removeprefix("hf_captioner.") in FILES else module, node


def imported_modules(name: str) -> set[str]:
    """Return the modules of this package that a module imports."""
    targets = {target for target, _ in imports(FILES[name])}
    return {target.removeprefix("hf_captioner").removeprefix(".") for target in targets if is_ours(target)} - {""}


def libraries(names: list[str]) -> set[str]:
    """Return the top-level names of all libraries that modules import, without the standard library."""
    found = {target.split(".")[0] for name in names for target, _ in imports(FILES[name])}
    return found - {"hf_captioner"} - sys.stdlib_module_names


def is_ours(target: str) -> bool:
    return target.split(".")[0] == "hf_captioner"


@pytest.mark.parametrize("name", [name for name in FILES if name.split(".")[0] in BELOW])
def test_imports_go_down(name: str) -> None:
    folder = name.split(".")[0]
    for target in imported_modules(name):
        room = target.split(".")[0]
        allowed = folder in SHARED[room] if room in SHARED else room in BELOW[folder] | {folder}
        assert allowed, f"{name} imports {target}"


def test_only_the_command_line_imports_commands() -> None:
    users = {name for name in FILES if any(target.split(".")[0] == "commands" for target in imported_modules(name))}
    assert users <= {name for name in FILES if name.split(".")[0] == "commands"} | {"__main__"}


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter({name: imported_modules(name) for name in FILES}).prepare()
    except CycleError as e:
        pytest.fail(f"circle: {' -> '.join(e.args[1])}")


def with_imports(names: set[str]) -> set[str]:
    """Return modules, and all modules of this package that they import directly or not."""
    modules, todo = set(), names
    while todo:
        modules |= todo
        todo = set().union(*map(imported_modules, todo)) - modules
    return modules


@pytest.mark.parametrize("name", sorted(with_imports({f"model.{name}" for name in TRAVELLING})))
def test_published_file_can_be_loaded_by_transformers(name: str) -> None:
    for target, node in imports(FILES[name]):
        if is_ours(target):
            # Of all spellings, transformers' copying of remote code understands `from .x import y` alone.
            assert isinstance(node, ast.ImportFrom) and node.level == 1 and node.module, ast.unparse(node)
    assert libraries([name]) <= MODEL_LIBRARIES


def test_registry_needs_only_the_standard_library() -> None:
    assert libraries(["model.registry"]) == set()


def test_exported_program_needs_few_libraries() -> None:
    optional = {"huggingface_hub", "pillow_heif"}
    assert libraries(sorted(with_imports({"model.onnx_runner"}))) - optional == {
        "numpy",
        "PIL",
        "tokenizers",
        "onnxruntime",
    }


def test_map_names_every_module() -> None:
    """The map in docs/architecture.md has a line for each folder and file of the package, and no other."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = text.split("```text\n")[1].split("```")[0]
    listed, folder = [], Path()
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        folder = Path(*folder.parts[: len(indent) // 2])
        listed.append((folder / name).as_posix())
        if name.endswith("/"):
            folder /= name
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.suffix in {".py", ".pyi"} and path.name not in {"__init__.py", "__init__.pyi"}
    }
    assert {name for name in listed if name.endswith(".py")} == expected
    folders = {path.parent.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert {name for name in listed if not name.endswith(".py")} == folders
