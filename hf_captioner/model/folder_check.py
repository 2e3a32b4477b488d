"""Checks of a captioner's folder before it is loaded: it opens and fetches nothing else, and its files have sane sizes.

transformers acts on much that a folder may hold: names of other files, of repositories and of classes, adapters,
checkpoints of other kinds. A captioner needs none of it, so it is refused. This module needs the standard library
alone, because exported captioners use it too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 2**22
MAX_MESSAGE = 300  # characters of an error
MAX_DEPTH = 16  # nested lists and dicts
LFS_POINTER = b"version https://git-lfs"

# Entries of JSON files at which transformers opens or fetches something else, or builds another model.
REFUSED_ENTRIES = {
    "config.json": (
        r"quantization_config|compression_config|fusion_config|distributed_config|per_layer_config"
        r"|(text|encoder|decoder|generator)_config|encoder|decoder|generator"
        r"|num_labels|transformers_weights|configuration_files|extra(_config)?_files|custom_pipelines|_?(attn|experts)_implementation.*"
    ),
    "generation_config.json": (
        r"custom_generate|(is_)?assistant\w*|(compile|watermarking|continuous_batching)_config|\w+_implementation"
        r"|guidance_scale|prompt_lookup_num_tokens|penalty_alpha|dola_layers"
    ),
    "processor_config.json": r"audio_tokenizer",
    "tokenizer_config.json": r"\w+_files?|init_inputs|tokenizer_object",
    "model.safetensors.index.json": r"",
    "preprocessor_config.json": r"",
    "special_tokens_map.json": r"",
    "added_tokens.json": r"",
}
# Classes that such files may name, which transformers looks up among its own: not those that look further.
CLASSES = {
    "processor_class": r"\w+Processor",
    "tokenizer_class": r"(?!Auto)\w+Tokenizer(Fast)?|TokenizersBackend|PythonBackend",
}
MAX_ENTRIES = 2**13  # of a list or dict, such as the added tokens
# Smallest and largest values of settings of `generate()` that a folder may hold, whoever calls may choose others.
GENERATION_LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1, 64)),
    **dict.fromkeys(("max_length", "max_new_tokens"), (1, 1024)),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size"), (0, 1024)),
    **dict.fromkeys(("length_penalty", "diversity_penalty"), (-100, 100)),
    **dict.fromkeys(("temperature", "repetition_penalty"), (0, 1000)),
    **dict.fromkeys(("top_p", "min_p", "typical_p"), (0, 1)),
    "top_k": (0, 2**22),
    "max_time": (0, 1e6),
}
WHOLE_NUMBERS = re.compile(r"num_\w+|max_(length|new_tokens)|min_(length|new_tokens)|no_repeat_ngram_size|top_k")
# Files that transformers would read instead of, or besides, those of a captioner.
REFUSED_FILES = {
    r"adapter_config\.json": "an adapter is loaded by peft.PeftModel.from_pretrained(model, FOLDER), after its model",
    r"audio_tokenizer_config\.json|chat_template\.json": "a captioner has no such file",
    r"shard-\d+-model-.*\.safetensors": "weights are read from model.safetensors",
}
# Files that are read, whose links must not leave the folder.
READ = re.compile(r".*\.(json|safetensors|jinja|onnx)|additional_chat_templates|onnx")


def check_folder(path: Path) -> None:
    """Check the files of a captioner's folder; ids on the Hub are left alone.

    Raises:
        ValueError: A file is a link that leaves the folder, is no JSON object, is too large, or has an entry at which
            transformers would open or fetch something else.
    """
    if not path.is_dir():
        return
    check_links(path)
    for name in os.listdir(path):
        for pattern, advice in REFUSED_FILES.items():
            if re.fullmatch(pattern, name):
                raise ValueError(f"{str(path / name)!r} is not read: {advice}. Remove it to load the captioner.")
    for name, refused in REFUSED_ENTRIES.items():
        if not (path / name).is_file():
            continue
        entries = read_json(path / name)
        for entry, value in entries.items():
            if entry in CLASSES and value and not re.fullmatch(CLASSES[entry], str(value)):
                raise ValueError(f"{str(path / name)!r} names the {entry} {value!r:.60}, which is none of a captioner.")
            if isinstance(value, dict | list) and len(value) > MAX_ENTRIES and not name.endswith("index.json"):
                raise ValueError(f"{str(path / name)!r} has {len(value)} values in {entry!r:.60}.")
            # Code of this folder runs where the caller trusts it; "repository--module" names code of another one.
            is_foreign_code = entry == "auto_map" and "--" in str(value)
            if is_foreign_code or (value and re.fullmatch(refused, entry)):
                raise ValueError(
                    f"{str(path / name)!r} has an entry {entry!r:.60}, which a captioner doesn't need and which could "
                    "open other files or addresses. Remove it to load the captioner."
                )
    index = path / "model.safetensors.index.json"
    if index.is_file():
        _check_shards(index)
    _check_tokenizer(path)


def check_generation(settings: Mapping[str, Any], vocab_size: int) -> None:
    """Check the settings of `generate()` that a folder holds.

    Raises:
        ValueError: A number is no number or out of its range, or an id of a token is not in the vocabulary.
    """
    for name, value in settings.items():
        if value is None:
            continue
        if name in GENERATION_LIMITS:
            smallest, largest = GENERATION_LIMITS[name]
            kinds = int if WHOLE_NUMBERS.fullmatch(name) else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not smallest <= value <= largest:
                raise ValueError(
                    f"The stored generation settings have {name}={value!r}; it must be a number from {smallest} to "
                    f"{largest}. Correct the file, and give larger numbers to generate()."
                )
        elif re.fullmatch(r"\w+_token_id|\w+_ids|suppress_tokens|begin_suppress_tokens", name):
            _check_ids(name, value, vocab_size)


def check_links(folder: Path) -> None:
    """Raise a ValueError if a file that is read is a link to somewhere else, or no file.

    Links within the Hub's cache are right.
    """
    root = folder.resolve()
    # In the cache, REPOSITORY/snapshots/COMMIT/file is a link to REPOSITORY/blobs/hash.
    cache = next((parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"), root)
    for entry in os.scandir(folder):
        if not READ.fullmatch(entry.name):
            continue
        target = Path(entry.path).resolve()
        if not any(target.is_relative_to(inside) for inside in (root, cache)):
            raise ValueError(f"{entry.path!r} is a link that leaves the folder. Put the file itself there.")
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise ValueError(f"{entry.path!r} is no file, but a pipe or a device.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        ValueError: It is no JSON, no object, nested too deep, too large, or holds NaN or infinity.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{str(path)!r} is larger than {MAX_JSON_BYTES // 2**20} MiB.")
    data = path.read_bytes()
    refuse_pointer(path, data)
    try:
        content = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:
        reason = "it is nested too deep" if isinstance(e, RecursionError) else str(e)
        raise ValueError(f"{str(path)!r} is not valid JSON: {reason}.") from e
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}, but must hold a JSON object, {{…}}.")
    check_depth(content, repr(str(path)))
    return content


def refuse_pointer(path: Path, data: bytes) -> None:
    """Raise a ValueError if the content of a file, or its beginning, is that of a pointer of git-lfs."""
    if data.startswith(LFS_POINTER):
        raise ValueError(f"{str(path)!r} is a pointer of git-lfs, not the file itself. Run `git lfs pull`.")


def check_depth(value: Any, name: str, depth: int = MAX_DEPTH) -> None:
    """Raise a ValueError if lists and dicts are nested deeper than `depth`."""
    if isinstance(value, dict | list | tuple):
        if depth == 0:
            raise ValueError(f"{name} is nested too deep: at most {MAX_DEPTH} levels are read.")
        for item in value.values() if isinstance(value, dict) else value:
            check_depth(item, name, depth - 1)


@contextmanager
def one_line_errors(source: Any) -> Iterator[None]:
    """Turn any error about a damaged folder into a ValueError of one line; other errors of the machine pass.

    Args:
        source: The folder, named in the error.
    """
    try:
        yield
    except ImportError:
        raise
    except BaseException as e:
        # OutOfMemoryError is torch's, for a GPU. PanicException is that of tokenizers, which is no Exception.
        name = type(e).__name__
        if name == "OutOfMemoryError" or not (isinstance(e, Exception) or name == "PanicException"):
            raise
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        is_foreign = isinstance(e, json.JSONDecodeError | UnicodeError) or not isinstance(e, ValueError | OSError)
        if not is_foreign and len(lines) == 1 and len(lines[0]) <= MAX_MESSAGE:
            raise
        if isinstance(e, OSError) and e.errno is not None:
            raise
        reason = " ".join(lines[:3]) or "no reason is given"
        if len(reason) > MAX_MESSAGE:  # a stranger's value may be long
            reason = f"{reason[: MAX_MESSAGE - 100]} … {reason[-90:]}"
        if isinstance(e, OSError):
            raise OSError(reason) from e
        if not is_foreign and len(lines) == 1:
            raise ValueError(reason) from e
        raise ValueError(f"{str(source)!r} can't be loaded, it is damaged ({name}: {reason})") from e


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _check_ids(name: str, value: Any, vocab_size: int, depth: int = 3) -> None:
    """Raise a ValueError unless a value is an id of the vocabulary, or a list of ids, or of lists of them."""
    if isinstance(value, list | tuple) and depth > 0:
        for item in value:
            _check_ids(name, item, vocab_size, depth - 1)
    elif type(value) is not int or not 0 <= value < vocab_size:
        raise ValueError(
            f"The stored generation settings have {name}={value!r}; the ids of tokens are from 0 to {vocab_size - 1}."
        )


def _check_shards(index: Path) -> None:
    """Raise a ValueError unless an index of weights names files beside it."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{str(index)!r} has no weight_map.")
    for name in files.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"{str(index)!r} names the file {name!r}; it must be a safetensors file beside it.")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{str(index)!r} names {name!r}, which is not there.")


def _check_tokenizer(folder: Path) -> None:
    """Raise a ValueError if the tokenizer's file is larger than the vocabulary of the configuration can need."""
    tokenizer, config = folder / "tokenizer.json", folder / "config.json"
    if not tokenizer.is_file():
        return
    words = read_json(config).get("vocab_size") if config.is_file() else None
    limit = 2**20 + 512 * (words if isinstance(words, int) else 0)  # bytes an entry, merges included
    if tokenizer.stat().st_size > min(limit, 2**26):
        raise ValueError(f"{str(tokenizer)!r} is larger than a vocabulary of {words} words needs.")
    with tokenizer.open("rb") as file:
        refuse_pointer(tokenizer, file.read(len(LFS_POINTER)))
