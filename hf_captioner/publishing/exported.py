"""The exported captioner beside a captioner's weights: where it is, and whether it was made from them.

This module imports neither torch nor onnxruntime.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from ..model.folder_check import check_links, read_json

BESIDE = "onnx"  # the folder within the captioner's
CONFIG = "captioner.json"
# Files of a captioner from which an export is made.
SOURCES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "*.safetensors")
SAMPLE = 2**19  # bytes at either end of a file that are compared: training changes all weights


def fingerprints(folder: Path) -> dict[str, list[int]]:
    """Return the size of each file of a captioner from which an export is made, and checksums of both of its ends."""
    found = {}
    for file in sorted(file for pattern in SOURCES for file in folder.glob(pattern)):
        size = file.stat().st_size
        with file.open("rb") as content:
            beginning = zlib.crc32(content.read(SAMPLE))
            content.seek(max(content.tell(), size - SAMPLE))
            found[file.name] = [size, beginning, zlib.crc32(content.read(SAMPLE))]
    return found


def find_export(folder: Path) -> Path | None:
    """Return the folder of an exported captioner: the given one, or the one beside a captioner's weights.

    None if there is none, or if the captioner has been changed since it was exported.

    Raises:
        ValueError: A file is a link that leaves the folder, or is damaged.
    """
    if (folder / "config.json").is_file():
        check_links(folder)
        beside = folder / BESIDE
        if not (beside / CONFIG).is_file():
            return None
        check_links(beside)
        return beside if read_json(beside / CONFIG).get("source") == fingerprints(folder) else None
    return folder if (folder / CONFIG).is_file() else None
