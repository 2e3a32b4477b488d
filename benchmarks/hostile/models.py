"""Folders of a tiny captioner that are damaged, or whose settings name files and addresses elsewhere."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .captions import write_files
from .layouts import make_photos
from .model_entries import ENCODER_KWARGS, ENCODER_NAMES, JUNK, MORE_CONFIG, MORE_FILES
from .mutations import MUTATIONS
from .paths import FolderWatch
from .pool import Case, Outcome, witness

Files = dict[str, bytes]
Change = Callable[[Files, random.Random], Files]  # {outside} and {url} in JSON stand for what lies elsewhere

# Settings that change the captions of a captioner although nothing is broken.
SETTINGS = re.compile(
    r"(generation_config|preprocessor_config|processor_config|tokenizer\w*|special_tokens_map|encoder_kwargs"
    r"|encoder_name|decoder_kwargs|attention_kwargs|\w+_token_id|dtype|torch_dtype|add_config|weights_values)\b"
)


def _merged(content: bytes, more: Any) -> bytes:
    """Return a JSON file with more entries."""
    value = {**json.loads(content), **more} if content and isinstance(more, dict) else more
    return json.dumps(value).encode()


def _change_json(name: str) -> Change:
    """Return a change that replaces a value of a JSON file by junk."""

    def change(files: Files, rng: random.Random) -> Files:
        root = [json.loads(files[name])]
        holder, key = root, 0
        while isinstance(holder[key], dict | list) and holder[key] and (holder is root or rng.random() < 0.5):
            holder = holder[key]
            key = rng.choice(sorted(holder) if isinstance(holder, dict) else range(min(50, len(holder))))
        if rng.random() < 0.15 and holder is not root:
            del holder[key]
        else:
            holder[key] = rng.choice(JUNK)
        return {**files, name: json.dumps(root[0]).encode()}

    return change


def _change_field(field: str) -> Change:
    """Return a change that replaces an entry of the configuration by junk."""
    return lambda files, rng: {**files, "config.json": _merged(files["config.json"], {field: rng.choice(JUNK)})}


def _damage(name: str) -> Change:
    """Return a change that damages the bytes of a file, or puts something else in its place."""

    def change(files: Files, rng: random.Random) -> Files:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"
        others = [b"", b"\0" * 1000, pointer, b"<!DOCTYPE html>", b"null", b"[]", b"[" * 10**5, b"{}", b"5", b'"x"']
        if rng.random() < 0.4:
            return {**files, name: rng.choice(others)}
        # Changes of single numbers among the weights can't be told.
        mutations = ("cut_end", "cut_start", "delete", "insert") if "safetensors" in name else [*MUTATIONS]
        return {**files, name: MUTATIONS[rng.choice(mutations)](files[name], rng)}

    return change


def _change_weights(files: Files, rng: random.Random) -> Files:
    """Drop, rename, reshape or convert a tensor, or damage the header of the weights."""
    import torch
    from safetensors.torch import load, save

    tensors = load(files["model.safetensors"])
    # Without the scale and the mean of norms, which others may guess.
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    changed: dict[str, Any] = {
        "drop": {},
        "rename": {name + "_": tensor},
        "transpose": {name: torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(2)},
        "shrink": {name: tensor[:0] if tensor.ndim else tensor.repeat(0)},
        "scalar": {name: torch.zeros(())} if tensor.ndim else {},
        "flatten": {name: tensor.reshape(-1)} if tensor.ndim > 1 else {},
        "nan": {name: torch.full_like(tensor, torch.nan)} if tensor.is_floating_point() else {},
        "infinity": {name: torch.full_like(tensor, torch.inf)} if tensor.is_floating_point() else {},
        "complex": {name: tensor.to(torch.complex64)} if tensor.is_floating_point() else {},
        "boolean": {name: tensor.to(torch.bool)} if tensor.is_floating_point() else {},
    }
    return {**files, "model.safetensors": save({**tensors, **changed[rng.choice([*changed])]}, {"format": "pt"})}


def _change_header(files: Files, rng: random.Random) -> Files:
    """Damage the header of the weights, in which names, shapes and places of tensors are."""
    data = files["model.safetensors"]
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.2:
        return {**files, "model.safetensors": struct.pack("<Q", rng.choice((0, 2**63, 2**40, size - 1))) + data[8:]}
    header = json.loads(data[8 : 8 + size])
    entry = header[rng.choice(sorted(header.keys() - {"__metadata__"}))]
    key = rng.choice(sorted(entry))
    entry[key] = rng.choice((*JUNK[:12], [10**9, 10**9], [2**62, 4], [0, 10**12], "F8_E4M3", "I64", "x"))
    text = json.dumps(header).encode()
    return {**files, "model.safetensors": struct.pack("<Q", len(text)) + text + data[8 + size :]}


def _foreign_weights(files: Files, rng: random.Random) -> Files:
    """Take the weights of a captioner of other sizes."""
    options = rng.choice(({"hidden_size": 40}, {"gate": False}, {"decoder_type": "gru"}, {"vocab_size": 70}))
    return {**files, "model.safetensors": _captioner(**options)["model.safetensors"]}


def _weights_values(files: Files, rng: random.Random) -> Files:
    """Flip bits anywhere in the weights, which can't be told if they are numbers."""
    return {**files, "model.safetensors": MUTATIONS["flip_bits"](files["model.safetensors"], rng)}


def _more_files(files: Files, more: dict[str, Any]) -> Files:
    changed = dict(files)
    for name, content in more.items():
        if content is None:
            changed.pop(name, None)
        elif isinstance(content, str):
            changed[name] = content.encode()
        else:
            changed[name] = _merged(files.get(name, b""), content)
    return changed


@cache
def _changes() -> dict[str, Change]:
    """Return all changes by name."""
    names = sorted(_captioner())
    fixed: dict[str, Files] = {}
    for n, kwargs in enumerate(ENCODER_KWARGS):
        fixed[f"encoder_kwargs/{n}"] = {"config.json": {"encoder_kwargs": {"output_stride": 16, **kwargs}}}  # type: ignore[dict-item]
    for n, name in enumerate(ENCODER_NAMES):
        fixed[f"encoder_name/{n}"] = {"config.json": {"encoder_name": name}}  # type: ignore[dict-item]
    for n, entries in enumerate(MORE_CONFIG):
        fixed[f"add_config/{n}"] = {"config.json": entries}  # type: ignore[dict-item]
    for n, more in enumerate(MORE_FILES):
        fixed[f"{next(reversed(more))}/{n}"] = more
    changes: dict[str, Change] = {
        name: lambda files, rng, more=more: _more_files(files, more) for name, more in fixed.items()
    }
    changes |= {f"{name}/link": lambda files, rng: files for name in names}
    changes |= {
        f"{name}/{kind}": lambda files, rng: files for name in names[:3] for kind in ("fifo", "folder", "device")
    }
    random_changes = {f"{name}/json": _change_json(name) for name in names if name.endswith(".json")}
    random_changes |= {f"{name}/damage": _damage(name) for name in names}
    for function in (_change_weights, _change_header, _foreign_weights, _weights_values):
        random_changes |= {function.__name__.strip("_"): function}
    # With another model type, it is no captioner, and transformers does not even call this package.
    fields = [name for name in json.loads(_captioner()["config.json"]) if name != "model_type"]
    random_changes |= {f"field/{name}": _change_field(name) for name in fields}
    return changes | {f"random/{name}": change for name, change in random_changes.items()}


def cases(count: int, seed: int) -> list[Case]:
    """Return all fixed changes, then random ones."""
    rng = random.Random(seed)
    chosen = ["intact", *(name for name in _changes() if not name.startswith("random/"))]
    others = [name for name in _changes() if name.startswith("random/")]
    weights = [name for name in others if "weights" in name or "header" in name or "safetensors" in name]
    while len(chosen) < max(count, len(_changes())):
        chosen.append(rng.choice(weights if rng.random() < 0.25 else others))
    rng.shuffle(chosen)
    return [Case("models", name, seed * 10**6 + n) for n, name in enumerate(chosen[:count])]


def prepare(case: Case, folder: Path) -> Callable[[Outcome], None]:
    """Write the folder of a case and what lies outside of it, and return the job that loads it."""
    rng, intact = random.Random(case.seed), _captioner()
    expected = _intact_captions()
    model, outside = folder / "model", folder / "outside"
    write_files(
        outside, {**intact, "weights.pth": b"x", "weights.safetensors": intact["model.safetensors"], "secret.txt": b"x"}
    )
    files = intact if case.name == "intact" else _changes()[case.name](intact, rng)
    places = {b"{outside}": str(outside).encode(), b"{url}": witness().url.encode()}
    for old, new in places.items():
        files = {
            name: content.replace(old, new) if name != "model.safetensors" else content
            for name, content in files.items()
        }
    write_files(model, files)
    name, _, kind = case.name.rpartition("/")
    if kind in ("link", "fifo", "folder", "device"):
        (model / name).unlink()
        if kind == "folder":
            (model / name).mkdir()
        elif kind == "fifo":
            os.mkfifo(model / name)
        else:
            (model / name).symlink_to(outside / name if kind == "link" else "/dev/zero")
    os.chdir(model if case.seed % 3 == 0 else folder)
    watch = FolderWatch([outside])
    # Auto classes and pipelines of transformers read these files by themselves, before they ask this package.
    is_special = kind in ("link", "fifo", "device") and name in ("config.json", "processor_config.json")
    is_special |= files.get("processor_config.json") != intact["processor_config.json"]
    keeps = not SETTINGS.match(case.name.removeprefix("random/").removeprefix("field/"))

    def job(outcome: Outcome) -> None:
        captions = _load(
            model, outcome, by_auto_classes=case.seed % 2 == 0 and not is_special, by_pipeline=not is_special
        )
        if case.name == "intact" and captions != [expected, expected]:
            outcome.faults.setdefault("raw", "an intact folder gives no captions, or other ones")
        for given in captions:
            if keeps and given is not None and given != expected:
                outcome.faults["silent"] = f"{given[0]!r} instead of {expected[0]!r}"
        if seen := watch.opened():
            outcome.faults["opened"] = f"{seen} in the folder outside"

    return job


def _load(
    folder: Path, outcome: Outcome, *, by_auto_classes: bool = False, by_pipeline: bool = True
) -> list[list[str] | None]:
    """Caption by model and processor, then by the pipeline; return the captions of both, None where refused."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from hf_captioner import CaptionerModel, CaptionerProcessor

    model_class, processor_class = CaptionerModel, CaptionerProcessor
    if by_auto_classes:
        model_class, processor_class = AutoModelForImageTextToText, AutoProcessor
    model = processor = None
    captions: list[list[str] | None] = [None, None]
    with outcome.watch():
        model = model_class.from_pretrained(str(folder))
    with outcome.watch():
        processor = processor_class.from_pretrained(str(folder))
    if model is not None and processor is not None:
        with outcome.watch():
            ids = model.generate(**processor(images=_images()))
            captions[0] = processor.batch_decode(ids)
    if by_pipeline:
        with outcome.watch():
            captions[1] = _by_pipeline(folder)
    return captions


def _by_pipeline(folder: Path) -> list[str]:
    """Caption by the pipeline; an error of a model comes as transformers' own, which quotes it with its traceback."""
    from transformers import pipeline

    try:
        results = pipeline("image-captioning", model=str(folder))(_images())
    except ValueError as e:
        *_, last = str(e).strip().splitlines() or [""]
        kind, _, message = last.partition(": ")
        if not str(e).startswith("Could not load model") or kind not in ("ValueError", "OSError", "FileNotFoundError"):
            raise
        raise ValueError(message) from e
    return [result[0]["generated_text"] for result in results]


@cache
def _images() -> list[Image.Image]:
    blocks = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(values).resize((80, 64), Image.Resampling.BICUBIC) for values in blocks]


@cache
def _intact_captions() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), _captioner())
        captions = _load(Path(folder), Outcome(lambda: None), by_pipeline=False)[0]
    assert captions is not None and len({*captions}) == len(captions), "the captions of different images are equal"
    return captions


@cache
def _captioner(**options: Any) -> Files:
    """Return the files of a captioner with random weights, whose captions differ from image to image."""
    import torch

    from hf_captioner import CaptionerModel, CaptionerProcessor

    texts = [caption for photo in make_photos() for caption in photo.captions]
    config = {"input_size": (3, 64, 64), "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
    processor = CaptionerProcessor.from_captions(texts, {**config, "mean": (0.5,) * 3, "std": (0.25,) * 3}, min_count=1)
    sizes = {"hidden_size": 32, "attention_size": 24, "embedding_size": 16, "vocab_size": len(processor.tokenizer)}
    torch.manual_seed(1)
    model = CaptionerModel.from_encoder(
        pretrained=False, encoder_name="test_resnet", encoder_kwargs={"output_stride": 16}, **{**sizes, **options}
    )
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    model.generation_config = model.default_generation_config(unknown_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
