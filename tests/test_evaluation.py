from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hf_captioner import CaptionerModel, CaptionerProcessor, load_captions
from hf_captioner.data import open_row, undecoded
from hf_captioner.evaluation import Prediction, collapse_warnings, decode_captions, score_captions

Build = Callable[..., CaptionerModel]


def test_every_image_is_captioned_once_in_order(tiny_model: Build, processor: CaptionerProcessor) -> None:
    rows = undecoded(load_captions("shapes", "test", num_images=7))
    model = tiny_model().train()
    predictions = decode_captions(
        model, processor, rows, Accelerator(cpu=True), batch_size=3, num_beams=2, max_length=6
    )
    assert model.training
    assert [p.image_id for p in predictions] == rows["image_id"][:]
    assert [p.references for p in predictions] == rows["captions"][:]
    model.eval()
    images = processor(images=[open_row(row) for row in rows])["pixel_values"]
    assert [p.caption for p in predictions] == processor.batch_decode(model.generate(images, num_beams=2, max_length=6))
    with torch.no_grad():
        cells = model.encoder(images).last_hidden_state.numpy()
    again = decode_captions(model, processor, rows, Accelerator(cpu=True), cells=cells, num_beams=2, max_length=6)
    assert again == predictions


WORKER = """
import json, sys
from accelerate import Accelerator
from hf_captioner import load_captions
from hf_captioner.cli import load_captioner
from hf_captioner.data import undecoded
from hf_captioner.evaluation import decode_captions, prediction_records
model, processor = load_captioner(sys.argv[1])
accelerator = Accelerator(cpu=True)
rows = undecoded(load_captions("shapes", "test", num_images=7))
predictions = decode_captions(model, processor, rows, accelerator, batch_size=2, num_beams=2, max_length=6)
with open(f"{sys.argv[2]}/{accelerator.num_processes}-{accelerator.process_index}.json", "w") as file:
    json.dump(prediction_records(predictions), file)
"""


def test_two_processes_caption_what_one_does(captioner_folder: Path, tmp_path: Path) -> None:
    """Seven images on two processes: an uneven split, none lost, none twice, and both know all."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launchers = [[sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]]
    for launcher in launchers:
        subprocess.run([*launcher, script, captioner_folder, tmp_path], check=True, capture_output=True, timeout=300)
    alone, first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("1-0", "2-0", "2-1"))
    assert alone == first == second and len(alone) == 7


def prediction(caption: str, ended: bool = True) -> Prediction:
    return Prediction(0, "photo", caption, ended, ["a black dog runs on the beach", "a dog"])


@pytest.mark.parametrize(
    ("predictions", "warnings"),
    [
        ([prediction(f"dog {n}") for n in range(20)], []),
        ([prediction("a dog") for _ in range(20)], ["only 5.0% of them are distinct"]),
        ([prediction(f"dog {n}", ended=n > 5) for n in range(20)], ["30.0% of the captions never reach <end>"]),
        ([prediction("a a a a", ended=False) for _ in range(20)], ["only 5.0%", "100.0% of the captions"]),
    ],
)
def test_collapsed_captions_are_warned_of(predictions: list[Prediction], warnings: list[str]) -> None:
    found = collapse_warnings(score_captions(predictions))
    assert len(found) == len(warnings)
    assert all(part in line for part, line in zip(warnings, found, strict=True))
