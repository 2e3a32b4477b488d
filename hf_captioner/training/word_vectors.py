"""Pretrained word vectors, such as GloVe's, as initial word embeddings."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..errors import first_line

MAX_CHARACTERS = 2**17  # of a line; 300 numbers take some 3,000


def load_word_vectors(path: str | Path, embedding: nn.Embedding, vocabulary: Mapping[str, int]) -> int:
    """Copy the vectors of a text file into an embedding; words that the file lacks keep their random vectors.

    Args:
        path: Text file, which gzip may have compressed, with a word and its numbers per line, as GloVe and word2vec
            have it. The first line may hold the number and the size of the vectors, as in word2vec's format.
        embedding: Embedding of shape `(V, E)`.
        vocabulary: Row of each word in the embedding.

    Returns:
        Number of words found.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The vectors have another size, a line is not a vector, the file is damaged or no text, or no word
            of the vocabulary is found.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No word vectors at {str(path)!r}. Give a text file in GloVe's or word2vec's format.")
    size, found = embedding.embedding_dim, {}
    for number, line in enumerate(_read_lines(Path(path)), start=1):
        word, *numbers = line.rstrip().rsplit(" ", size)
        if len(numbers) == 1 and number == 1:
            continue  # word2vec's header
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
            if not np.isfinite(found[word]).all():
                raise ValueError(f"Line {number} of {str(path)!r} has a number that is not finite.")
    if not found:
        raise ValueError(
            f"{str(path)!r} has none of the {len(vocabulary)} words of the captions. Is it of their language?"
        )
    rows = torch.tensor([vocabulary[word] for word in found])
    with torch.no_grad():
        embedding.weight[rows] = torch.from_numpy(np.stack(list(found.values()))).to(embedding.weight)
    return len(found)


def _read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, which gzip may have compressed.

    Raises:
        ValueError: The file is not text, or damaged.
    """
    with path.open("rb") as file:
        start = file.read(2)
        file.seek(0)
        number = 0
        try:
            lines = gzip.GzipFile(fileobj=file) if start == b"\x1f\x8b" else file
            while line := lines.readline(MAX_CHARACTERS):
                number += 1
                if b"\0" in line or len(line) == MAX_CHARACTERS:
                    raise ValueError(
                        f"Line {number} of {str(path)!r} is no word with its numbers. Give a text file, unpacked."
                    )
                yield line.decode("utf-8", errors="replace")
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise ValueError(f"{str(path)!r} is damaged behind line {number}: {first_line(e)}") from e
