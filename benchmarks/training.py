"""How fast a decoder is trained on cached cells, as ratios within one run.

    python benchmarks/training.py --out benchmarks/results/training.json

A step of Show, Attend and Tell on 16 images with 5 captions each: keys computed once an image, the input-to-hidden
product of all words at once, padding left out, gradients of recurrent weights in one product. Next to

- the same model written as the usual tutorials do: captions one by one in the batch, the cells copied for each, and the
  projection of all cells computed again for every word;
- a product of two square float32 matrices, which is what the machine can do.

FLOP are counted from the sizes, two for each multiplication with its addition, of matrix products alone (see
`flop_of_step`); backward counts twice forward, but what comes from the cells needs no gradient for them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from timing import seconds_of, write_result
from torch import Tensor, nn
from torch.nn import functional
from tutorial import START, C, P, TutorialDecoder

from hf_captioner import CaptionerModel

PAD, IGNORED = 1, -100


class TutorialTraining(TutorialDecoder):
    """Words that are known read step by step, captions that are over left out."""

    def forward(self, cells: Tensor, labels: Tensor) -> Tensor:
        """The loss of captions `(N, T)`, one a row of cells `(N, P, C)`."""
        lengths, order = (labels != IGNORED).sum(1).sort(descending=True)
        cells, labels = cells[order], labels[order]
        start = torch.full_like(labels[:, :1], START)
        words = self.embedding(torch.cat([start, labels[:, :-1].clamp(min=PAD)], 1))
        hidden, cell = self.start(cells)
        scores = words.new_zeros(*labels.shape, self.output.out_features)
        for step in range(int(lengths[0])):
            running = int((lengths > step).sum())
            hidden, cell, seen = hidden[:running], cell[:running], cells[:running]
            hidden, cell = self.read(words[:running, step], hidden, cell, seen)
            scores[:running, step] = self.output(hidden)
        return functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def flop_of_step(num_images: int, num_words: int, size: int, vocab_size: int) -> dict[str, float]:
    """Multiplications and additions of a step's matrix products, forward and backward.

    Of a word: the gates from the word, the context and h; the query's projection; the sum of the cells, whose backward
    is a product for the weights alone; and the scores of all words. Of an image: the keys and the first state, with no
    gradient for the cells. Softmax, tanh and the additive score are not counted.
    """
    with_both = (
        4 * size * (size + C + size)  # gates
        + size * size  # query
        + size * vocab_size  # scores of words
    )
    word = 2 * 3 * with_both + 2 * 2 * P * C
    image = 2 * 2 * (P * C * size + C * 2 * size)
    return {"word": word, "image": image, "step": word * num_words + image * num_images}


def main() -> None:
    """Time them in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=16)
    parser.add_argument("--num_captions", type=int, default=5)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=2539)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    size, vocab_size = arguments.size, arguments.vocab_size
    num_images, num_captions = arguments.num_images, arguments.num_captions
    model = CaptionerModel.from_encoder(
        "mobilenetv2_100", pretrained=False, vocab_size=vocab_size, hidden_size=size, attention_size=size,
        embedding_size=size, doubly_stochastic_weight=0.0,
    ).train()  # fmt: skip
    model.freeze_encoder()
    tutorial = TutorialTraining(size, vocab_size, torch.relu)
    cells = torch.randn(num_images, P, C).relu()
    # Lengths as Flickr8k's captions have them: about 12 words with <end>, from 5 to 25.
    lengths = (torch.randn(num_images, num_captions) * 3.7 + 11.8).round().clamp(5, 25).int()
    labels = torch.randint(4, vocab_size, (num_images, num_captions, int(lengths.max())))
    labels[torch.arange(labels.shape[2]) >= lengths.unsqueeze(2)] = IGNORED
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

    def by_tutorial() -> None:
        step(tutorial, tutorial(cells.repeat_interleave(num_captions, 0), labels.flatten(0, 1)))

    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)

    def product() -> None:
        torch.mm(left, right)

    seconds = seconds_of({"ours": ours, "tutorial": by_tutorial, "product": product}, arguments.repeats)
    num_words = int(lengths.sum())
    flop = flop_of_step(num_images, num_words, size, vocab_size)
    rate, best = flop["step"] / seconds["ours"], 2 * 2048**3 / seconds["product"]
    count = num_images * num_captions
    write_result(
        arguments.out,
        {
            "settings": {name: value for name, value in vars(arguments).items() if name != "out"},
            "words": num_words,
            "seconds": seconds,
            "captions_per_second": count / seconds["ours"],
            "tutorial_captions_per_second": count / seconds["tutorial"],
            "times_the_tutorial": seconds["tutorial"] / seconds["ours"],
            "flop": flop,
            "gflop_per_second": rate / 1e9,
            "product_gflop_per_second": best / 1e9,
            "share_of_product": rate / best,
        },
    )


if __name__ == "__main__":
    main()
