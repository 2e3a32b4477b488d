"""Parts are found by name: built-in ones, those of this process, and those of packages with real entry points."""

from __future__ import annotations

import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hf_captioner
from hf_captioner.commands.parts import KINDS, main
from hf_captioner.model.registry import Registry, load

Install = Callable[..., None]
REGISTRIES: dict[str, Registry] = {kind: load(location) for kind, location in KINDS.items()}


@pytest.fixture
def registry() -> Registry:
    return Registry("fruits", {"apple": "collections:OrderedDict", "pear": "no_such_module:Pear"})


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return `install(package, source, group, **names)`, which installs a package whose entry points are `names`."""
    installed = []

    def add(package: str, source: str, group: str = "fruits", **names: str) -> None:
        folder = tmp_path / package  # on sys.path by itself, as packages may be in different folders
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{package}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        points = "\n".join(f"{name} = {package}:{attribute}" for name, attribute in names.items())
        (info / "entry_points.txt").write_text(f"[hf_captioner.{group}]\n{points}\n")
        monkeypatch.syspath_prepend(folder)
        importlib.invalidate_caches()
        installed.append(package)

    yield add
    for package in installed:
        sys.modules.pop(package, None)


def test_parts_are_imported_when_they_are_used(registry: Registry, install: Install) -> None:
    install("orchard", "class Plum: ...", plum="Plum")
    install("joinery", "class Oak: ...", group="trees", oak="Oak")
    assert registry.names() == ["apple", "pear", "plum"]
    assert registry.origin("pear") == "no_such_module:Pear" and registry.origin("plum") == "orchard:Plum of orchard"
    assert "orchard" not in sys.modules
    assert registry.get("apple") is OrderedDict and registry.get("plum").__module__ == "orchard"

    @registry.register("fig")
    class Fig: ...

    assert registry.get("fig") is Fig and registry.origin("fig") == "registered in this process"
    assert registry.names() == ["apple", "fig", "pear", "plum"]
    assert [registry.package(name) for name in ("plum", "apple", "fig", "quince")] == ["orchard", None, None, None]


@pytest.mark.parametrize("name", ["apple", "plum", "fig"])
def test_taken_name_cannot_be_registered(registry: Registry, install: Install, name: str) -> None:
    install("orchard", "class Plum: ...", plum="Plum")
    registry.register("fig")(object())
    with pytest.raises(ValueError, match=rf"'{name}' is already taken among the fruits .*another name"):
        registry.register(name)(object())


def test_name_claimed_twice_is_refused(registry: Registry, install: Install) -> None:
    install("orchard", "class Apple: ...\nclass Plum: ...\nclass Kiwi: ...", apple="Apple", plum="Plum", kiwi="Kiwi")
    install("garden", "class Plum: ...", plum="Plum")
    with pytest.raises(ValueError, match=r"'plum' of the fruits is claimed by both .*:Plum of .* and .*:Plum of") as e:
        registry.get("plum")
    assert "orchard:Plum" in str(e.value) and "garden:Plum" in str(e.value)
    with pytest.raises(ValueError, match=r"claimed by both collections:OrderedDict and orchard:Apple of orchard"):
        registry.get("apple")
    assert registry.names() == ["apple", "kiwi", "pear", "plum"]  # other names still work
    assert registry.get("kiwi").__name__ == "Kiwi"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('needs a license')", "needs a license"),
        ("import no_such_module", "No module named 'no_such_module'"), ("", "no attribute 'Plum'"),
        ("import sys; sys.exit('wants another machine')", "wants another machine"),
    ],
)  # fmt: skip
def test_failing_entry_point_is_named(registry: Registry, install: Install, source: str, reason: str) -> None:
    install("orchard", source, plum="Plum")
    with pytest.raises(ValueError, match=rf"'plum' of the fruits \(orchard:Plum of orchard\).*{reason}") as error:
        registry.get("plum")
    assert error.value.__cause__ is not None
    assert registry.get("apple") is OrderedDict  # other names still work


def test_unknown_name_lists_the_known_ones(registry: Registry, install: Install) -> None:
    install("orchard", "class Plum: ...", plum="Plum")
    with pytest.raises(ValueError, match=r"'quince' is not among the fruits\. Known: apple, pear, plum\.") as error:
        registry.get("quince")
    assert "'hf_captioner.fruits'" in str(error.value) and "install that package" in str(error.value)
    with pytest.raises(ValueError, match=r"'quince' is not .* pip install quinces"):
        registry.get("quince", "quinces")


def test_parts_are_listed_with_where_they_come_from(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line for line in listed if not line.startswith(" ")] == list(KINDS)
    for registry in REGISTRIES.values():
        for name in registry.names():
            assert any(line.split() == [name, registry.origin(name)] for line in listed), name

    install("orchard", "from torch.nn import Identity as Plum", group="attentions", plum="Plum")
    install("ruin", "raise RuntimeError('needs a license')", group="attentions", peach="Peach", additive="Mine")
    assert main(["attentions"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "attentions" and lines[-1].split() == ["plum", "orchard:Plum", "of", "orchard"]
    problems = [line for line in lines if "PROBLEM" in line]
    assert len(problems) == 2 and lines.index(problems[0]) == 3
    assert "claimed by both hf_captioner.model.attentions:AdditiveAttention and ruin:Mine of ruin" in problems[0]
    assert "'peach' of the attentions (ruin:Peach of ruin) cannot be imported: needs a license" in problems[1]
    with pytest.raises(SystemExit) as stopped:
        main(["attention"])
    assert stopped.value.code == 2 and "Kinds are encoders, attentions" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_every_built_in_part_can_be_loaded(kind: str) -> None:
    registry = REGISTRIES[kind]
    assert registry is getattr(hf_captioner, kind.upper()) and registry.kind == kind
    assert registry.names() and all(callable(registry.get(name)) for name in registry.names())
