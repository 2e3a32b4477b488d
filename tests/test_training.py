"""A run goes on where it was, whatever ended it, and is the same on any number of processes."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from processes import Program
from tiny_run import Tiny
from torch.utils.data import DataLoader

from hf_captioner.data.loading import StepSampler
from hf_captioner.interruption import Interrupted, Interruption
from hf_captioner.model.objectives import attention_entropy, cross_entropy, doubly_stochastic, reinforce, self_critical
from hf_captioner.training.accelerator import build_accelerator, precision_here
from hf_captioner.training.checkpoints import Checkpoint
from hf_captioner.training.steps import DeepSpeedSteps, FsdpSteps


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path]:
    """A run of two stages that nothing interrupted, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny = Tiny(reward_epochs=2, folder=folder)
    tiny.train()
    return tiny, folder


def test_a_run_resumed_at_any_step_ends_with_the_same_bits(whole: tuple[Tiny, Path]) -> None:
    tiny, folder = whole
    paths = sorted(folder.iterdir())
    assert len(paths) == 2 + 5 * tiny.loader.num_steps  # stages and steps
    for path in np.random.default_rng(0).choice(paths, 4, replace=False):
        resumed = Tiny(reward_epochs=2)
        torch.rand(7)  # whatever was drawn before
        resumed.run.restore(Checkpoint(path))
        resumed.train()
        assert_same(resumed.weights(), tiny.weights())
        assert [record["stage"] for record in resumed.run.progress.log] == ["Epoch"] * 3 + ["Rewards"] * 2
        for found, expected in zip(resumed.run.progress.log, tiny.run.progress.log, strict=True):
            name = "loss" if found["stage"] == "Epoch" else "reward"
            assert found[name] == expected[name] and found["learning_rate"] == expected["learning_rate"]


def test_another_seed_of_dropout_would_be_noticed(whole: tuple[Tiny, Path]) -> None:
    tiny, folder = whole
    resumed = Tiny(reward_epochs=2)
    resumed.run.restore(Checkpoint(sorted(folder.iterdir())[5]))
    torch.manual_seed(1)
    resumed.train()
    assert not torch.equal(resumed.weights()["decoder.output.weight"], tiny.weights()["decoder.output.weight"])


def test_readers_change_nothing(whole: tuple[Tiny, Path]) -> None:
    tiny, folder = whole
    resumed = Tiny(reward_epochs=2, num_workers=2)
    resumed.run.restore(Checkpoint(sorted(folder.iterdir())[-4]))
    resumed.train()
    assert_same(resumed.weights(), tiny.weights())


def test_another_run_is_refused_by_what_differs(whole: tuple[Tiny, Path]) -> None:
    _, folder = whole
    with pytest.raises(ValueError, match="epochs was 3 and is now 4"):
        Tiny(epochs=4).run.restore(Checkpoint(min(folder.iterdir())))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_stops(whole: tuple[Tiny, Path], number: int, tmp_path: Path) -> None:
    tiny, _ = whole
    with Interruption() as interruption:
        stopped = Tiny(reward_epochs=2, folder=tmp_path, interruption=interruption)
        stopped.run.minutes = 1e9
        prepare, count = stopped.run.stages[0].objective.prepare, [0]

        def interrupt(batch: Any, share: float) -> Any:
            count[0] += 1
            if count[0] == 10:
                os.kill(os.getpid(), number)
            return prepare(batch, share)

        stopped.run.stages[0].objective.prepare = interrupt  # type: ignore[method-assign]
        with pytest.raises(
            Interrupted, match=rf"{signal.Signals(number).name}. The state is saved. Go on with .*--resume"
        ):
            stopped.train()
    assert stopped.run.progress.epoch * tiny.loader.num_steps + stopped.run.progress.step == 10
    resumed = Tiny(reward_epochs=2)
    resumed.run.restore(Checkpoint(max(tmp_path.iterdir())))
    resumed.train()
    assert_same(resumed.weights(), tiny.weights())


def test_a_signal_while_nothing_is_at_stake_stops_at_once() -> None:
    with Interruption(), pytest.raises(Interrupted, match="Stopped before the training began"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_loss_that_is_no_number_is_refused_before_it_does_harm(tmp_path: Path) -> None:
    tiny = Tiny(folder=tmp_path)
    tiny.cells[:, 11] = np.nan
    with pytest.raises(FloatingPointError, match=r"The loss is nan .* step \d of Epoch 1.* last good state is '.*\d'"):
        tiny.train()
    assert all(tensor.isfinite().all() for tensor in tiny.weights().values())
    tiny.run.restore(Checkpoint(max(tmp_path.iterdir())))
    assert all(tensor.isfinite().all() for tensor in tiny.weights().values())


def test_a_reader_that_dies_is_named(tmp_path: Path) -> None:
    tiny = Tiny(folder=tmp_path, num_workers=1)
    collate, parent = tiny.loader.loader.collate_fn, os.getpid()

    def die(rows: Any) -> Any:
        if any(row["index"] == 11 for row in rows) and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return collate(rows)

    tiny.loader.loader.collate_fn = die
    with pytest.raises(ChildProcessError, match=r"reads images died: .*lower num_workers.*--resume"):
        tiny.train()
    assert Checkpoint(max(tmp_path.iterdir())).progress["epoch"] == 0


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_a_reader_that_hangs_up_before_it_is_seen_to_be_dead_is_named_too(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_up(loader: DataLoader[Any]) -> Any:
        raise error

    tiny = Tiny(num_workers=1)
    monkeypatch.setattr(DataLoader, "__iter__", hang_up)
    with pytest.raises(ChildProcessError, match="reads images died"):
        tiny.train()


@pytest.mark.parametrize(
    ("error", "num_workers"),
    [
        (RuntimeError("no image"), 1),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "no image"), 1),  # torch makes a RuntimeError of it
        (ConnectionError("no image"), 1),
        (ConnectionError("no image"), 0),
    ],
)
def test_what_is_raised_while_images_are_read_is_not_taken_for_a_death(error: Exception, num_workers: int) -> None:
    def fail(rows: Any) -> Any:
        raise error

    tiny = Tiny(num_workers=num_workers)
    tiny.loader.loader.collate_fn = fail
    with pytest.raises((type(error), RuntimeError), match="no image"):
        tiny.train()


@pytest.mark.parametrize(("num_images", "batch_size"), [(27, 4), (3, 1), (4, 16), (100, 7), (13, 2)])
def test_every_image_is_shown_once_an_epoch(num_images: int, batch_size: int) -> None:
    shapes = {"one": (1, 1), "two": (2, 1), "accumulated": (1, 2)}
    steps = {}
    for name, (num_processes, accumulation) in shapes.items():
        parts = []
        for process in range(num_processes):
            sampler = StepSampler(
                num_images, batch_size * (2 if name == "one" else 1), seed=1, num_processes=num_processes,
                process=process, accumulation=accumulation,
            )  # fmt: skip
            sampler.start_at(2, 0)
            parts.append(list(sampler))
            assert len(parts[-1]) == len(sampler) == sampler.num_steps * accumulation and all(parts[-1])
            sampler.start_at(2, 1)
            assert list(sampler) == parts[-1][accumulation:]
        shown = Counter(image for part in parts for batch in part for _, image in batch)
        assert shown == Counter(range(num_images))
        if name != "accumulated":
            steps[name] = [sorted(chain(*batches)) for batches in zip(*parts, strict=True)]
        sampler.start_at(3, 0)
        assert list(sampler) != parts[-1] or num_images < 5
    assert steps["one"] == steps["two"] or num_images < 4


def test_more_processes_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images can't be dealt out to 2 processes with 2 steps"):
        StepSampler(3, 1, seed=0, num_processes=2, accumulation=2)


def test_losses_of_parts_add_up() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 9, (6, 5))
    for caption, length in enumerate((5, 1, 3, 2, 5, 4)):
        labels[caption, length:] = -100
    logits, weights = torch.randn(6, 5, 9), torch.rand(6, 5, 4)
    scores, log_probs, advantages = -torch.rand(6, 5), -torch.rand(6, 5), torch.randn(6)
    words, captions = (labels != -100).sum().item(), 6
    losses = [
        lambda rows, n, _: cross_entropy(logits[rows], labels[rows], 0.1, n),
        lambda rows, _, n: doubly_stochastic(weights[rows], labels[rows], "sum", n),
        lambda rows, n, _: reinforce(scores[rows], log_probs[rows], labels[rows], 0.3, n),
        lambda rows, n, _: attention_entropy(weights[rows], labels[rows], n),
        lambda rows, n, _: self_critical(logits[rows], labels[rows], advantages[rows], n),
    ]
    for loss in losses:
        parts = loss(slice(0, 2), words, captions) + loss(slice(2, 6), words, captions)
        assert torch.allclose(parts, loss(slice(0, 6), None, None), atol=1e-6)


def launch(out: Path, num_processes: int, **fields: Any) -> dict[str, Any]:
    options = [word for name, value in fields.items() for word in (f"--{name}", str(value)) if value is not True]
    options += [f"--{name}" for name, value in fields.items() if value is True]
    Program("tests/tiny_run.py", [out, *options], out.with_suffix(".txt"), num_processes=num_processes).finish()
    return json.loads(out.read_text())


def test_processes_and_accumulation_change_nothing(tmp_path: Path) -> None:
    """27 images in steps of 8: no part of a step is as large as another, nor has as many words."""
    one = launch(tmp_path / "one.json", 1, batch_size=8)
    two = launch(tmp_path / "two.json", 2, batch_size=4)
    accumulated = launch(tmp_path / "accumulated.json", 1, batch_size=4, accumulation=2)
    sharded = launch(tmp_path / "sharded.json", 2, batch_size=4, shared_by="fsdp")
    assert (one["num_processes"], two["num_processes"], one["steps"]) == (1, 2, 4)
    assert sharded["held"] == pytest.approx(one["held"] / 2, rel=0.1) and two["held"] == one["held"]
    assert one["losses"][-1] < one["losses"][0] - 0.5 and len(one["losses"]) == 20
    assert len(set(one["captions"])) > 3
    for other in (two, accumulated, sharded):
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-5, rel=0)
        assert other["captions"] == one["captions"] and other["scores"] == one["scores"]
        assert other["shown"] == one["shown"]


@pytest.mark.slow
def test_deepspeed_changes_nothing_and_shares_the_state(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    one = launch(tmp_path / "one.json", 1, batch_size=8)
    for name, fields in {"shared": {"batch_size": 4}, "accumulated": {"batch_size": 2, "accumulation": 2}}.items():
        other = launch(tmp_path / f"{name}.json", 2, shared_by="deepspeed", **fields)
        assert other["held"] == pytest.approx(one["held"] / 2, rel=0.1)
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-5, rel=0)
        assert other["captions"] == one["captions"] and other["scores"] == one["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("shared_by", ["fsdp", "deepspeed"])
def test_bfloat16_rounds_the_same_however_training_is_shared_out(shared_by: str, tmp_path: Path) -> None:
    """Products alone: not weights, gradients or losses, which FSDP and DeepSpeed would."""
    if shared_by == "deepspeed":
        pytest.importorskip("deepspeed")
    single = launch(tmp_path / "single.json", 2, batch_size=4)
    half = launch(tmp_path / "half.json", 2, batch_size=4, mixed_precision="bf16")
    shared = launch(tmp_path / "shared.json", 2, batch_size=4, mixed_precision="bf16", shared_by=shared_by)
    assert shared["losses"] == pytest.approx(half["losses"], abs=1e-5, rel=0)
    assert half["losses"] != pytest.approx(single["losses"], abs=1e-4, rel=0)
    assert shared["held"] == pytest.approx(half["held"] / 2, rel=0.1)


def accelerator_with(**plugins: Any) -> Any:
    precision = plugins.pop("mixed_precision", "no")
    return SimpleNamespace(state=SimpleNamespace(**plugins), mixed_precision=precision)


def test_the_first_fsdp_is_refused() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ValueError, match=r"FSDP version 1.* set fsdp_version to 2"):
        FsdpSteps.configure(accelerator_with(fsdp_plugin=plugin))


@pytest.mark.parametrize(
    ("stage", "mixed_precision", "message"),
    [(0, "no", "stage 0 of .*ZeRO; choose 1 or 2"), (3, "no", "stage 3"), (2, "fp16", "'fp16': it would round")],
)
def test_other_uses_of_deepspeed_are_refused(stage: int, mixed_precision: str, message: str) -> None:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}})
    with pytest.raises(ValueError, match=message):
        DeepSpeedSteps.configure(accelerator_with(deepspeed_plugin=plugin, mixed_precision=mixed_precision))


@pytest.mark.parametrize("has_instructions", [True, False])
def test_bfloat16_is_for_processors_that_have_it(has_instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_instructions)
    assert precision_here("bf16") == ("bf16" if has_instructions else "no")
    assert (precision_here("no"), precision_here("fp16")) == ("no", "fp16")


def test_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MEGATRON_LM)
    with pytest.raises(ValueError, match="Megatron-LM, which trains its own models only"):
        build_accelerator("no", 1)
