"""Folders of strangers: a captioner is loaded as it is stored or refused, and nothing else is opened, fetched or built."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from hf_captioner import CaptionerModel, CaptionerProcessor
from hf_captioner.cli import load_captioner
from hf_captioner.model.folder_check import check_generation, one_line_errors

OPENED: list[str] = []  # files outside and addresses, while a test watches
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n"
PICKLE = b"\x80\x02cos\nsystem\n(X\x05\x00\x00\x00falsetR."
OUTSIDE = "/etc/hostname"
LAYERS = {"layers": [60000, 1, 1, 1], "block_args": None}


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo") or (event == "open" and "outside" in str(arguments[0])):
        OPENED.append(f"{event} {arguments[0]}")


sys.addaudithook(_watch)


@pytest.fixture
def folder(captioner_folder: Path, tmp_path: Path) -> Iterator[Path]:
    """Return a copy of a captioner's folder; fail if a test opens what lies in `outside` or an address."""
    copy = tmp_path / "captioner"
    shutil.copytree(captioner_folder, copy)
    shutil.copytree(captioner_folder, tmp_path / "outside")
    OPENED.clear()
    yield copy
    assert not OPENED


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | entries))


def refused(load: Callable[[Path], Any], folder: Path, *words: str) -> None:
    """Check that loading is refused in time, in one line that has the words."""
    start = time.process_time()
    with pytest.raises((ValueError, OSError)) as error:
        load(folder)
    assert time.process_time() - start < 5
    message = str(error.value)
    assert len(message) < 500 and "\n" not in message and all(word in message for word in words), message


SOURCES = [
    {"pretrained": True, "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x.pth", "hf_hub_id": None}},
    {"pretrained": True, "pretrained_cfg": {"file": "../outside/model.safetensors"}},
    {"checkpoint_path": "../outside/model.safetensors"},
    {"cache_dir": "../outside"},
    {"output_stride": {"a": ["local-dir:outside"]}},
]
ENTRIES = [
    *(("config.json", {"encoder_kwargs": source}) for source in SOURCES),
    *(
        ("config.json", {"encoder_name": name})
        for name in ("hf-hub:someone/model", "local-dir:outside", "../outside", "someone/model")
    ),
    ("config.json", {"encoder_name": "vit_tiny_patch16_224", "encoder_kwargs": {"depth": 60000}}),
    ("config.json", {"encoder_name": "vit_tiny_patch16_224", "encoder_kwargs": {"img_size": 10**9}}),
    ("config.json", {"encoder_name": "beit_base_patch16_224", "encoder_kwargs": {"img_size": 1536}}),
    ("config.json", {"encoder_kwargs": {"layers": [10**9] * 4}}),
    ("config.json", {"encoder_kwargs": {"drop_rate": float("nan")}}),
    ("config.json", {"encoder_kwargs": {"output_stride": 7}}),
    ("config.json", {"decoder_kwargs": {"num_layers": 60000}}),
    ("config.json", {"attention_type": "multi_head", "attention_kwargs": {"num_heads": 0}}),
    ("config.json", {"hidden_size": 65536}),
    ("config.json", {"vocab_size": 10**12}),
    ("config.json", {"num_labels": 10**9}),
    ("config.json", {"architectures": 5}),
    ("config.json", {"hidden_size": "32"}),
    ("config.json", {"dtype": "load"}),
    ("config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    ("config.json", {"attn_implementation": "someone/kernel"}),
    ("config.json", {"transformers_weights": "../outside/model.safetensors"}),
    ("config.json", {"to_dict": 1}),
    ("config.json", {"encoder_name": "x" * 10**4}),
    ("config.json", {"decoder_type": "x" * 10**4}),
    ("config.json", {"is_encoder_decoder": False}),
    ("config.json", {"model_type": "resnet"}),
    ("generation_config.json", {"num_beams": 10**9}),
    ("generation_config.json", {"max_length": 10**12}),
    ("generation_config.json", {"suppress_tokens": [10**9]}),
    ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_class": "AutoModel"}}),
    ("tokenizer_config.json", {"tokenizer_file": "../outside/tokenizer.json"}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["someone/model--a.B", None]}}),
    ("tokenizer_config.json", {"tokenizer_class": "AutoTokenizer"}),
    ("tokenizer_config.json", {"added_tokens_decoder": {str(i): {"content": f"<{i}>"} for i in range(10000)}}),
    ("processor_config.json", {"processor_class": 5}),
    ("adapter_config.json", {"base_model_name_or_path": "someone/model", "peft_type": "LORA"}),
    ("model.safetensors.index.json", {"weight_map": {"a": "../outside/model.safetensors"}}),
    ("audio_tokenizer_config.json", {"audio_tokenizer_name_or_path": "someone/model"}),
]


@pytest.mark.parametrize(("file", "entries"), ENTRIES, ids=[f"{file} {entries}"[:90] for file, entries in ENTRIES])
def test_entries_that_reach_out_or_ask_too_much_are_refused(folder: Path, file: str, entries: dict[str, Any]) -> None:
    edit(folder / file, **entries)
    refused(load_captioner, folder)
    if "num_labels" in entries:
        refused(CaptionerProcessor.from_pretrained, folder)
    if file != "processor_config.json":
        with pytest.raises((ValueError, OSError)):
            AutoModelForImageTextToText.from_pretrained(folder)


DAMAGE = {
    "config.json": [b"", b"[]", b"[" * 10**5, b"<html>", LFS_POINTER, b"\xff\xfe{}", b'{"gate": NaN}', b"{}", bytes(2**22 + 1)],
    "generation_config.json": [b"", b"5"],
    "processor_config.json": [b"", b"null", b"{}", b'{"image_processor": 5}', b'{"a":' * 900 + b"1" + b"}" * 900],
    "tokenizer_config.json": [b"", b"[1]"],
    "tokenizer.json": [b"", b"{}", b"hello", LFS_POINTER, bytes(2**23)],
    "model.safetensors": [b"", b"{}", b"<html>", LFS_POINTER, struct.pack("<Q", 2**60), bytes(200), PICKLE],
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "data"),
    [(file, data) for file, kinds in DAMAGE.items() for data in kinds],
    ids=lambda value: str(value)[:30],
)
def test_damaged_files_are_refused_in_one_line(folder: Path, file: str, data: bytes) -> None:
    (folder / file).write_bytes(data)
    refused(load_captioner, folder, "git lfs pull" if data == LFS_POINTER else "")


def without(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: without(weights, "decoder.output.bias"), "lacks 1 of"),
        (lambda weights: without(weights, "encoder"), "lacks"),
        (lambda weights: weights | {"decoder.sentinel.bias": torch.zeros(3)}, "holds 1 weights that"),
        (lambda weights: {f"model.{name}": tensor for name, tensor in weights.items()}, "another model's"),
        (lambda weights: {name: tensor[:1].clone() for name, tensor in weights.items() if tensor.ndim}, "lacks"),
        (lambda weights: weights | {"decoder.output.bias": torch.zeros(2)}, "should be ("),
        (lambda weights: weights | {"decoder.output.bias": weights["decoder.output.bias"] > 0}, "in BOOL"),
        (lambda weights: weights | {"decoder.output.bias": weights["decoder.output.bias"] / 0}, "not finite"),
    ],
)
def test_weights_of_another_model_are_refused(folder: Path, change: Callable[..., Any], words: str) -> None:
    file = folder / "model.safetensors"
    weights = change(load_file(file))
    save_file(weights, file, {"format": "pt"})
    refused(CaptionerModel.from_pretrained, folder, words)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pipes_are_not_waited_for(folder: Path, file: str) -> None:
    (folder / file).unlink()
    os.mkfifo(folder / file)
    refused(CaptionerModel.from_pretrained, folder, "a pipe")


def test_truncated_missing_and_pickled_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(CaptionerModel.from_pretrained, folder, "incomplete")
    file.unlink()
    refused(CaptionerModel.from_pretrained, folder)
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    refused(CaptionerModel.from_pretrained, folder)


def test_the_caller_may_ask_for_another_architecture(folder: Path) -> None:
    """What the folder lacks is then new, as ever."""
    assert CaptionerModel.from_pretrained(folder, attention_type="dot").config.attention_type == "dot"
    other = CaptionerModel.from_pretrained(folder, hidden_size=20, ignore_mismatched_sizes=True)
    assert other.config.hidden_size == 20


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"])
def test_links_stay_in_the_folder_or_in_the_cache_of_the_hub(folder: Path, file: str, tmp_path: Path) -> None:
    (folder / file).unlink()
    (folder / file).symlink_to(tmp_path / "outside" / file)
    refused(CaptionerModel.from_pretrained, folder, file, "leaves the folder")

    snapshot, blobs = tmp_path / "models--a--b/snapshots/123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for source in (tmp_path / "outside").iterdir():
        shutil.copy(source, blobs)
        (snapshot / source.name).symlink_to(os.path.relpath(blobs / source.name, snapshot))
    OPENED.clear()  # by the copying
    load_captioner(snapshot)


@pytest.mark.parametrize(
    "entries",
    [
        {"size": {"height": 10**9, "width": 10**9}},
        {"size": 10**9},
        {"size": {"height": "a", "width": 64}},
        {"crop_pct": 1e-9},
        {"crop_pct": "1"},
        {"image_std": [0, 1, 1]},
        {"image_mean": ["a", "b", "c"]},
        {"interpolation": []},
    ],
    ids=str,
)
def test_settings_of_the_image_processor_are_bounded(folder: Path, entries: dict[str, Any]) -> None:
    path = folder / "processor_config.json"
    record = json.loads(path.read_text())
    record["image_processor"] |= entries
    path.write_text(json.dumps(record))
    refused(CaptionerProcessor.from_pretrained, folder, "give" if "size" in entries else "")


def test_a_tokenizer_that_panics_is_refused(folder: Path) -> None:
    """The error of the library is no Exception, so that it would end a program that expects all of these."""
    path = folder / "tokenizer.json"
    edit(path, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    refused(CaptionerProcessor.from_pretrained, folder, "damaged")


def test_a_tokenizer_with_more_words_than_the_model_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["vocab"] |= {f"word{number}": 1000 + number for number in range(50)}
    path.write_text(json.dumps(record))
    refused(load_captioner, folder, "different captioners")


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": True}, {"num_beams": 2.5}, {"length_penalty": "1"}, {"top_p": 7}, {"eos_token_id": [[3], "4"]}],
    ids=str,
)
def test_wrong_generation_settings_are_refused(settings: dict[str, Any]) -> None:
    check_generation({"num_beams": 5, "max_length": 31, "suppress_tokens": [0], "eos_token_id": 3}, 35)
    with pytest.raises(ValueError, match=next(iter(settings))):
        check_generation(settings, 35)


def test_errors_of_libraries_become_one_line() -> None:
    for raised, kept in ((KeyError("a"), False), (RuntimeError("a\nb"), False), (ValueError("a"), True)):
        with pytest.raises(ValueError) as error, one_line_errors("FOLDER"):
            raise raised
        assert (error.value is raised) == kept and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError), one_line_errors("FOLDER"):
        raise FileNotFoundError("a")
