"""A run resumes exactly, whatever ended it, and is the same on any number of processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from processes import Program
from tiny_run import Tiny
from torch.utils.data import DataLoader

from hf_captioner import CaptionerModel
from hf_captioner.data.loading import StepSampler
from hf_captioner.interruption import Interrupted, Interruption
from hf_captioner.model.objectives import attention_entropy, cross_entropy, doubly_stochastic, reinforce, self_critical
from hf_captioner.training import checkpoints as checkpoints_module
from hf_captioner.training.accelerator import build_accelerator, supported_precision
from hf_captioner.training.checkpoints import Checkpoint
from hf_captioner.training.run import refuse_other_settings


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path]:
    """A run of two stages that nothing interrupted, and its folder with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny = Tiny(reward_epochs=2, folder=folder)
    tiny.train()
    return tiny, folder


def resume(path: Path, **kwargs: Any) -> Tiny:
    """Restore the whole run from a checkpoint."""
    tiny = Tiny(reward_epochs=2, **kwargs)
    torch.rand(7)  # Random numbers drawn before do not matter.
    tiny.run.restore(Checkpoint(path))
    return tiny


def test_resumed_at_any_step_a_run_ends_with_the_same_bits(whole: tuple[Tiny, Path]) -> None:
    tiny, folder = whole
    paths = sorted(folder.iterdir())
    assert len(paths) == 2 + 5 * tiny.loader.num_steps + 1  # starts of stages, steps, the end
    chosen = [*np.random.default_rng(0).choice(paths, 3, replace=False), paths[-1]]
    for path, num_workers in zip(chosen, (0, 2, 0, 0), strict=True):  # workers that read images change nothing
        resumed = resume(path, num_workers=num_workers)
        resumed.train()
        assert_same(resumed.weights(), tiny.weights())
        assert [record["stage"] for record in resumed.run.progress.log] == ["Epoch"] * 3 + ["Rewards"] * 2
        for found, expected in zip(resumed.run.progress.log, tiny.run.progress.log, strict=True):
            name = "loss" if found["stage"] == "Epoch" else "reward"
            assert found[name] == expected[name] and found["learning_rate"] == expected["learning_rate"]


def test_another_seed_of_dropout_would_be_noticed(whole: tuple[Tiny, Path]) -> None:
    tiny, folder = whole
    resumed = resume(sorted(folder.iterdir())[5])
    torch.manual_seed(1)
    resumed.train()
    assert not torch.equal(resumed.weights()["decoder.output.weight"], tiny.weights()["decoder.output.weight"])


def test_other_settings_are_refused_by_name(whole: tuple[Tiny, Path]) -> None:
    with pytest.raises(ValueError, match="epochs was 3 and is now 4"):
        Tiny(epochs=4).run.restore(Checkpoint(min(whole[1].iterdir())))


def test_other_data_is_refused_by_name_and_data_unknown_to_a_checkpoint_is_told(caplog: Any) -> None:
    saved = {"epochs": 3, "digest of the training captions": "a", "digest of the training images": "b"}
    refuse_other_settings(saved, saved)
    with pytest.raises(ValueError, match=r"can't be resumed exactly: the training captions have changed\. Give"):
        refuse_other_settings(saved, saved | {"digest of the training captions": "c"})
    assert not caplog.messages
    refuse_other_settings({"epochs": 3}, saved)  # of version 0.1.0
    assert caplog.messages == [caplog.messages[0]] and "does not tell its data" in caplog.messages[0]
    with pytest.raises(ValueError, match="epochs was 4 and is now 3"):
        refuse_other_settings({"epochs": 4}, saved)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("contents.json", "[]"), ("contents.json", "{}"), ("contents.json", "\0"), ("progress.json", "[]"),
        ("progress.json", '{"facts": {"epochs": 3}, "stage": "x"}'), ("progress.json", "null"),
        ("state.pt", "x"), ("model.safetensors", "x"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_wrong_content_is_refused_in_one_line(
    whole: tuple[Tiny, Path], name: str, content: str, tmp_path: Path
) -> None:
    path = tmp_path / "000001"
    shutil.copytree(min(whole[1].iterdir()), path)
    (path / name).write_text(content)
    if name != "contents.json":  # which agrees with it, as if someone had meant it
        contents = json.loads((path / "contents.json").read_text())
        contents[name] = checkpoints_module._digest(content.encode())
        (path / "contents.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=rf"^The checkpoint '{path}' is damaged: [^\n]*$"):
        resume(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_stops(whole: tuple[Tiny, Path], number: int, tmp_path: Path) -> None:
    tiny, _ = whole
    with Interruption() as interruption:
        stopped = Tiny(reward_epochs=2, folder=tmp_path, interruption=interruption)
        stopped.run.checkpoint_minutes = 1e9
        prepare, count = stopped.run.stages[0].objective.prepare, [0]

        def interrupt(batch: Any, progress: float) -> Any:
            count[0] += 1
            if count[0] == 10:
                os.kill(os.getpid(), number)
            return prepare(batch, progress)

        stopped.run.stages[0].objective.prepare = interrupt  # type: ignore[method-assign]
        message = rf"{signal.Signals(number).name}. The state is saved. Go on with .*--resume"
        with pytest.raises(Interrupted, match=message):
            stopped.train()
    assert stopped.run.progress.epoch * tiny.loader.num_steps + stopped.run.progress.step == 10
    resumed = resume(max(tmp_path.iterdir()))
    resumed.train()
    assert_same(resumed.weights(), tiny.weights())


def test_a_signal_outside_of_training_stops_at_once() -> None:
    with Interruption(), pytest.raises(Interrupted, match="Stopped before the training began"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_loss_that_is_nan_does_not_reach_the_weights(tmp_path: Path) -> None:
    tiny = Tiny(folder=tmp_path)
    tiny.cells[:, 11] = np.nan
    with pytest.raises(FloatingPointError, match=r"The loss is nan .* step \d of Epoch 1.* last good state is '.*\d'"):
        tiny.train()
    assert all(tensor.isfinite().all() for tensor in tiny.weights().values())
    tiny.run.restore(Checkpoint(max(tmp_path.iterdir())))
    assert all(tensor.isfinite().all() for tensor in tiny.weights().values())


def test_the_death_of_a_worker_is_reported(tmp_path: Path) -> None:
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
def test_a_broken_connection_to_a_worker_counts_as_its_death(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
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
        (UnicodeDecodeError("utf-8", b"", 0, 1, "no image"), 1),  # torch turns it into a RuntimeError
        (ConnectionError("no image"), 1),
        (ConnectionError("no image"), 0),
    ],
)
def test_an_error_of_reading_images_is_not_taken_for_a_death(error: Exception, num_workers: int) -> None:
    def fail(rows: Any) -> Any:
        raise error

    tiny = Tiny(num_workers=num_workers)
    tiny.loader.loader.collate_fn = fail
    with pytest.raises((type(error), RuntimeError), match="no image") as raised:
        tiny.train()
    assert "\n" not in str(raised.value)  # as the worker's traceback has it


@pytest.mark.parametrize(("num_images", "batch_size"), [(27, 4), (3, 1), (4, 16), (100, 7), (13, 2)])
def test_an_epoch_shows_every_image_once(num_images: int, batch_size: int) -> None:
    """One process with large batches, two processes, and two accumulated batches have the same optimizer steps."""
    steps = {}
    for name, (num_processes, accumulation) in {"one": (1, 1), "two": (2, 1), "accumulated": (1, 2)}.items():
        size = batch_size * (2 if name == "one" else 1)
        parts = []
        for process in range(num_processes):
            sampler = StepSampler(
                num_images, size, seed=1, num_processes=num_processes, process=process, accumulation=accumulation
            )
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
    with pytest.raises(ValueError, match=r"3 images .* 2 processes with 2 steps"):
        StepSampler(3, 1, seed=0, num_processes=2, accumulation=2)


def test_losses_of_parts_of_a_batch_add_up() -> None:
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
    """Run tiny_run.py in processes of its own, and return its results."""
    options = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    Program("tests/tiny_run.py", [out, *options], out.with_suffix(".txt"), num_processes=num_processes).finish()
    return json.loads(out.read_text())


def test_processes_and_accumulation_change_nothing(tmp_path: Path) -> None:
    """27 images in steps of 8, so that the parts of a step differ in their numbers of images and words."""
    one = launch(tmp_path / "one.json", 1, batch_size=8)
    two = launch(tmp_path / "two.json", 2, batch_size=4)
    accumulated = launch(tmp_path / "accumulated.json", 1, batch_size=4, accumulation=2)
    assert (one["num_processes"], two["num_processes"], one["steps"]) == (1, 2, 4)
    assert one["losses"][-1] < one["losses"][0] - 0.5 and len(one["losses"]) == 20
    assert len(set(one["captions"])) > 3
    for other in (two, accumulated):
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-5, rel=0)
        assert other["captions"] == one["captions"] and other["scores"] == one["scores"]
        assert other["num_captions"] == one["num_captions"]


@pytest.mark.slow
def test_bfloat16_rounds_products(tmp_path: Path) -> None:
    single = launch(tmp_path / "single.json", 2, batch_size=4)
    half = launch(tmp_path / "half.json", 2, batch_size=4, mixed_precision="bf16")
    assert half["losses"] == pytest.approx(single["losses"], abs=0.1, rel=0)
    if supported_precision("bf16") == "bf16":
        assert half["losses"] != pytest.approx(single["losses"], abs=1e-4, rel=0)


@pytest.mark.parametrize("has_instructions", [True, False])
def test_bfloat16_is_for_processors_that_have_it(has_instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_instructions)
    assert supported_precision("bf16") == ("bf16" if has_instructions else "no")
    assert (supported_precision("no"), supported_precision("fp16")) == ("no", "fp16")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_sharded_training_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[name])
    with pytest.raises(ValueError, match=rf"configured for {name}\. .* trained by DDP: .* transformers' Trainer"):
        build_accelerator("no", 1)


def test_the_plain_loop_trains_and_saves(tmp_path: Path) -> None:
    arguments = ["--output_dir", tmp_path / "captioner", "--num_images", 64, "--epochs", 2]
    output = Program("examples/plain_loop.py", arguments, tmp_path / "output.txt").finish()
    losses = [float(loss) for loss in re.findall(r"epoch \d/2: loss (\S+)", output)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert output.count("(reference: ") == 5 and re.search(r"BLEU-4 \d\.\d+, CIDEr \d+\.\d+", output)
    assert CaptionerModel.from_pretrained(tmp_path / "captioner").config.vocab_size > 20
