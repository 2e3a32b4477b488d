"""Conversion of checkpoints of the PyTorch captioning tutorial into captioners of this package.

The tutorial is https://github.com/sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning. The converted captioner computes the
same logits as the tutorial's model.
"""

from __future__ import annotations

import pickle
import re
import shlex
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import first_line
from ..files import read_json
from ..model.captions import SPECIAL_TOKENS, tokenizer_of_words
from ..model.configuration_captioner import CaptionerConfig
from ..model.image_processing_captioner import CaptionerImageProcessor
from ..model.modeling_captioner import CaptionerModel
from ..model.processing_captioner import CaptionerProcessor

Weights = dict[str, Tensor]

# The tutorial's encoder numbers the children of torchvision's ResNet. These are the ones that have weights.
RESNET_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}

# Weights of the tutorial's decoder that are only renamed.
RENAMED = {
    "attention.encoder_att.weight": "attention.memory_to_key.weight",
    "attention.decoder_att.weight": "attention.query_to_key.weight",
    "attention.full_att.weight": "attention.key_to_score.weight",
    "f_beta.weight": "state_to_gate.weight",
    "f_beta.bias": "state_to_gate.bias",
}
# Weights that are combined, split or reordered. `full_att.bias` is dropped: softmax ignores a bias shared by all cells.
REARRANGED = (
    *("attention.encoder_att.bias", "attention.decoder_att.bias", "attention.full_att.bias", "embedding.weight"),
    *(f"decode_step.{kind}_{end}" for kind in ("weight", "bias") for end in ("ih", "hh")),
    *(f"{layer}.{kind}" for layer in ("init_h", "init_c", "fc") for kind in ("weight", "bias")),
)

# What is given in place of a checkpoint, by the way that it begins.
KINDS = {
    rb"$": "an empty file",
    rb"version https://git-lfs": "a pointer of git-lfs: run `git lfs pull` where it lies",
    rb"\s*<(!DOCTYPE|html|\?xml)": "a web page: a download that failed",
    rb"\s*[{\[]\s*[\"{}\[\]\d]": "JSON",
    rb".{8}\{\"": "a safetensors file: convert reads what torch.save writes",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf": "a compressed file: unpack it",
    rb"[\t\n\r\x20-\x7e]+$|\xff\xfe|\xfe\xff|\xef\xbb\xbf": "a text file",
}

# The tutorial's image transform, in the terms of timm.
DATA_CONFIG = {
    "input_size": (3, 256, 256),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "squash",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


def read_checkpoint(path: Path) -> dict[str, Weights]:
    """Read the state dicts of the encoder and the decoder, without running any code from the file.

    Raises:
        ValueError: The file is damaged, or holds anything other than `{"encoder": state dict, "decoder": state dict}`.
    """
    _require_checkpoint(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        if path.read_bytes()[:1] not in (b"\x80", b"P"):  # with which pickles and zip files begin
            raise ValueError(f"{str(path)!r} was not written by torch.save, or is damaged.") from e
        script = (
            f"import torch; c = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
            "torch.save({part: c[part].state_dict() for part in ('encoder', 'decoder')}, 'state_dicts.pth')"
        )
        raise ValueError(
            f"{str(path)!r} holds more than weights. Reading it could run any program, so it is not read here. If you "
            "trust its author, extract the state dicts in a folder where the tutorial's code can be imported: "
            f"python -c {shlex.quote(script)}"
        ) from e
    except Exception as e:  # a damaged file makes torch raise anything
        raise ValueError(f"{str(path)!r} was not written by torch.save, or is incomplete: {first_line(e)}") from e
    parts: dict[str, Weights] = {}
    for part in ("encoder", "decoder"):
        weights = content.get(part) if isinstance(content, Mapping) else None
        if not isinstance(weights, Mapping) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
        ):
            raise ValueError(
                f"{str(path)!r} holds no state dict under {part!r}. Save it as "
                "torch.save({'encoder': encoder.state_dict(), 'decoder': decoder.state_dict()}, path)."
            )
        # A small file can hold a tensor of any size, as a view of a few numbers.
        if sum(tensor.numel() for tensor in weights.values()) > path.stat().st_size:
            raise ValueError(f"{str(path)!r} is damaged: the tensors under {part!r} are larger than the file.")
        # DataParallel prepends "module." to every name.
        parts[part] = {name.removeprefix("module."): tensor.float() for name, tensor in weights.items()}
    return parts


def _require_checkpoint(path: Path) -> None:
    """Raise an error that says what a file is, unless it may have been written by torch.save."""
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder. Give the file of the checkpoint.")
    with path.open("rb") as file:
        start = file.read(512)
    kind = next((kind for pattern, kind in KINDS.items() if re.match(pattern, start, re.DOTALL | re.IGNORECASE)), None)
    if kind is None and zipfile.is_zipfile(path):
        kind = _zip_problem(path)
    if kind is not None:
        raise ValueError(f"{str(path)!r} is no checkpoint, but {kind}.")


def _zip_problem(path: Path) -> str | None:
    """Return what a zip file is if torch.save can't have written it; None if it may have."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if not any(entry.filename.endswith("/data.pkl") for entry in entries):
        return "another zip file"
    # torch.save doesn't compress. A small file that unpacks to terabytes is no checkpoint.
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        return "a compressed zip file"
    return None


def read_word_map(path: Path) -> list[str]:
    """Read the tutorial's vocabulary and return its words in the order of their ids.

    Raises:
        ValueError: The file is not a word map, or ids or special tokens are missing.
    """
    content = read_json(path, "The word map")
    word_map = content if isinstance(content, dict) else {}
    ids = list(word_map.values())
    if not all(type(index) is int for index in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"The word map {str(path)!r} does not number its words from 0 on, each with its own id.")
    if missing := [token for token in SPECIAL_TOKENS if token not in word_map]:
        raise ValueError(f"The word map {str(path)!r} lacks {', '.join(missing)}. Give the word map of the tutorial.")
    return sorted(word_map, key=word_map.__getitem__)


def convert(
    checkpoint: dict[str, Weights], words: Sequence[str], *, encoder_name: str = "resnet101", grid_size: int = 14
) -> tuple[CaptionerModel, CaptionerProcessor]:
    """Build a captioner and its processor from the tutorial's state dicts.

    Token ids change, because the special tokens come first here: id i is the token
    `processor.tokenizer.convert_ids_to_tokens(i)`.

    Args:
        checkpoint: State dicts as returned by `read_checkpoint`.
        words: Vocabulary as returned by `read_word_map`.
        encoder_name: timm name of the ResNet that the checkpoint was trained with.
        grid_size: Number of rows, and of columns, to which the encoder's grid is pooled.

    Raises:
        ValueError: The weights are not the tutorial's, or belong to another ResNet or vocabulary.
    """
    decoder = checkpoint["decoder"]
    expected = {*RENAMED, *REARRANGED}
    if decoder.keys() != expected:
        differences = _differences(unknown=decoder.keys() - expected, missing=expected - decoder.keys())
        raise ValueError(f"The decoder is not the tutorial's DecoderWithAttention: {differences}")
    if flat := [name for name, tensor in decoder.items() if tensor.ndim != (2 if "weight" in name else 1)]:
        raise ValueError(f"The decoder is not the tutorial's: {flat[0]!r} has {decoder[flat[0]].ndim} dimensions.")
    attention_size, memory_size = decoder["attention.encoder_att.weight"].shape
    vocab_size, embedding_size = decoder["embedding.weight"].shape
    if vocab_size != len(words):
        raise ValueError(
            f"The decoder has {vocab_size} words and the word map has {len(words)}. "
            "Give the word map that the checkpoint was trained with."
        )
    tokenizer = tokenizer_of_words(word for word in words if word not in SPECIAL_TOKENS)
    old_ids = {word: index for index, word in enumerate(words)}
    order = torch.tensor([old_ids[token] for token in tokenizer.convert_ids_to_tokens(range(vocab_size))])

    model = CaptionerModel(
        CaptionerConfig(
            encoder_type="timm_pooled",
            encoder_name=encoder_name,
            encoder_kwargs={"pooled_size": grid_size},
            attention_type="additive_relu",
            attention_size=attention_size,
            decoder_type="lstm_channel_gate",
            vocab_size=vocab_size,
            embedding_size=embedding_size,
            hidden_size=decoder["init_h.weight"].shape[0],
        )
    )
    encoder = model.encoder.part
    if encoder.hidden_size != memory_size:
        raise ValueError(
            f"The decoder reads cells of {memory_size} channels, but {encoder_name} has {encoder.hidden_size}. "
            "Name the checkpoint's ResNet with --encoder_name."
        )
    _load(encoder.body, _encoder_weights(checkpoint["encoder"]), f"encoder is not the tutorial's with {encoder_name}")
    try:
        weights = _decoder_weights(decoder, order)
    except (RuntimeError, ValueError, IndexError) as e:
        raise ValueError(f"The decoder has sizes that do not fit each other: {first_line(e)}") from e
    _load(model.decoder, weights, "decoder has sizes that do not fit each other")
    model.generation_config = model.default_generation_config(unknown_token_id=tokenizer.unk_token_id)
    return model.eval(), CaptionerProcessor(CaptionerImageProcessor.from_data_config(DATA_CONFIG), tokenizer)


def _encoder_weights(weights: Weights) -> Weights:
    """Rename the tutorial's `resnet.0.weight` and the like to the names in timm's ResNet."""
    renamed = {}
    for name, tensor in weights.items():
        first, _, rest = name.partition(".")
        child, _, rest = rest.partition(".")
        is_known = first == "resnet" and child in RESNET_CHILDREN
        renamed[f"{RESNET_CHILDREN[child]}.{rest}" if is_known else name] = tensor
    return renamed


def _decoder_weights(weights: Weights, order: Tensor) -> Weights:
    """Rearrange the tutorial's decoder weights for `lstm_channel_gate`; `order` has the tutorial's id of each word."""
    new = {new_name: weights[name] for name, new_name in RENAMED.items()}
    # The two biases are only ever used in this sum.
    new["attention.memory_to_key.bias"] = weights["attention.encoder_att.bias"] + weights["attention.decoder_att.bias"]
    new["embedding.weight"] = weights["embedding.weight"][order]
    for kind in ("weight", "bias"):
        new[f"output.{kind}"] = weights[f"fc.{kind}"][order]
        new[f"memory_to_state.{kind}"] = torch.cat([weights[f"init_h.{kind}"], weights[f"init_c.{kind}"]])
    # torch's LSTMCell has one matrix for word and context and one for the hidden state. The decoder here has one for
    # the word and one for context and hidden state.
    from_inputs, from_hidden = (_reordered_gates(weights[f"decode_step.weight_{end}"]) for end in ("ih", "hh"))
    embedding_size = new["embedding.weight"].shape[1]
    bias = _reordered_gates(weights["decode_step.bias_ih"] + weights["decode_step.bias_hh"])
    bias.unflatten(0, (4, -1))[1] -= 1  # the decoder here adds 1 to the forget gate
    new["word_to_lstm.weight"], new["word_to_lstm.bias"] = from_inputs[:, :embedding_size], bias
    new["step_to_lstm.weight"] = torch.cat([from_inputs[:, embedding_size:], from_hidden], 1)
    return new


def _reordered_gates(rows: Tensor) -> Tensor:
    """Reorder LSTM rows from torch's (input, forget, cell, output) to this package's (input, forget, output, cell)."""
    input_gate, forget_gate, cell, output_gate = rows.chunk(4)
    return torch.cat([input_gate, forget_gate, output_gate, cell])


def _load(module: nn.Module, weights: Weights, problem: str) -> None:
    """Load a state dict into a module; if names or shapes differ, raise a ValueError that starts with the problem."""
    own = module.state_dict()
    reshaped = {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}
    if own.keys() != weights.keys() or reshaped:
        unknown, missing = weights.keys() - own.keys(), own.keys() - weights.keys()
        raise ValueError(f"The {problem}: {_differences(unknown=unknown, missing=missing, reshaped=reshaped)}")
    module.load_state_dict(weights)


def _differences(*, unknown: Collection[str], missing: Collection[str], reshaped: Collection[str] = ()) -> str:
    """Describe how a state dict differs from the expected one, with up to three names of each kind of difference."""
    kinds = (("it has", unknown), ("it lacks", missing), ("of another size are", reshaped))
    described = [
        f"{kind} {', '.join(sorted(names)[:3])}{' and others' if len(names) > 3 else ''}"
        for kind, names in kinds
        if names
    ]
    return "; ".join(described) + "."
