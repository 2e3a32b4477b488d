"""Turn a checkpoint of the PyTorch captioning tutorial into a captioner of this package.

    python -m hf_captioner.publishing.convert CHECKPOINT.pth WORDMAP.json outputs/converted
    python examples/caption.py outputs/converted photo.jpg

The tutorial is https://github.com/sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning. CHECKPOINT holds two state dicts,
`{"encoder": ..., "decoder": ...}`. It is read without running anything in it; the tutorial's own files hold whole
modules, which can't be read so: the error says how to take the state dicts out. The captioner computes the same logits.
"""

from __future__ import annotations

import json
import pickle
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import first_line
from ..model.captions import END, PAD, SPECIAL_TOKENS, START, UNKNOWN, tokenizer_of_words
from ..model.configuration_captioner import CaptionerConfig
from ..model.image_processing_captioner import CaptionerImageProcessor
from ..model.modeling_captioner import CaptionerModel
from ..model.processing_captioner import CaptionerProcessor

Weights = dict[str, Tensor]

# Children of torchvision's ResNet, in whose order the tutorial's encoder counts them, that have weights.
STAGES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}

# Those of the tutorial's decoder that are taken as they are.
SAME = {
    "attention.encoder_att.weight": "attention.memory_to_key.weight",
    "attention.decoder_att.weight": "attention.query_to_key.weight",
    "attention.full_att.weight": "attention.key_to_score.weight",
    "f_beta.weight": "state_to_gate.weight",
    "f_beta.bias": "state_to_gate.bias",
}
# And those that are put together, cut up or reordered. `full_att.bias` is the same for all cells, so softmax drops it.
OTHERS = (
    *("attention.encoder_att.bias", "attention.decoder_att.bias", "attention.full_att.bias", "embedding.weight"),
    *(f"decode_step.{kind}_{end}" for kind in ("weight", "bias") for end in ("ih", "hh")),
    *(f"{layer}.{kind}" for layer in ("init_h", "init_c", "fc") for kind in ("weight", "bias")),
)

# How the tutorial makes pixels of photographs.
PIXELS = {
    "input_size": (3, 256, 256),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "squash",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


def read_checkpoint(path: Path) -> dict[str, Weights]:
    """The state dicts of encoder and decoder, read without running anything in the file.

    Raises:
        ValueError: the file holds anything else.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {str(path)!r}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        script = (
            f"import torch; c = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
            "torch.save({part: c[part].state_dict() for part in ('encoder', 'decoder')}, 'state_dicts.pth')"
        )
        raise ValueError(
            f"{str(path)!r} holds more than weights, and reading that could run any program; it is not read here. "
            "If you trust whoever made it, take the state dicts out where the tutorial's code can be imported: "
            f"python -c {shlex.quote(script)}"
        ) from e
    except (RuntimeError, EOFError, ValueError) as e:  # no file of torch.save, or half of one
        raise ValueError(f"{str(path)!r} is no file of torch.save, or not a whole one: {first_line(e)}") from e
    parts: dict[str, Weights] = {}
    for part in ("encoder", "decoder"):
        weights = content.get(part) if isinstance(content, Mapping) else None
        if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise ValueError(
                f"{str(path)!r} holds no state dict under {part!r}. Save it as "
                "torch.save({'encoder': encoder.state_dict(), 'decoder': decoder.state_dict()}, path)."
            )
        # DataParallel puts a name of its own in front.
        parts[part] = {name.removeprefix("module."): tensor.float() for name, tensor in weights.items()}
    return parts


def read_word_map(path: Path) -> list[str]:
    """The words, at the ids that they have in the tutorial.

    Raises:
        ValueError: the file is no word map, or lacks ids or special words.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No word map at {str(path)!r}.")
    try:
        word_map = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"The word map {str(path)!r} is not JSON: {first_line(e)}") from e
    ids = list(word_map.values()) if isinstance(word_map, dict) else []
    if not all(type(index) is int for index in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"The word map {str(path)!r} does not give each word an id of its own, from 0 on.")
    if missing := [word for word in SPECIAL_TOKENS if word not in word_map]:
        raise ValueError(f"The word map {str(path)!r} has no {', '.join(missing)}; is it the tutorial's?")
    return sorted(word_map, key=word_map.__getitem__)


def convert(
    checkpoint: dict[str, Weights], words: Sequence[str], *, encoder_name: str = "resnet101", grid_size: int = 14
) -> tuple[CaptionerModel, CaptionerProcessor]:
    """A captioner and its processor from state dicts.

    Ids change, as here the special words come first: id i is word `processor.tokenizer.convert_ids_to_tokens(i)`.

    Args:
        checkpoint: as `read_checkpoint` returns it.
        words: as `read_word_map` returns them.
        encoder_name: timm name of the ResNet.
        grid_size: rows, and columns, to which its cells are pooled.

    Raises:
        ValueError: weights that are not the tutorial's, of another ResNet or another number of words.
    """
    decoder = checkpoint["decoder"]
    expected = {*SAME, *OTHERS}
    if decoder.keys() != expected:
        raise ValueError(
            "The decoder is not the tutorial's DecoderWithAttention: "
            + _differences(decoder.keys() - expected, expected - decoder.keys())
        )
    if len(decoder["embedding.weight"]) != len(words):
        raise ValueError(
            f"The decoder knows {len(decoder['embedding.weight'])} words and the word map {len(words)}; "
            "give the word map it was trained with."
        )
    special = (UNKNOWN, PAD, START, END)
    tokenizer = tokenizer_of_words(word for word in words if word not in special)
    old_id = {word: index for index, word in enumerate(words)}
    order = torch.tensor([old_id[word] for word in tokenizer.convert_ids_to_tokens(range(len(words)))])

    attention_size, memory_size = decoder["attention.encoder_att.weight"].shape
    vocab_size, embedding_size = decoder["embedding.weight"].shape
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
    if model.encoder.part.hidden_size != memory_size:
        raise ValueError(
            f"The decoder reads cells of {memory_size} channels, but those of {encoder_name} have "
            f"{model.encoder.part.hidden_size}; name the checkpoint's ResNet with --encoder-name."
        )
    _load(
        model.encoder.part.body,
        _encoder_weights(checkpoint["encoder"]),
        f"encoder is not the tutorial's with {encoder_name}",
    )
    _load(model.decoder, _decoder_weights(decoder, order), "decoder's sizes do not fit each other")
    model.generation_config = model.default_generation_config(unknown_token_id=tokenizer.unk_token_id)
    return model.eval(), CaptionerProcessor(CaptionerImageProcessor.from_data_config(PIXELS), tokenizer)


def _encoder_weights(weights: Weights) -> Weights:
    """Names of timm's ResNet, which is torchvision's, for the tutorial's `resnet.0.weight`."""
    renamed = {}
    for name, tensor in weights.items():
        first, _, rest = name.partition(".")
        stage, _, rest = rest.partition(".")
        renamed[f"{STAGES[stage]}.{rest}" if first == "resnet" and stage in STAGES else name] = tensor
    return renamed


def _decoder_weights(weights: Weights, order: Tensor) -> Weights:
    """The weights of `lstm_channel_gate` that compute the same, with words in a new order."""
    renamed = {new: weights[old] for old, new in SAME.items()}
    key_bias = weights["attention.encoder_att.bias"] + weights["attention.decoder_att.bias"]
    renamed["attention.memory_to_key.bias"] = key_bias
    renamed["embedding.weight"] = weights["embedding.weight"][order]
    for kind in ("weight", "bias"):
        renamed[f"output.{kind}"] = weights[f"fc.{kind}"][order]
        renamed[f"memory_to_state.{kind}"] = torch.cat([weights[f"init_h.{kind}"], weights[f"init_c.{kind}"]])
    # An LSTMCell reads word and context, then h. Of the rows here, those from the word stand by themselves.
    from_inputs, from_hidden = (_gates(weights[f"decode_step.weight_{end}"]) for end in ("ih", "hh"))
    embedding_size = renamed["embedding.weight"].shape[1]
    bias = _gates(weights["decode_step.bias_ih"] + weights["decode_step.bias_hh"])
    forget = bias.unflatten(0, (4, -1))[1]
    forget -= 1  # the bias that forget gates have here anyway
    renamed["word_to_lstm.weight"], renamed["word_to_lstm.bias"] = from_inputs[:, :embedding_size], bias
    renamed["step_to_lstm.weight"] = torch.cat([from_inputs[:, embedding_size:], from_hidden], 1)
    return renamed


def _gates(rows: Tensor) -> Tensor:
    """Rows of torch's gates (admit, forget, new content, emit) in the order (admit, forget, emit, new content)."""
    admit, forget, new, emit = rows.chunk(4)
    return torch.cat([admit, forget, emit, new])


def _load(module: Any, weights: Weights, problem: str) -> None:
    mine = module.state_dict()
    wrong = [name for name in mine.keys() & weights.keys() if mine[name].shape != weights[name].shape]
    if mine.keys() != weights.keys() or wrong:
        reason = _differences(weights.keys() - mine.keys(), mine.keys() - weights.keys(), wrong)
        raise ValueError(f"The {problem}: {reason}")
    module.load_state_dict(weights)


def _differences(unknown: Any, missing: Any, wrong: Any = ()) -> str:
    """Up to three names of each."""
    found = [
        f"{what} {', '.join(sorted(names)[:3])}{' and others' if len(names) > 3 else ''}"
        for what, names in (("it has", unknown), ("it lacks", missing), ("of another size are", wrong))
        if names
    ]
    return "; ".join(found) + "."
