"""Recipes: names, files, options of the command line, and their help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_captioner.commands.train import main
from hf_captioner.training.recipe import Recipe, parse_recipe, read_recipe, recipes


@pytest.mark.parametrize("name", recipes())
def test_recipes_of_the_package_are_known_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = parse_recipe([name, "--dataset", "mine"])
    assert recipe.run.output_dir == f"outputs/{name}"
    assert {name: recipe.as_fields()[name] for name in read_recipe(name)}.keys() == read_recipe(name).keys()
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--list"])
    assert re.search(rf"^{name} +\w", capsys.readouterr().out, re.MULTILINE)


def test_options_override_the_recipe_which_overrides_the_defaults(tmp_path: Path) -> None:
    fields = {
        "epochs": 7,
        "learning_rate": 0.5,
        "encoder_kwargs": {"layers": [1, 2]},
        "mirror": True,
        "max_images": None,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(fields))
    options = ["--learning-rate", "1e-3", "--skip_broken", "--cache_cells=false", "--tokenizer", "bpe"]
    recipe = parse_recipe([str(tmp_path / "mine.yaml"), *options])
    assert (recipe.stages.epochs, recipe.stages.learning_rate, recipe.stages.patience) == (7, 1e-3, 5)
    assert recipe.model.encoder_kwargs == "{layers: [1, 2]}" and recipe.data.max_images is None
    assert (recipe.data.mirror, recipe.data.skip_broken, recipe.data.cache_cells) == (True, True, False)
    assert recipe.data.tokenizer == "bpe"
    assert parse_recipe([*options, "--epochs", "3", str(tmp_path / "mine.yaml")]).stages.epochs == 3
    assert not parse_recipe(["--no-cache-cells"]).data.cache_cells
    assert parse_recipe([]) == Recipe() == Recipe.from_fields(**Recipe().as_fields())
    assert parse_recipe(["shapes"]) == Recipe()


def test_the_written_recipe_gives_the_same_recipe(tmp_path: Path) -> None:
    """As in the output folder of a training."""
    recipe = parse_recipe(["flickr8k_mobilenetv2", "--max_images", "9"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.as_fields()))
    assert parse_recipe([str(tmp_path / "recipe.yaml")]) == recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], r"no option --epoch \(did you mean --epochs\?\)\. See --help"),
        (["--zebra=red"], "no option --zebra. See"),
        (["shapes", "flickr8k"], "Unknown arguments: flickr8k. Give one recipe"),
        (["flickr9k"], "No recipe at 'flickr9k'. .* one of continue, flickr8k, .*shapes"),
        (["FILE", "learning_rat: 1"], r"has no known field learning_rat \(did you mean learning_rate\?\)"),
        (["FILE", "- 1"], "holds a list, not names with values"),
        (["FILE", "a: b: c"], "is not YAML"),
    ],
)
def test_wrong_names_get_a_suggestion(arguments: list[str], message: str, tmp_path: Path) -> None:
    if arguments[0] == "FILE":
        (tmp_path / "mine.yaml").write_text(arguments[1])
        arguments = [str(tmp_path / "mine.yaml")]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        parse_recipe(arguments)


BOMB = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *a]\n" for i in range(60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"epochs: many", "epochs: invalid int value: 'many'"),
        (b"epochs: [1, 2]", "epochs: .* is a list, not a number or a text"),
        (b"epochs: {a: 1}", "epochs: invalid int value"),
        (b"epochs: 2024-01-01", "epochs: .* is a date"),
        (b"epochs: 1\nseed: 2\nepochs: 3", "epochs is given twice"),
        (b"mirror: 2", "mirror: '2' is neither true nor false"),
        (b"learning_rate: .nan", "learning_rate is nan; it must be at least 0"),
        (b"encoder_kwargs: [1]", "encoder_kwargs: .* is a list"),
        (b"? [epochs]\n: 1", "unhashable key"),
        (b"epochs:\n\t- 1", "cannot start any token"),
        (b"\x00\xff\xfe\x89PNG", "not YAML"),
        (b"epochs: " + b"[" * 5000, "recursion"),
        (BOMB.encode(), r"\*a refers to another value"),
        (b"#" * 2**21, "it has more than 1 MiB"),
        (b"output_dir: ''", "output_dir is ''; it must be given"),
    ],
)
def test_wrong_recipes_are_refused_in_a_line_that_names_the_file(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=rf"^[^\n]*mine.yaml'[^\n]*{message}[^\n]*$"):
        parse_recipe([str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "at least 1"),
        ("epochs", "3", "a whole number"),
        ("mirror", 1, "true or false"),
        ("output_dropout", 1.5, "at least 0 and at most 1"),
        ("learning_rate", float("inf"), "at least 0"),
        ("schedule", "stepwise", "one of linear, cosine"),
        ("seed", -1, "at least 0"),
        ("dataset", "", "given, not empty"),
        ("decoder_kwargs", "num_layers", "names with values in YAML"),
        ("data_config", "{a: &x [1], b: *x}", "refers to another value"),
    ],
)
def test_wrong_values_are_refused_in_python_too(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is .*; it must be .*{message}"):
        Recipe.from_fields(**{field: value})


@pytest.mark.parametrize("arguments", [["--epochs", "many"], ["--schedule", "stepwise"], ["--mirror", "perhaps"]])
def test_wrong_values_end_the_program(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_recipe(arguments)
    error = capsys.readouterr().err
    assert error.startswith("error: argument ") and arguments[1] in error


def test_unknown_fields_in_python_are_refused() -> None:
    with pytest.raises(TypeError, match=r"no field epoch \(did you mean epochs\?\)"):
        Recipe.from_fields(epoch=3)


def test_help_has_each_option_once_and_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "130")
    with pytest.raises(SystemExit, match="0"):
        parse_recipe(["--help"], description="Train.")
    text = capsys.readouterr().out
    options = re.findall(r"^  --(\S+?),? ", text.replace("--from TEXT, --", "--"), re.MULTILINE)
    assert options == ["list", *Recipe().as_fields()]
    titles = " ".join(re.findall(r"^(\w+):$", text, re.MULTILINE))
    assert titles.endswith("data model optimization stages decoding run")
    assert 100 < max(map(len, text.splitlines())) <= 130
    assert (
        "--batch_size N " in text and "[32]" in text and "One of linear, cosine, constant_with_warmup. [cosine]" in text
    )
