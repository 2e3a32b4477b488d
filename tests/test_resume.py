"""examples/train.py, killed at a random step and resumed, ends with the bits of an uninterrupted run."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import Program
from safetensors.torch import load_file

# Everything that has a state or is random: dropout, shuffling, mirrored and augmented images, sampled words, batch
# statistics, an average of weights, a schedule, and sampled captions with their rewards.
RECIPE = {
    "max_images": 30, "epochs": 3, "batch_size": 2, "hidden_size": 16, "embedding_size": 16, "attention_size": 16,
    "max_length": 9, "num_beams": 1, "final_num_beams": 1, "ema_decay": 0.9, "mirror": True, "output_dropout": 0.3,
    "memory_dropout": 0.2, "embedding_dropout": 0.2, "data_config": "{input_size: [3, 64, 64]}", "num_threads": 1,
    "checkpoint_minutes": 0.002, "keep_checkpoints": 3, "reward_epochs": 1, "reward_samples": 2,
    "scheduled_sampling": 0.4, "augment": True,
}  # fmt: skip
STEPS_PER_EPOCH = 15


def start(recipe: Path, folder: Path, *arguments: str, num_processes: int = 1, **fields: Any) -> Program:
    """Start a training with this output folder; its messages go to a file beside the folder."""
    options = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    folder.mkdir(exist_ok=True)
    command = [recipe, "--output_dir", folder, *arguments, *options]
    return Program("examples/train.py", command, folder.with_suffix(".out"), num_processes=num_processes)


def wait_for_step(process: Program, folder: Path, step: int) -> None:
    """Wait until a checkpoint shows that this many optimizer steps are done."""
    deadline = time.monotonic() + 400
    while not process.is_over and time.monotonic() < deadline:
        done = 0
        for path in (folder / "checkpoints").glob("[0-9]*/progress.json"):
            try:
                progress = json.loads(path.read_text())
            except (OSError, ValueError):
                continue  # The training has just deleted this checkpoint.
            epochs = progress["stage"] * RECIPE["epochs"] + progress["epoch"]
            done = max(done, epochs * STEPS_PER_EPOCH + progress["step"])
        if done >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} was not reached: {process.output.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return file


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of an uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("whole")
    start(recipe, folder).finish()
    return folder


def assert_same(found: Path, expected: Path) -> None:
    """Compare the weights of the best model and of the last checkpoint, and the logs without their times."""
    ends = [max((folder / "checkpoints").glob("[0-9]*")) for folder in (found, expected)]
    files = [(found / "model.safetensors", expected / "model.safetensors")]
    files += [(ends[0] / name, ends[1] / name) for name in ("model.safetensors", "average.safetensors")]
    for one, other in files:
        tensors, others = load_file(one), load_file(other)
        assert tensors.keys() == others.keys() and len(tensors) > 20
        assert [name for name in tensors if not tensors[name].equal(others[name])] == []
    times = {"train_seconds", "validation_seconds", "captions_per_second"}
    logs = [
        [
            {name: value for name, value in json.loads(line).items() if name not in times}
            for line in (folder / "log.jsonl").read_text().splitlines()
        ]
        for folder in (found, expected)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4


@pytest.mark.slow
def test_killed_and_resumed(recipe: Path, whole: Path, tmp_path: Path) -> None:
    steps = random.Random(1).sample(range(3, 55), 2)
    for arguments, step in zip(((), ("--resume",)), sorted(steps), strict=True):
        process = start(recipe, tmp_path, *arguments)
        wait_for_step(process, tmp_path, step)
        process.send(signal.SIGKILL)
        process.finish(-signal.SIGKILL)
    assert "Going on from" in start(recipe, tmp_path, "--resume").finish()
    assert_same(tmp_path, whole)


@pytest.mark.slow
def test_stopped_by_signals_and_resumed(recipe: Path, whole: Path, tmp_path: Path) -> None:
    for arguments, step, number in (((), 10, signal.SIGTERM), (("--resume",), 30, signal.SIGINT)):
        fields = {"checkpoint_minutes": 0.0} if number == signal.SIGINT else {"num_workers": 2}
        process = start(recipe, tmp_path, *arguments, **fields)
        wait_for_step(process, tmp_path, step)
        process.send(number)
        output = process.finish(128 + number)
        assert f"Stopped by {number.name}. The state is saved. Go on with the same command and --resume." in output
        assert "Traceback" not in output
    refused = start(recipe, tmp_path).finish(2)
    assert "holds an unfinished run" in refused and "Go on with --resume" in refused
    refused = start(recipe, tmp_path, "--resume", learning_rate=0.5).finish(2)
    assert "can't be resumed exactly: learning_rate was 0.002 and is now 0.5" in refused
    start(recipe, tmp_path, "--resume", num_workers=1).finish()
    assert_same(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_killed_and_resumed(recipe: Path, tmp_path: Path) -> None:
    fields = {"batch_size": 1, "mixed_precision": "bf16", "num_workers": 2}
    start(recipe, tmp_path / "whole", num_processes=2, **fields).finish()
    process = start(recipe, tmp_path / "killed", num_processes=2, **fields)
    wait_for_step(process, tmp_path / "killed", random.Random(2).randrange(3, 55))
    process.send(signal.SIGKILL)
    process.finish(-signal.SIGKILL)
    refused = start(recipe, tmp_path / "killed", "--resume", **fields).finish(2)
    assert "number of processes was 2 and is now 1" in refused
    start(recipe, tmp_path / "killed", "--resume", num_processes=2, **fields).finish()
    assert_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_resume_without_a_checkpoint_begins(recipe: Path, tmp_path: Path) -> None:
    """Resumed after its end, the run only reports its scores again."""
    fields = {"epochs": 1, "reward_epochs": 0, "max_images": 8}
    begun = start(recipe, tmp_path, "--resume", **fields).finish()
    assert f"No checkpoint in {str(tmp_path)!r} to resume from: the training begins." in begun
    again = start(recipe, tmp_path, "--resume", **fields).finish()
    assert "Scores of the best model" in again and "Epoch  1/1" not in again
