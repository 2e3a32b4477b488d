"""Checkpoints on disk are complete or absent, whatever interrupts their writing."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_captioner.files import replace_files
from hf_captioner.training import checkpoints as module
from hf_captioner.training.checkpoints import Checkpoint, Checkpoints, random_state, restore_random_state


def small(value: float) -> nn.Module:
    """Build a module with weights, a buffer and tied weights."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    nn.init.constant_(model[0].weight, value)
    nn.init.constant_(model[1].running_mean, value)
    return model


def save(checkpoints: Checkpoints, value: float) -> Path:
    return checkpoints.save({"model": small(value)}, {"value": torch.tensor(value)}, {"step": value})


def test_a_checkpoint_restores_weights_and_values(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    save(checkpoints, 1.0)
    save(checkpoints, 2.0)
    checkpoint = checkpoints.newest()
    assert checkpoint is not None and checkpoint.progress == {"step": 2.0}
    assert checkpoint.tensors()["value"].item() == 2.0
    model = small(0.0)
    checkpoint.load_weights("model", model)
    assert all(
        torch.equal(x, y) for x, y in zip(model.state_dict().values(), small(2.0).state_dict().values(), strict=True)
    )
    assert model[0].weight is model[2].weight


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for value in range(4):
        save(checkpoints, float(value))
    assert sorted(os.listdir(tmp_path)) == ["000003", "000004"]
    checkpoints.clear()
    assert not os.listdir(tmp_path)
    with pytest.raises(ValueError, match="keep_checkpoints is 0"):
        Checkpoints(tmp_path, keep=0)


class Cut(BaseException):
    """Stands for the end of the process: no handler of errors runs."""


def cut_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> list[int]:
    """Let the number-th call that changes the disk raise, with half a file written; return the count of calls."""
    count = [0]

    def counted(call: Any) -> Any:
        def run(*arguments: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                if call is write:
                    path, data = arguments
                    path.write_bytes(data[: len(data) // 2])
                raise error
            return call(*arguments, **kwargs)

        return run

    write = module._write
    monkeypatch.setattr(module, "_write", counted(write))
    monkeypatch.setattr(module, "sync", counted(module.sync))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(module.shutil, "rmtree", counted(module.shutil.rmtree))
    return count


def test_an_interruption_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        checkpoints = Checkpoints(tmp_path / "counted", keep=1)
        save(checkpoints, 1.0)
        count = cut_at(patch, -1, Cut())
        save(checkpoints, 2.0)
    assert count[0] >= 8
    for number in range(1, count[0] + 1):
        checkpoints = Checkpoints(tmp_path / str(number), keep=1)
        save(checkpoints, 1.0)
        with pytest.MonkeyPatch.context() as patch:
            cut_at(patch, number, Cut())
            with pytest.raises(Cut):
                save(checkpoints, 2.0)
        checkpoint = Checkpoints(tmp_path / str(number)).newest()
        assert checkpoint is not None
        restored = small(0.0)
        checkpoint.load_weights("model", restored)
        assert restored[0].weight[0, 0].item() == checkpoint.progress["step"] == checkpoint.tensors()["value"].item()
        save(checkpoints, 3.0)
        assert sorted(path.name for path in (tmp_path / str(number)).iterdir()) == [checkpoints.paths()[-1].name]


def test_a_full_disk_is_reported_and_earlier_checkpoints_remain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    good = save(checkpoints, 1.0)
    cut_at(monkeypatch, 2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(OSError, match=r"No space left on device. Make room.*000001.*--resume"):
        save(checkpoints, 2.0)
    assert os.listdir(tmp_path) == [good.name] and Checkpoint(good).progress == {"step": 1.0}


@pytest.mark.parametrize("damage", ["cut", "missing", "changed"])
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "progress.json", "contents.json"])
def test_a_damaged_checkpoint_is_reported_and_skipped(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    good, bad = save(checkpoints, 1.0), save(checkpoints, 2.0)
    data = bytearray((bad / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bad / name).unlink()
    if damage != "missing":
        (bad / name).write_bytes(data if damage == "changed" else data[:-1])
    checkpoint = checkpoints.newest()
    assert checkpoint is not None and checkpoint.path == good
    assert len(caplog.messages) == 1 and str(bad) in caplog.messages[0] and "damaged" in caplog.messages[0]
    (good / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"No checkpoint in .* can be read"):
        checkpoints.newest()


def test_random_generators_continue_where_they_were() -> None:
    def draw() -> tuple[Any, ...]:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()

    device = torch.device("cpu")
    draw()
    state = random_state(device)
    expected = [draw() for _ in range(3)]
    restore_random_state(state, device)
    assert [draw() for _ in range(3)] == expected


def test_files_are_replaced_when_all_are_complete(tmp_path: Path) -> None:
    def write(text: str, then: Exception | None = None) -> Any:
        def run(folder: Path) -> None:
            for name in ("a", "b"):
                (folder / name).write_text(text)
                if then is not None:
                    raise then

        return run

    replace_files(tmp_path, write("one"))
    with pytest.raises(OSError, match=r"No space left on device"):
        replace_files(tmp_path, write("two", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "one", "b": "one"}
    replace_files(tmp_path, write("three"))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "three", "b": "three"}
