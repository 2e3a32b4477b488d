"""Training and evaluation as people run them: commands and example scripts, in processes of their own."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_captioner import load_captions
from hf_captioner.cli import load_captioner

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "max_images": 24, "epochs": 2, "batch_size": 8, "hidden_size": 16, "embedding_size": 16, "attention_size": 16,
    "max_length": 9, "num_beams": 1, "final_num_beams": 2,
}  # fmt: skip


def run(*program: Any, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `hf-captioner` with these arguments, or a script of examples/ if the first of them is a file there."""
    script = ROOT / "examples" / str(program[0])
    command = [str(script), *program[1:]] if script.is_file() else ["-m", "hf_captioner", *program]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, command)], capture_output=True, text=True, timeout=400, cwd=ROOT
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def options(**fields: Any) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and terminal output of a training on a few drawn shapes, through `accelerate launch`."""
    folder = tmp_path_factory.mktemp("trained")
    launcher = ("-m", "accelerate.commands.launch", "--cpu")
    stages = {
        "ema_decay": 0.9,
        "reward_epochs": 1,
        "reward_samples": 2,
        "suppress_bad_endings": True,
        "reward_likelihood_weight": 0.3,
    }
    result = run("train.py", *options(**TINY, **stages, output_dir=folder), launcher=launcher)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, result.stdout


def test_training_leaves_model_log_and_pictures(trained: tuple[Path, str]) -> None:
    folder, output = trained
    log = read_lines(folder / "log.jsonl")
    assert [(record["epoch"], record["stage"]) for record in log] == [(1, "Epoch"), (2, "Epoch"), (3, "Rewards")]
    assert log[1]["loss"] < log[0]["loss"] and log[2]["reward"] >= 0
    assert {"bleu_4", "cider", "learning_rate", "captions_per_second", "distinct_captions"} <= log[0].keys()
    for picture in ("curves.png", "attention.png"):
        assert min(Image.open(folder / picture).size) > 100
    assert (folder / "model.safetensors").is_file() and not list(folder.glob("*.bin"))
    results = json.loads((folder / "results.json").read_text())
    assert results["protocol"]["num_images"] == 24 and results["protocol"]["decoding"]["num_beams"] == 2
    assert f"{results['scores']['bleu_4']:.4f}" in output and str(folder / "attention.png") in output
    predictions = read_lines(folder / "predictions.jsonl")
    assert len(predictions) == 24 and predictions[0]["caption"] in output
    generation_config = load_captioner(folder)[0].generation_config
    assert generation_config.num_beams == 5 and len(generation_config.bad_words_ids) > 5


def test_training_can_be_watched(trained: tuple[Path, str]) -> None:
    """What TensorBoard reads: figures in two sections, captions, and attention pictures, each epoch."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pages = events.EventAccumulator(str(trained[0] / "logs"))
    pages.Reload()
    log = read_lines(trained[0] / "log.jsonl")
    for name in ("validation/cider", "train/captions_per_second"):
        found = [(event.step, event.value) for event in pages.Scalars(name)]
        assert found == [(row["epoch"], pytest.approx(row[name.partition("/")[2]])) for row in log]
    captions = read_lines(trained[0] / "predictions.jsonl")
    text = pages.Tensors("captions/text_summary")
    assert [event.step for event in text] == [1, 2, 3]
    assert f"- {captions[0]['image_id']}: ".encode() in text[0].tensor_proto.string_val[0]
    pictures = [name for name in pages.Tags()["images"] if name.startswith("attention/")]
    assert pictures and all(pages.Images(name)[-1].width > 100 for name in pictures)


def test_evaluation_prints_and_writes_scores(trained: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = trained
    arguments = ["--dataset", "shapes", "--num-beams", 2, "--max-images", 24, "--output-dir", tmp_path]
    result = run("evaluate", folder, *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    written = json.loads((tmp_path / "results.json").read_text())
    after_training = json.loads((folder / "results.json").read_text())["scores"]
    # Rounding differs from batch to batch in the last bits only, so the captions are the same ones.
    assert {name: written["scores"][name] for name in after_training} == pytest.approx(after_training)
    low, high = written["intervals"]["bleu_4"]
    assert low <= written["scores"]["bleu_4"] <= high
    assert f"bleu_4             {written['scores']['bleu_4']:.4f}  [{low:.4f}, {high:.4f}]" in result.stdout
    assert (
        "Not comparable with published scores: papers don't report on split 'validation' of 'shapes'" in result.stdout
    )
    assert 0 <= written["scores"]["novel_captions"] <= 1
    protocol = written["protocol"]
    assert (protocol["num_images"], protocol["split_images"], protocol["references_per_image"]) == (24, 400, [5, 5])
    assert protocol["decoding"]["num_beams"] == 2 and len(protocol["decoding"]["bad_words_ids"]) > 5
    lines = read_lines(tmp_path / "predictions.jsonl")
    assert len(lines) == 24 and set(lines[0]["scores"]) == set(written["intervals"])
    assert (tmp_path / "report.html").read_text().count("<figure>") == 24
    example = run("evaluate.py", folder, "shapes", "test")
    assert example.returncode == 0, example.stderr[-2000:]
    assert "cider" in example.stdout and "split 'test' of 'shapes'" in example.stdout


def test_a_file_of_captions_is_scored_and_compared(tmp_path: Path) -> None:
    """Captions of any system, in COCO's format, on two processes; the better of two is named."""
    rows = load_captions("shapes", "validation", num_images=30)
    records = [
        {"image_id": i, "caption": captions[0]} for i, captions in zip(rows["image_id"], rows["captions"], strict=True)
    ]
    worse = [record | {"caption": "a red circle"} for record in records]
    for name, captions in (("best", records), ("worse", worse)):
        (tmp_path / f"{name}.json").write_text(json.dumps(captions[::-1]))
    arguments = ["--max-images", 30, "--training-split", "", "--output-dir", tmp_path / "out"]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    result = run("evaluate", tmp_path / "worse.json", tmp_path / "best.json", *arguments, launcher=launcher)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("best.json is better: ahead of") >= 10 and "in 100.0% of resamples" in result.stdout
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    difference = comparison["second_minus_first"]["bleu_4"]
    assert 0 < difference["low"] <= difference["value"] <= difference["high"] and difference["fraction_better"] == 1
    scores = json.loads((tmp_path / "out" / "second" / "results.json").read_text())["scores"]
    assert scores["rouge_l"] == 1 and "novel_captions" not in scores and "endless_captions" not in scores


def test_a_recipe_is_read_and_overridden(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    fields = {**TINY, "epochs": 7, "freeze_encoder": True, "cache_dir": str(tmp_path / "cells"), "max_images": 8}
    recipe.write_text(yaml.safe_dump(fields))
    result = run("train", recipe, "--epochs", 1, "--output-dir", tmp_path / "out", "--encoder_kwargs", "{}")
    assert result.returncode == 0, result.stderr[-2000:]
    used = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert used["epochs"] == 1 and used["freeze_encoder"] is True and used["encoder_kwargs"] == "{}"
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 1
    assert len(list((tmp_path / "cells").glob("*.npy"))) == 2


@pytest.mark.slow
def test_two_processes_train_and_validate_together(tmp_path: Path) -> None:
    """25 images on two processes: an uneven split in training and in validation."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    fields = {**TINY, "max_images": 25, "batch_size": 4, "output_dir": tmp_path}
    result = run("train", *options(**fields), launcher=launcher)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    predictions = read_lines(tmp_path / "predictions.jsonl")
    assert [prediction["index"] for prediction in predictions] == list(range(25))
    assert result.stdout.count("Scores of the best model") == 1


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with Flickr8k's columns in which one photograph of twelve is half a JPEG."""
    folder = tmp_path_factory.mktemp("damaged")
    file = io.BytesIO()
    Image.effect_noise((80, 64), 40).convert("RGB").save(file, "JPEG")
    images = [file.getvalue() if n != 5 else file.getvalue()[:400] for n in range(12)]
    table: dict[str, Any] = {"image": [{"bytes": image, "path": None} for image in images]}
    table |= {"image_id": [f"photo{n}" for n in range(12)], "caption_0": ["a dog"] * 12, "caption_1": ["one dog"] * 12}
    text = Value("string")
    features = Features({"image": ImageFeature(decode=False), "image_id": text, "caption_0": text, "caption_1": text})
    dataset = Dataset.from_dict(table, features=features).cast_column("image", ImageFeature())
    for split in ("train", "validation"):
        dataset.to_parquet(folder / f"{split}.parquet")
    return folder


def test_a_corrupt_image_is_named_and_skipped_on_request(damaged: Path, tmp_path: Path) -> None:
    arguments = options(**{**TINY, "epochs": 1}, dataset=damaged, output_dir=tmp_path)
    refused = run("train", *arguments)
    assert refused.returncode == 2 and "Image 'photo5' can't be read" in refused.stderr.splitlines()[-1]
    skipped = run("train", *arguments, "--skip_broken")
    assert skipped.returncode == 0, skipped.stderr[-2000:]
    assert "photo5" in skipped.stderr and "11 images to train on" in skipped.stderr
    assert skipped.stderr.count(": read as Parquet files") == 1  # both splits are loaded in one call


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["nowhere.yaml"], "No recipe at 'nowhere.yaml'"),
        ("train", ["RECIPE"], "has no known field colour."),
        ("train", ["--zebra", "red"], "There is no option --zebra."),
        ("train", ["--encoder_name", "resnet1001"], "has no model 'resnet1001'"),
        ("train", ["--ema_decay", "1.5"], "ema_decay is 1.5"),
        ("train", ["--reward_epochs", "1", "--reward_samples", "1"], "reward_samples is 1"),
        ("train", ["--dataset", "nowhere/at/all"], "No data set at"),
        ("evaluate", ["."], "holds no model: it has no config.json"),
        ("evaluate", ["a", "b", "c"], "3 systems are given"),
    ],
    ids=[
        "no recipe",
        "unknown field",
        "unknown argument",
        "unknown encoder",
        "decay",
        "samples",
        "no data",
        "no model",
        "three systems",
    ],
)
def test_bad_input_ends_in_one_line(command: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("colour: red\n")
    given = [str(recipe) if argument == "RECIPE" else argument for argument in arguments]
    result = run(command, *given, *(["--output_dir", str(tmp_path)] if command == "train" else []))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
