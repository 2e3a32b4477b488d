"""The captioner that comes with the package: its name everywhere, how it is made, and what is in it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from test_hub import RECIPE, RESULTS
from transformers import AutoModelForImageTextToText, pipeline

from hf_captioner import PHOTOGRAPHS, OnnxCaptioner, pretrained
from hf_captioner.__main__ import main
from hf_captioner.cli import load_captioner
from hf_captioner.pretrained import captioner_path
from hf_captioner.publishing import bundle
from hf_captioner.publishing.bundle import write_bundle

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def source(captioner_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a training, with scores and a recipe that name paths of the machine."""
    folder = shutil.copytree(captioner_folder, tmp_path_factory.mktemp("training") / "source")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    results = RESULTS | {"protocol": RESULTS["protocol"] | {"dataset": "/home/me/flickr8k_of_mine"}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(autouse=True)
def quick_export(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the export, which takes long, but in slow tests."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(bundle, "export_onnx", lambda model, processor, folder, **kwargs: folder.mkdir())


@pytest.fixture
def made(source: Path, photo_files: list[Path], tmp_path: Path) -> Path:
    """The folder made of it for the package."""
    return write_bundle(source, tmp_path / "photographs", images=photo_files[:1])


def test_the_name_photographs_leads_to_the_captioner_of_the_package(photographs: Path) -> None:
    assert captioner_path("photographs") == str(photographs)
    assert Path(PHOTOGRAPHS) == Path(pretrained.__file__).parent / "photographs"
    assert [captioner_path(name) for name in ("./photographs", "me/captioner")] == ["./photographs", "me/captioner"]
    model, _ = load_captioner("photographs")
    assert model.config.name_or_path == str(photographs)


def test_a_package_without_it_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrained, "PHOTOGRAPHS", str(tmp_path / "absent"))
    assert main(["export", "photographs", str(tmp_path / "out")]) == 2
    assert "has no captioner in" in capsys.readouterr().err.splitlines()[-1]


def test_pipeline_without_a_model_takes_the_captioner_of_the_package(
    photographs: Path, photo_files: list[Path], captioner_folder: Path
) -> None:
    photo = str(photo_files[0])
    expected = pipeline("image-captioning", model=str(captioner_folder))(photo)
    assert pipeline("image-captioning")(photo) == expected


@pytest.mark.parametrize(
    "command",
    ["evaluate --dataset shapes --training_split '' --max_images 3 --num_resamples 2 --output_dir out",
     "push photographs me/x --license mit --datasets shapes --image --output_dir out"],
)  # fmt: skip
def test_commands_take_the_captioner_of_the_package(
    command: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0
    assert list((tmp_path / "out").iterdir())


def test_bundle_is_small_and_loads_in_single_precision(made: Path, source: Path, photo_files: list[Path]) -> None:
    size = (made / "model.safetensors").stat().st_size
    assert size < 0.6 * (source / "model.safetensors").stat().st_size
    assert (made / "model.safetensors").stat().st_mode & 0o044 == 0o044, "others can't read it"
    models = [AutoModelForImageTextToText.from_pretrained(made), load_captioner(made)[0]]
    models.append(pipeline("image-captioning", model=str(made)).model)
    assert {weights.dtype for model in models for weights in model.parameters()} == {torch.float32}
    captions = [pipeline("image-captioning", model=str(folder))([*map(str, photo_files)]) for folder in (made, source)]
    assert captions[0] == captions[1]


@pytest.mark.slow
def test_bundle_has_an_export_that_writes_its_captions(made: Path, photo_files: list[Path]) -> None:
    assert {file.name for file in (made / "onnx").iterdir()} == {
        *("captioner.json", "encoder.onnx", "decoder.onnx", "tokenizer.json"),
    }
    photos = [*map(str, photo_files)]
    exported = [captions[0]["generated_text"] for captions in OnnxCaptioner(made / "onnx")(photos)]
    expected = [captions[0]["generated_text"] for captions in pipeline("image-captioning", model=str(made))(photos)]
    assert len(set(expected)) > 1 and sum(map(str.__eq__, exported, expected)) >= len(photos) - 2


def test_bundle_has_a_card_with_scores_terms_and_limits_and_names_no_path(made: Path, source: Path) -> None:
    card = ModelCard.load(made / "README.md")
    assert card.data.license == "cc-by-nc-4.0" and card.data.eval_results[0].dataset_split == "test"
    assert "0.2100" in card.text and "flickr8k_of_mine, test, 1000 images, 5 beams" in card.text
    text = " ".join(card.text.split())
    assert "non-commercial research" in text and "errs in counts" in text and "{{" not in text
    assert 'pipeline("image-captioning")\n' in card.text and "trust_remote_code" not in card.text
    texts = {file: file.read_bytes() for file in made.rglob("*") if file.suffix in {".json", ".yaml", ".md"}}
    assert [file for file, text in texts.items() if b"/home/" in text or bytes(source.parent) in text] == []


def test_bundle_with_scores_in_8_bits_shows_them_beside_the_others(source: Path, tmp_path: Path) -> None:
    in_8_bits = tmp_path / "int8.json"
    in_8_bits.write_text(json.dumps(RESULTS | {"scores": {"bleu_4": 0.1234, "num_words": 9}}))
    folder = write_bundle(source, tmp_path / "photographs", int8_results=in_8_bits)
    lines = (folder / "README.md").read_text().splitlines()
    assert "| bleu_4 | 0.2100 | 0.1900 to 0.2300 | 0.1234 |" in lines and "| num_words | 17 |  | 9 |" in lines


def test_bundle_that_is_too_large_or_has_no_scores_is_refused_and_the_old_one_kept(
    source: Path, made: Path, captioner_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(made.rglob("*"))
    with pytest.raises(ValueError, match="no scores"):
        write_bundle(captioner_folder, made)
    monkeypatch.setattr(bundle, "LARGEST_SIZE", 100_000)
    with pytest.raises(ValueError, match=r"would take 0\.\d MB of the package; 0 are allowed .*model\.safetensors"):
        write_bundle(source, made)
    assert sorted(made.rglob("*")) == before and list(tmp_path.iterdir()) == [made]


def test_wheels_contain_every_file_of_the_bundle(made: Path) -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "hf_captioner"
    ]
    package = made.parent.parent / "hf_captioner"
    folder = shutil.copytree(made, package / "pretrained" / "photographs")
    packaged = {file for pattern in patterns for file in package.glob(pattern)}
    assert {file for file in folder.rglob("*") if file.is_file()} <= packaged


@pytest.fixture
def real() -> Path:
    """The captioner that comes with this checkout."""
    folder = Path(PHOTOGRAPHS)
    if not folder.is_dir():
        pytest.skip(f"there is no captioner in {folder} yet")
    return folder


def test_captioner_of_the_package_is_small_and_complete_and_names_no_path(real: Path) -> None:
    files = [file for file in real.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= bundle.LARGEST_SIZE
    assert {"model.safetensors", "README.md", "results.json", "encoder.onnx"} <= {file.name for file in files}
    texts = [file.read_text() for file in files if file.suffix in {".json", ".yaml", ".md"}]
    assert not [text for text in texts if re.search(r"/(work|opt|home|root|tmp|shared)/", text)]


def test_captioner_of_the_package_writes_the_captions_that_the_readme_shows(real: Path) -> None:
    lines = re.findall(r"^(assets/\S+)\t(.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    photographs = [str(ROOT / file) for file, _ in lines]
    found = [captions[0]["generated_text"] for captions in pipeline("image-captioning")(photographs)]
    assert found == [caption for _, caption in lines]
