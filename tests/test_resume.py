"""examples/train.py, killed at a random step and resumed, ends with the bits of the run that was not."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import Program
from safetensors.torch import load_file

# Everything at once that has a state or is drawn: dropout, shuffling, mirrored and augmented images, words of the
# model's own, batch statistics, an average, a schedule, rewards drawn from the model.
RECIPE = {
    "max_images": 30, "epochs": 3, "batch_size": 2, "hidden_size": 16, "embedding_size": 16, "attention_size": 16,
    "max_length": 9, "num_beams": 1, "final_num_beams": 1, "ema_decay": 0.9, "mirror": True, "output_dropout": 0.3,
    "memory_dropout": 0.2, "embedding_dropout": 0.2, "data_config": "{input_size: [3, 64, 64]}", "num_threads": 1,
    "checkpoint_minutes": 0.002, "keep_checkpoints": 3, "reward_epochs": 1, "reward_samples": 2,
    "scheduled_sampling": 0.4, "augment": True,
}  # fmt: skip


def start(
    recipe: Path, folder: Path, num_processes: int, *arguments: str, shared_by: str | None = None, **fields: Any
) -> Program:
    script, shared = ("tests/shared_train.py", [shared_by]) if shared_by else ("examples/train.py", [])
    options = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    folder.mkdir(exist_ok=True)
    command = [*shared, recipe, "--output_dir", folder, *arguments, *options]
    return Program(script, command, folder.with_suffix(".out"), num_processes=num_processes)


def wait_for_step(process: Program, folder: Path, step: int) -> None:
    """Until this many steps and a bit are done, as far as checkpoints tell."""
    deadline = time.monotonic() + 400
    while not process.is_over and time.monotonic() < deadline:
        done = 0
        for path in (folder / "checkpoints").glob("[0-9]*/progress.json"):
            try:
                progress = json.loads(path.read_text())
            except (OSError, ValueError):
                continue  # deleted just now
            fields = yaml.safe_load((folder / "recipe.yaml").read_text())
            epochs = progress["stage"] * fields["epochs"] + progress["epoch"]
            done = max(done, epochs * 15 + progress["step"])
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
    """A run by one process that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    start(recipe, folder, 1).finish()
    return folder


def assert_same(found: Path, expected: Path) -> None:
    """The best model's bits, those of the last state, and the log but for its seconds."""
    last = [max((folder / "checkpoints").glob("[0-9]*")) for folder in (found, expected)]
    files: Sequence[tuple[Path, Path]] = [
        (found / "model.safetensors", expected / "model.safetensors"),
        *((last[0] / name, last[1] / name) for name in ("model.safetensors", "average.safetensors")),
    ]
    for one, other in files:
        tensors, others = load_file(one), load_file(other)
        assert tensors.keys() == others.keys() and len(tensors) > 20
        assert [name for name in tensors if not tensors[name].equal(others[name])] == []
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (found, expected)
    ]
    timed = {"train_seconds", "validation_seconds", "captions_per_second"}
    plain = [[{name: row[name] for name in row.keys() - timed} for row in log] for log in logs]
    assert plain[0] == plain[1] and len(plain[0]) == 4


@pytest.mark.slow
def test_killed_and_resumed(recipe: Path, whole: Path, tmp_path: Path) -> None:
    steps = random.Random(1).sample(range(3, 55), 2)
    for arguments, step in zip(((), ("--resume",)), sorted(steps), strict=True):
        process = start(recipe, tmp_path, 1, *arguments)
        wait_for_step(process, tmp_path, step)
        process.send(signal.SIGKILL)
        process.finish(-signal.SIGKILL)
    assert "Going on from" in start(recipe, tmp_path, 1, "--resume").finish()
    assert_same(tmp_path, whole)


@pytest.mark.slow
def test_stopped_by_signals_and_resumed(recipe: Path, whole: Path, tmp_path: Path) -> None:
    said = ""
    for arguments, step, number in (((), 10, signal.SIGTERM), (("--resume",), 30, signal.SIGINT)):
        fields = {"checkpoint_minutes": 0.0} if number == signal.SIGINT else {"num_workers": 2}
        process = start(recipe, tmp_path, 1, *arguments, **fields)
        wait_for_step(process, tmp_path, step)
        process.send(number)
        said = process.finish(128 + number)
        assert f"Stopped by {number.name}. The state is saved. Go on with the same command and --resume." in said
        assert "Traceback" not in said
    refused = start(recipe, tmp_path, 1).finish(2)
    assert "holds a run that is not over" in refused and "Go on with --resume" in refused
    refused = start(recipe, tmp_path, 1, "--resume", learning_rate=0.5).finish(2)
    assert "can't go on exactly: learning_rate was 0.002 and is now 0.5" in refused
    start(recipe, tmp_path, 1, "--resume", num_workers=1).finish()
    assert_same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"mixed_precision": "bf16", "num_workers": 2},
        {"shared_by": "fsdp"},
        {"shared_by": "deepspeed"},
    ],
    ids=["bf16 and readers", "fsdp", "deepspeed"],
)
def test_two_processes_killed_and_resumed(recipe: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    if fields.get("shared_by") == "deepspeed":
        pytest.importorskip("deepspeed")
    start(recipe, tmp_path / "whole", 2, batch_size=1, **fields).finish()
    process = start(recipe, tmp_path / "killed", 2, batch_size=1, **fields)
    wait_for_step(process, tmp_path / "killed", random.Random(2).randrange(3, 55))
    process.send(signal.SIGKILL)
    process.finish(-signal.SIGKILL)
    refused = start(recipe, tmp_path / "killed", 1, "--resume", batch_size=1, **fields).finish(2)
    assert "number of processes was 2 and is now 1" in refused
    start(recipe, tmp_path / "killed", 2, "--resume", batch_size=1, **fields).finish()
    assert_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_nothing_to_resume_is_said(recipe: Path, tmp_path: Path) -> None:
    said = start(recipe, tmp_path, 1, "--resume", epochs=1, reward_epochs=0, max_images=8).finish()
    assert f"No checkpoint in {str(tmp_path)!r} to go on from: the training begins." in said
    assert (
        "Scores of the best model"
        in start(recipe, tmp_path, 1, "--resume", epochs=1, reward_epochs=0, max_images=8).finish()
    )
