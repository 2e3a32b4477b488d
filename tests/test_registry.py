"""Parts by name: built-ins, parts of this process, and packages announced by real entry points."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hf_captioner.data.datasets import DATASETS
from hf_captioner.metrics import METRICS
from hf_captioner.model.attentions import ATTENTIONS
from hf_captioner.model.decoders import DECODERS
from hf_captioner.model.encoders import ENCODERS
from hf_captioner.model.registry import KINDS, Registry, main

Install = Callable[..., None]


@pytest.fixture
def registry() -> Registry:
    return Registry("fruits", {"apple": "collections:OrderedDict", "pear": "no_such_module:Pear"})


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(package, source, group="fruits", **names)`: a package `package` whose entry points are `names`."""
    installed = []

    def add(package: str, source: str, group: str = "fruits", **names: str) -> None:
        folder = tmp_path / package  # a site of its own, as two packages may lie in two places
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


def test_built_in_is_imported_when_asked_for(registry: Registry) -> None:
    assert registry.get("apple") is OrderedDict
    assert registry.origin("pear") == "no_such_module:Pear"  # listing imports nothing
    assert registry.names() == ["apple", "pear"]


def test_registered_part_is_found(registry: Registry) -> None:
    @registry.register("fig")
    class Fig: ...

    assert registry.get("fig") is Fig
    assert "fig" in registry.names()
    assert registry.origin("fig") == "registered in this process"


def test_entry_point_is_found(registry: Registry, install: Install) -> None:
    install("orchard", "class Plum: ...", plum="Plum")
    install("joinery", "class Oak: ...", group="trees", oak="Oak")
    assert registry.names() == ["apple", "pear", "plum"]
    assert "orchard" not in sys.modules
    assert registry.get("plum").__module__ == "orchard"
    assert registry.origin("plum") == "orchard:Plum of orchard"


@pytest.mark.parametrize("name", ["apple", "plum", "fig"])
def test_taken_name_cannot_be_registered(registry: Registry, install: Install, name: str) -> None:
    install("orchard", "class Plum: ...", plum="Plum")
    registry.register("fig")(object())
    with pytest.raises(ValueError, match=rf"'{name}' is already taken among the fruits .*another name"):
        registry.register(name)(object())


def test_name_claimed_by_two_packages_is_refused(registry: Registry, install: Install) -> None:
    install("orchard", "class Plum: ...", plum="Plum")
    install("garden", "class Plum: ...", plum="Plum")
    with pytest.raises(
        ValueError, match=r"'plum' of the fruits is claimed by both .*:Plum of .* and .*:Plum of"
    ) as error:
        registry.get("plum")
    assert "orchard:Plum" in str(error.value) and "garden:Plum" in str(error.value)


def test_name_of_a_built_in_claimed_by_a_package_is_refused(registry: Registry, install: Install) -> None:
    install("orchard", "class Apple: ...\nclass Plum: ...", apple="Apple", plum="Plum")
    with pytest.raises(ValueError, match=r"claimed by both collections:OrderedDict and orchard:Apple of orchard"):
        registry.get("apple")
    assert registry.names() == ["apple", "pear", "plum"]  # the others are not harmed
    assert registry.get("plum").__name__ == "Plum"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('needs a license')", "needs a license"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("", "no attribute 'Plum'"),
        ("import sys; sys.exit('wants another machine')", "wants another machine"),
    ],
)
def test_failing_entry_point_is_named(registry: Registry, install: Install, source: str, reason: str) -> None:
    install("orchard", source, plum="Plum")
    with pytest.raises(ValueError, match=rf"'plum' of the fruits \(orchard:Plum of orchard\).*{reason}") as error:
        registry.get("plum")
    assert error.value.__cause__ is not None
    assert registry.get("apple") is OrderedDict  # the others are not harmed


def test_unknown_name_lists_the_known_ones(registry: Registry, install: Install) -> None:
    install("orchard", "class Plum: ...", plum="Plum")
    with pytest.raises(ValueError, match=r"'quince' is not among the fruits\. Known: apple, pear, plum\.") as error:
        registry.get("quince")
    assert "'hf_captioner.fruits'" in str(error.value) and "install that package" in str(error.value)
    with pytest.raises(ValueError, match=r"'quince' is not .* pip install quinces"):
        registry.get("quince", "quinces")


def test_package_of_a_part(registry: Registry, install: Install) -> None:
    install("orchard", "", plum="Plum")
    registry.register("fig")(object())
    assert [registry.package(name) for name in ("plum", "apple", "fig", "quince")] == ["orchard", None, None, None]


def test_parts_are_listed_with_where_they_come_from(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line for line in listed if not line.startswith(" ")] == list(KINDS)
    for kind, place in KINDS.items():
        module, _, attribute = place.partition(":")
        registry = getattr(importlib.import_module(module), attribute)
        assert registry.kind == kind
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
    with pytest.raises(SystemExit):
        main(["attention"])
    assert "kinds are encoders, attentions" in capsys.readouterr().err


def test_listing_runs_as_a_program() -> None:
    result = subprocess.run([sys.executable, "-m", "hf_captioner.model.registry"], capture_output=True, text=True)
    assert result.returncode == 0 and "hf_captioner.data.shapes:load_shapes" in result.stdout
    assert "found in sys.modules" not in result.stderr


@pytest.mark.parametrize("registry", [ENCODERS, ATTENTIONS, DECODERS, DATASETS, METRICS], ids=lambda r: r.kind)
def test_every_name_of_the_package_loads(registry: Registry) -> None:
    assert registry.names()
    for name in registry.names():
        assert callable(registry.get(name)), name
