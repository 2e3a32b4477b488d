"""Summary of a data set before training on it: counts, vocabulary, and what looks wrong."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from datasets import Dataset
from tqdm.auto import tqdm

from ..model.captions import build_tokenizer
from .rows import open_row

MIN_COUNTS = (1, 2, 3, 5, 10)
FEW_WORDS = 2  # a caption with no more words is reported


def count_lines(splits: Mapping[str, Dataset]) -> Iterator[str]:
    """Yield a table of the images, captions and caption lengths of each split, and the size of the vocabulary."""
    split_words = caption_words(splits)
    rows = [("split", "images", "captions", "per image", "words per caption", "median", "95 %")]
    for name, images in split_words.items():
        num_captions = [len(captions) for captions in images]
        lengths = sorted(len(words) for captions in images for words in captions)
        if not lengths:
            rows.append((name, str(len(images)), "0", "0", "", "", ""))
            continue
        percentile = lengths[int(0.95 * (len(lengths) - 1))]
        counts = (str(len(images)), str(len(lengths)), _range(num_captions), _range(lengths))
        rows.append((name, *counts, f"{statistics.median(lengths):g}", str(percentile)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()

    training = next(name for name in ("train", *split_words) if name in split_words)
    word_counts = Counter(word for captions in split_words[training] for words in captions for word in words)
    total = max(1, word_counts.total())
    yield f"Vocabulary of {training} by how often a word must occur (min_count):"
    for min_count in MIN_COUNTS:
        kept = [count for count in word_counts.values() if count >= min_count]
        yield f"  {min_count:>2}: {len(kept)} words, {sum(kept) / total:.2%} of all that is written"


def near_empty_lines(splits: Mapping[str, Dataset]) -> Iterator[str]:
    """Yield a line for each image without a caption and for each caption of very few words."""
    for name, images in caption_words(splits).items():
        ids, texts = splits[name]["image_id"][:], splits[name]["captions"][:]
        for image_id, captions, words_of_captions in zip(ids, texts, images, strict=True):
            if not captions:
                yield f"{name}: {image_id} has no caption."
            for caption, words in zip(captions, words_of_captions, strict=True):
                if len(words) <= FEW_WORDS:
                    yield f"{name}: {image_id} has the caption {caption!r} of {len(words)} words."


def image_lines(splits: Mapping[str, Dataset]) -> Iterator[str]:
    """Open every image of undecoded rows; yield the sizes of each split's images and a line per unreadable one."""
    for name, dataset in splits.items():
        sizes: Counter[tuple[int, int]] = Counter()
        problems = []
        for row in tqdm(dataset, desc=f"Opening the images of {name}", unit="image", leave=False, disable=None):
            try:
                sizes[open_row(row).size] += 1
            except ValueError as e:
                problems.append(str(e))
        if sizes:
            (width, height), count = sizes.most_common(1)[0]
            widths, heights = zip(*sizes, strict=True)
            yield (
                f"{name}: {sizes.total()} images can be read, {_range(widths)} pixels wide and {_range(heights)} high; "
                f"{count} are {width}x{height}."
            )
        yield from (f"{name}: {problem}" for problem in problems)


def caption_words(splits: Mapping[str, Dataset]) -> dict[str, list[list[list[str]]]]:
    """Return the words of each caption of each image by split, as the word tokenizer separates them."""
    captions = {name: dataset["captions"][:] for name, dataset in splits.items()}
    all_captions = [caption for images in captions.values() for image in images for caption in image]
    tokenizer = build_tokenizer(all_captions, min_count=1).backend_tokenizer

    def words(caption: str) -> list[str]:
        text = tokenizer.normalizer.normalize_str(caption)
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    return {name: [[words(caption) for caption in image] for image in images] for name, images in captions.items()}


def _range(values: Sequence[int]) -> str:
    """Return the smallest and the largest value in words, such as `3 to 7`."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
