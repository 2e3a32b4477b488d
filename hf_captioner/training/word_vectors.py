"""Word vectors trained elsewhere, for the embedding of a new captioner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn


def load_word_vectors(path: str | Path, embedding: nn.Embedding, vocabulary: Mapping[str, int]) -> int:
    """Put the vectors of a text file in the place of the random ones of the words that it has.

    Args:
        path: lines of a word and its numbers, as GloVe has them; word2vec's text form, which begins with a line of
            two numbers, is the same otherwise.
        embedding: `(V, E)`.
        vocabulary: words with their rows.

    Returns:
        The number of words found.

    Raises:
        FileNotFoundError: no such file.
        ValueError: vectors of another size, or lines that are none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No word vectors at {str(path)!r}. Give a text file of GloVe's or word2vec's form.")
    size, found = embedding.embedding_dim, {}
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            word, *numbers = line.rstrip().rsplit(" ", size)
            if len(numbers) == 1 and number == 1:
                continue  # how many words of what size
            if len(numbers) != size or (number < 3 and len(line.split()) != size + 1):
                raise ValueError(
                    f"Line {number} of {str(path)!r} has {len(line.split()) - 1} numbers, where embedding_size is "
                    f"{size}. Set embedding_size to the size of the vectors."
                )
            if word in vocabulary:
                try:
                    found[word] = np.asarray(numbers, dtype=np.float32)
                except ValueError as e:
                    raise ValueError(f"Line {number} of {str(path)!r} is no word with {size} numbers: {e}.") from e
    if not found:
        raise ValueError(
            f"{str(path)!r} has none of the {len(vocabulary)} words of the captions. Is it of their language?"
        )
    rows = torch.tensor([vocabulary[word] for word in found])
    with torch.no_grad():
        embedding.weight[rows] = torch.from_numpy(np.stack(list(found.values()))).to(embedding.weight)
    return len(found)
