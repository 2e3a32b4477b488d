"""Speed of training a decoder on cached cells, compared with a tutorial's code and with a matrix product.

    python benchmarks/training.py --data ../shared/flickr8k --out benchmarks/results/training.json

Each measurement is an optimizer step of Show, Attend and Tell on 16 images with 5 captions each. The package computes
the attention's keys and the cells' part of the LSTM's gates once per image, the input product once per different word,
leaves out padding, and computes the gradient of recurrent weights in one product. Captions are those of random images
of a data set. Without `--data`, words are drawn evenly from the vocabulary, so that few occur twice.

The same model is measured as tutorials write it:

- `tutorial`: each caption is a row with its own copy of the cells, and the projection of the cells is computed for
  every word. Rows are sorted by length, and finished captions are left out.
- `tutorial_padded`: every caption is read to the length of the longest.
- `tutorial_by_caption`: each caption is a batch of its own, and gradients are added up.
- `tutorial_hoisted`: as `tutorial`, with the projection computed once per caption.

The speed of the machine is that of a product of two square matrices.

FLOPs are those of matrix products, two per multiplication with its addition. Backward counts twice forward, except
that cells need no gradient. `flop` counts the model as it is defined (`flop_of_step`), and `share_of_product` relates
it to the machine's speed. `flop_done` counts what the package computes, which is less (`flop_of_ours`). It does not
count rows of finished captions, and it counts the first step, which an image's captions share, for each of them.

`bfloat16_products` repeats all measurements after `torch.set_float32_matmul_precision("medium")`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import bfloat16_products, seconds_of, write_result
from torch import Tensor, nn
from torch.nn import functional
from tutorial import START, C, P, TutorialDecoder

from hf_captioner import CaptionerImageProcessor, CaptionerModel, CaptionerProcessor, build_tokenizer, load_captions

PAD, IGNORED = 1, -100


class TutorialTraining(TutorialDecoder):
    """The tutorial's decoder, trained with teacher forcing."""

    def forward(
        self, cells: Tensor, labels: Tensor, leaves_out: bool = True, is_hoisted: bool = False, reduction: str = "mean"
    ) -> Tensor:
        """Compute the loss of captions `(N, T)`, each with its row of cells `(N, P, C)`."""
        lengths, order = (labels != IGNORED).sum(1).sort(descending=True)
        cells, labels = cells[order], labels[order]
        labels = labels[:, : int(lengths[0])]
        keys = self.cells_to_attention(cells) if is_hoisted else None
        start = torch.full_like(labels[:, :1], START)
        words = self.embedding(torch.cat([start, labels[:, :-1].clamp(min=PAD)], 1))
        hidden, cell = self.start(cells)
        scores = words.new_zeros(*labels.shape, self.output.out_features)
        for step in range(int(lengths[0])):
            running = int((lengths > step).sum()) if leaves_out else len(lengths)
            hidden, cell, seen = hidden[:running], cell[:running], cells[:running]
            hidden, cell = self.read(
                words[:running, step], hidden, cell, seen, None if keys is None else keys[:running]
            )
            scores[:running, step] = self.output(functional.dropout(hidden))
        return functional.cross_entropy(
            scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction
        )


def flop_of_step(num_images: int, num_words: int, size: int, vocab_size: int) -> dict[str, float]:
    """Count the FLOPs of a step's matrix products, forward and backward.

    Per word: the gates from the word, the context and the hidden state; the projection of the query; the context,
    whose backward is a product for the weights alone; and the logits. Per image: the keys and the first state, without
    a gradient for the cells. Softmax, tanh and the additive score are not counted.
    """
    with_both = (
        4 * size * (size + C + size)  # gates
        + size * size  # query
        + size * vocab_size  # logits
    )
    word = 2 * 3 * with_both + 2 * 2 * P * C
    image = 2 * 2 * (P * C * size + C * 2 * size)
    return {"word": word, "image": image, "step": word * num_words + image * num_images}


def flop_of_ours(num_images: int, num_words: int, num_different: int, size: int, vocab_size: int) -> float:
    """Count the FLOPs of the package: the gates take one product per different word and one per cell."""
    saved = 2 * 3 * 4 * size * C + 2 * 2 * P * C  # of a word
    repeated = 2 * 3 * 4 * size * size * (num_words - num_different)
    added = 2 * 3 * P * 4 * size  # of a word: sums of 4·size numbers a cell
    cells = 2 * 2 * P * C * 4 * size  # of an image
    step = flop_of_step(num_images, num_words, size, vocab_size)["step"]
    return step + (added - saved) * num_words + cells * num_images - repeated


def drawn_labels(num_images: int, num_captions: int, vocab_size: int) -> Tensor:
    """Draw labels `(B, K, T)` with the lengths of Flickr8k's captions: about 12 words with <end>, from 5 to 25."""
    lengths = (torch.randn(num_images, num_captions) * 3.7 + 11.8).round().clamp(5, 25).int()
    labels = torch.randint(4, vocab_size, (num_images, num_captions, int(lengths.max())))
    return labels.masked_fill(torch.arange(labels.shape[2]) >= lengths.unsqueeze(2), IGNORED)


def labels_of(data: str, num_images: int, num_captions: int) -> tuple[Tensor, int]:
    """Return labels `(B, K, T)` of random images of a training split, and the size of its vocabulary."""
    captions = load_captions(data, report=lambda _: None)["train"]["captions"][:]
    tokenizer = build_tokenizer(caption for row in captions for caption in row)
    processor = CaptionerProcessor(CaptionerImageProcessor(), tokenizer)
    rows = [row[:num_captions] for row in random.Random(0).sample(captions, num_images)]
    return processor(text=rows)["labels"], len(tokenizer)


def main() -> None:
    """Measure all programs in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data set with the captions (default: draw words)")
    parser.add_argument("--num_images", type=int, default=16)
    parser.add_argument("--num_captions", type=int, default=5)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=2539, help="words to draw from, without --data")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    size, vocab_size = arguments.size, arguments.vocab_size
    num_images, num_captions = arguments.num_images, arguments.num_captions
    if arguments.data is None:
        labels = drawn_labels(num_images, num_captions, vocab_size)
    else:
        labels, vocab_size = labels_of(arguments.data, num_images, num_captions)
    model = CaptionerModel.from_encoder(
        "mobilenetv2_100", pretrained=False, vocab_size=vocab_size, hidden_size=size, attention_size=size,
        embedding_size=size, doubly_stochastic_weight=0.0,
    ).train()  # fmt: skip
    model.freeze_encoder()
    tutorial = TutorialTraining(size, vocab_size, torch.relu)
    cells = torch.randn(num_images, P, C).relu()
    optimizers = {
        module: torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), fused=True)
        for module in (model, tutorial)
    }

    def step(module: nn.Module, loss: Tensor) -> None:
        loss.backward()
        optimizers[module].step()
        optimizers[module].zero_grad()

    def ours() -> None:
        step(model, model(cells=cells, labels=labels).loss)

    copies, captions = cells.repeat_interleave(num_captions, 0), labels.flatten(0, 1)
    num_words, count = int((labels != IGNORED).sum()), len(captions)
    num_different = len(model.prepare_decoder_input_ids_from_labels(captions).unique())

    def by_tutorial(**kwargs: Any) -> None:
        step(tutorial, tutorial(copies, captions, **kwargs))

    def by_caption() -> None:
        for own_cells, caption in zip(copies.split(1), captions.split(1), strict=True):
            (tutorial(own_cells, caption, reduction="sum") / num_words).backward()
        optimizers[tutorial].step()
        optimizers[tutorial].zero_grad()

    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    tutorials: dict[str, Callable[[], None]] = {
        "tutorial": by_tutorial,
        "tutorial_padded": lambda: by_tutorial(leaves_out=False),
        "tutorial_by_caption": by_caption,
        "tutorial_hoisted": lambda: by_tutorial(is_hoisted=True),
    }
    flop = flop_of_step(num_images, num_words, size, vocab_size)
    flop_done = flop_of_ours(num_images, num_words, num_different, size, vocab_size)

    def measured() -> dict[str, Any]:
        jobs = {"ours": ours, "product": lambda: torch.mm(left, right), **tutorials}
        seconds = seconds_of(jobs, arguments.repeats)
        best = 2 * 2048**3 / seconds["product"]
        return {
            "seconds": seconds,
            "captions_per_second": {name: count / seconds[name] for name in ("ours", *tutorials)},
            "times_as_many_as": {name: seconds[name] / seconds["ours"] for name in tutorials},
            "gflop_per_second": flop["step"] / seconds["ours"] / 1e9,
            "product_gflop_per_second": best / 1e9,
            "share_of_product": flop["step"] / seconds["ours"] / best,
            "share_of_product_by_flop_done": flop_done / seconds["ours"] / best,
        }

    settings = {name: value for name, value in vars(arguments).items() if name != "out"} | {"vocab_size": vocab_size}
    counted = {"words": num_words, "different_words": num_different, "flop": flop, "flop_done": flop_done}
    result = {"settings": settings, **counted, "float32": measured()}
    with bfloat16_products():
        write_result(arguments.out, result | {"bfloat16_products": measured()})


if __name__ == "__main__":
    main()
