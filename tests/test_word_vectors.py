"""Word vectors of text files as initial embeddings."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_captioner.training.word_vectors import load_word_vectors

VOCABULARY = {"<unk>": 0, "dog": 1, "runs": 2, "cat": 3}


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("header", ["", "4 3\n"], ids=["GloVe", "word2vec"])
def test_known_words_get_their_vectors(tmp_path: Path, header: str, compress: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "vectors.txt"
    file.write_bytes(compress(f"{header}the 1 2 3\ncat 4 5e-1 -6\nat name 1 1 1\ndog 7 8 9 \n".encode()))
    embedding = nn.Embedding(4, 3)
    before = embedding.weight.detach().clone()
    assert load_word_vectors(file, embedding, VOCABULARY) == 2
    assert embedding.weight[[3, 1]].tolist() == [[4, 0.5, -6], [7, 8, 9]]
    assert torch.equal(embedding.weight[[0, 2]], before[[0, 2]]) and embedding.weight.requires_grad


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"dog 1 2 nan\n", "Line 1 .* not finite"),
        (b"PK\x03\x04\0", "Line 1 .* is no word with its numbers. Give a text file, unpacked"),
        (gzip.compress(b"dog 1 2 3\n" * 9, mtime=0)[:-9], "is damaged behind line 9: Compressed file ended"),
        (gzip.compress(bytes(10**7), mtime=0), "Line 1 .* is no word with its numbers"),
        (b"dog 1 2 3 4\n", "Line 1 .* has 4 numbers, where embedding_size is 3"),
        (b"dog 1 2\n", "Line 1 .* has 2 numbers"),
        (b"dog 1 2 x\n", "Line 1 .* is no word with 3 numbers"),
        (b"chien 1 2 3\n", "has none of the 4 words"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "vectors.txt").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load_word_vectors(tmp_path / "vectors.txt", nn.Embedding(4, 3), VOCABULARY)
    with pytest.raises(FileNotFoundError, match="No word vectors at"):
        load_word_vectors(tmp_path / "nowhere.txt", nn.Embedding(4, 3), VOCABULARY)
