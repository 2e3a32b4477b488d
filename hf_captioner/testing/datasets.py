"""Contract test for authors of data sets: `check_dataset` checks splits, columns, captions and images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset, DatasetDict

from ..data.collator import CaptionCollator
from ..data.rows import check_captions, open_row, undecoded
from ..errors import first_line
from ..model.processing_captioner import CaptionerProcessor
from .rules import require

DATA_CONFIG = {
    **{"input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"},
    **{"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}


def check_dataset(part: Callable[..., Any], **kwargs: Any) -> None:
    """Check that a data set keeps the contract in `data/datasets.py`.

    `part` is the function that `DATASETS` would hold, and `kwargs` are its further arguments. Every row is read, so
    give arguments that keep the data set small if the part has some.

    Raises:
        AssertionError: The part breaks the rule that the message names.
    """
    splits = part(None, **kwargs)
    has_splits = isinstance(splits, DatasetDict) and len(splits) > 0
    require(has_splits, "split=None gives a DatasetDict of all splits", type(splits))
    try:
        part("no such split", **kwargs)
    except ValueError as e:
        require(all(name in str(e) for name in splits), "an unknown split is refused by naming those there are", e)
    else:
        require(False, "an unknown split is refused by a ValueError")
    for name, expected in splits.items():
        dataset = part(name, **kwargs)
        require(isinstance(dataset, Dataset) and len(dataset) > 0, f"split {name!r} is a Dataset with rows")
        missing = {"image", "captions", "image_id"} - set(dataset.column_names)
        require(not missing, "columns are image, captions and image_id", f"no {', '.join(sorted(missing))}")
        _check_rows(dataset, name)
        is_same = all(dataset[column][:] == expected[column][:] for column in ("captions", "image_id"))
        require(is_same, "each time, and with split=None, the rows are the same in the same order")


def _check_rows(dataset: Any, split: str) -> None:
    """Check the columns of a split, that all its images open, and that its rows make a batch."""
    names, captions = dataset["image_id"][:], dataset["captions"][:]
    require(all(isinstance(name, str) for name in names), "image_id is a string")
    require(len(set(names)) == len(names), f"no two images of a split have the same image_id ({split!r})")
    are_lists = all(isinstance(row, list) and all(isinstance(caption, str) for caption in row) for row in captions)
    require(are_lists, "captions are a list of strings")
    rows = undecoded(dataset)
    try:
        check_captions(dataset)
        for row in rows:
            open_row(row)
    except (ValueError, TypeError, KeyError) as e:
        require(False, "every image opens and has captions with words", first_line(e))
    all_captions = (caption for row in captions for caption in row)
    processor = CaptionerProcessor.from_captions(all_captions, DATA_CONFIG, min_count=1)
    batch = CaptionCollator(processor)([rows[0], rows[len(rows) - 1]])
    require(batch["pixel_values"].shape == (2, 3, 32, 32) and len(batch["labels"]) == 2, "rows become a batch")
