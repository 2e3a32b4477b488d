"""Layouts in which a decoder reads the words of a batch of captions: padded (`FullOrder`) or packed (`PackedOrder`)."""

# B: images, K: captions of an image, N = B·K: captions, T: words, R: rows

from __future__ import annotations

import torch
from torch import Tensor

from .decoder_interface import Memory, State


class FullOrder:
    """Order that reads word t of every caption before word t + 1 of any, padding included.

    Row `t · N + n` is word t of caption n. At every step, captions fill a block (B, K).

    Args:
        num_images: Number of images, B.
        num_captions: Number of captions of each image, K.
        num_words: Number of words of each caption, padding included, T.
    """

    def __init__(self, num_images: int, num_captions: int, num_words: int) -> None:
        self.num_words = num_words
        self.blocks = [(num_images, num_captions)] * num_words
        self.words: Tensor | None = None

    def sort_memory(self, memory: Memory) -> Memory:
        """Return the memory with its images in the order in which this class reads them."""
        return memory

    def sort_state(self, state: State) -> State:
        """Return the decoder's state, tensors `(N, ·)`, with its captions in the order in which they are read."""
        return state

    def pack(self, words: Tensor) -> Tensor:
        """Put words in the order in which they are read, `(N, T) -> (R,)`."""
        return words.T.flatten()

    def trim(self, rows: Tensor) -> Tensor:
        """Return the rows as they are, since without packing every row belongs to a word: `(R, X) -> (words, X)`."""
        return rows

    def unpack(self, rows: Tensor) -> Tensor:
        """Return results for each word by caption: `(words, X) -> (N, T, X)`."""
        return rows.unflatten(0, (self.num_words, -1)).transpose(0, 1)


class PackedOrder(FullOrder):
    """Order that reads word t of every caption before word t + 1 of any, and leaves out the padding.

    It resembles `torch.nn.utils.rnn.pack_padded_sequence`, for images with several captions each. Images are sorted by
    their longest caption, and the captions of an image by length, so that the captions that still run at step t fill
    the block of the first b images and their first k captions. With lengths [[2, 4], [1, 1], [3, 2]], for example, the
    order of images is 0, 2, 1, their captions are sorted to [[4, 2], [3, 2], [1, 1]], and the blocks are (3, 2),
    (2, 2), (2, 1), (1, 1). The rows of all blocks one after the other are R = 6 + 4 + 2 + 1.

    A block is a rectangle, so it may also hold captions that are over, of an image that has fewer than k left; `trim`
    removes their rows.

    Args:
        lengths: Number of words of each caption, `(N,)`.
        num_captions: Number of captions of each image, K.
        num_words: Number of words of each caption, padding included, T.
        share_first: Whether the captions of an image have the same first word and first state. Their first step is
            then taken once, as block (B, 1), and serves all K.
    """

    words: Tensor  # index among N·T of each word that is read

    def __init__(self, lengths: Tensor, num_captions: int, num_words: int, share_first: bool = False) -> None:
        self.num_words = num_words
        sorted_lengths, caption_order = lengths.view(-1, num_captions).sort(dim=1, descending=True, stable=True)
        self.images = sorted_lengths[:, 0].argsort(descending=True, stable=True)  # (B,)
        sorted_lengths, caption_order = sorted_lengths[self.images], caption_order[self.images]
        self.captions = self.images.unsqueeze(1) * num_captions + caption_order  # (B, K), indices among N

        runs = sorted_lengths.cpu().unsqueeze(2) > torch.arange(num_words)  # (B, K, T)
        images_left, captions_left = runs[:, 0].sum(0).tolist(), runs.sum(1).amax(0).tolist()
        self.blocks = [(b, k) for b, k in zip(images_left, captions_left, strict=True) if b]
        # For each row of each block, the index among N·T of the word that is read there.
        steps = [self.captions[:b, :k].flatten() * num_words + t for t, (b, k) in enumerate(self.blocks)]
        words = torch.cat(steps)
        rows = torch.arange(len(words), device=words.device)
        if share_first:
            b, k = self.blocks[0]
            self.blocks[0], steps[0] = (b, 1), steps[0][::k]
            # Words of the first step have the row of their image; the later rows move up.
            rows = torch.cat([rows[: b * k] // k, rows[b * k :] - b * (k - 1)])
        self.inputs = torch.cat(steps)  # (R,)
        is_word = (words % num_words < lengths[words // num_words]).nonzero().squeeze(1)
        self.rows, self.words = rows[is_word], words[is_word]  # (words,) each

    def sort_memory(self, memory: Memory) -> Memory:
        """Return the memory with its images in the order in which this class reads them."""
        return memory.take(self.images)

    def sort_state(self, state: State) -> State:
        """Return the decoder's state, tensors `(N, ·)`, with its captions in the order in which they are read."""
        return tuple(part[self.captions.flatten()] for part in state)

    def pack(self, words: Tensor) -> Tensor:
        """Put words in the order in which they are read, `(N, T) -> (R,)`."""
        return words.flatten()[self.inputs]

    def trim(self, rows: Tensor) -> Tensor:
        """Return the rows that belong to a word, without those of captions that are over: `(R, X) -> (words, X)`."""
        return rows.index_select(0, self.rows)

    def unpack(self, rows: Tensor) -> Tensor:
        """Return results for each word by caption, zero after a caption's end: `(words, X) -> (N, T, X)`."""
        num_words = self.captions.numel() * self.num_words
        values = rows.new_zeros(num_words, *rows.shape[1:]).index_copy_(0, self.words, rows)
        return values.unflatten(0, (-1, self.num_words))
