"""How fast captions are decoded, as ratios within one run.

    python benchmarks/decoding.py --out benchmarks/results/decoding.json

Beam search by `generate()` on a batch, next to

- a beam search as the usual tutorials write it: image by image, the cells copied for each beam, and the projection of
  all cells computed again for every word and beam;
- transformers' own beam search on the same model;
- ResNet-101 at 224 pixels on the same images.

Weights are random: no caption ends before the longest length, and every word costs what it costs.

`float32` is what the bars are about. `bfloat16_products` are the same programs, the tutorial's and ResNet-101 among
them, after `torch.set_float32_matmul_precision("medium")`: ratios are between things of one precision alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from timing import bfloat16_products, seconds_of, write_result
from torch import Tensor
from tutorial import END, START, C, P, TutorialDecoder

from hf_captioner import CaptionerModel
from hf_captioner.model import modeling_captioner
from hf_captioner.model.modeling_captioner import CaptionerEncoderOutput


class TutorialSearch(TutorialDecoder):
    """Beam search, image by image."""

    @torch.no_grad()
    def caption(self, cells: Tensor, num_beams: int, max_words: int) -> list[int]:
        """Beam search for one image, cells `(1, P, C)`."""
        vocab_size = self.output.out_features
        cells = cells.expand(num_beams, P, C)
        words = torch.full((num_beams, 1), START)
        scores = torch.zeros(num_beams, 1)
        done: list[tuple[float, list[int]]] = []
        hidden, cell = self.start(cells)
        for step in range(max_words):
            hidden, cell = self.read(self.embedding(words[:, -1]), hidden, cell, cells)
            total = scores + self.output(hidden).log_softmax(1)
            flat = total[0] if step == 0 else total.view(-1)
            best, places = flat.topk(len(words), 0)
            parents, following = places // vocab_size, places % vocab_size
            words = torch.cat([words[parents], following.unsqueeze(1)], 1)
            going = [place for place, word in enumerate(following.tolist()) if word != END]
            done += [(best[place].item(), words[place].tolist()) for place in range(len(words)) if place not in going]
            if not going:
                break
            parents = parents[going]
            words, scores = words[going], best[going].unsqueeze(1)
            hidden, cell, cells = hidden[parents], cell[parents], cells[parents]
        done += [(score.item(), row.tolist()) for score, row in zip(scores, words, strict=True)]
        return max(done)[1]


def main() -> None:
    """Time them in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_beams", type=int, default=5)
    parser.add_argument("--num_words", type=int, default=20)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=2539)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    size, vocab_size, num_words = arguments.hidden_size, arguments.vocab_size, arguments.num_words
    model = CaptionerModel.from_encoder(
        "mobilenetv2_100", pretrained=False, vocab_size=vocab_size, hidden_size=size, attention_size=size,
        embedding_size=size,
    ).eval()  # fmt: skip
    tutorial = TutorialSearch(size, vocab_size, torch.tanh).eval()
    encoder = timm.create_model("resnet101", pretrained=False, num_classes=0, global_pool="").eval()
    images = torch.randn(arguments.batch_size, 3, 224, 224)
    cells = torch.randn(arguments.batch_size, P, C).relu()

    def generate(**kwargs: Any) -> Tensor:
        return model.generate(  # type: ignore[no-any-return]
            encoder_outputs=CaptionerEncoderOutput.of(cells), num_beams=arguments.num_beams, max_length=num_words + 1,
            suppress_tokens=None, **kwargs,
        )  # fmt: skip

    def by_transformers() -> Tensor:
        with mock.patch.object(modeling_captioner, "can_drop_images", lambda *_: False):
            return generate()

    def encode() -> None:
        with torch.no_grad():
            encoder(images)

    def by_tutorial() -> list[list[int]]:
        return [tutorial.caption(image[None], arguments.num_beams, num_words) for image in cells]

    assert generate().shape[1] == num_words + 1
    assert all(len(words) == num_words + 1 for words in by_tutorial())
    jobs = {"generate": generate, "transformers": by_transformers, "tutorial": by_tutorial, "resnet101": encode}

    def measured() -> dict[str, Any]:
        seconds = seconds_of(jobs, arguments.repeats)
        return {
            "seconds": seconds,
            "captions_per_second": arguments.batch_size / seconds["generate"],
            "times_the_tutorial": seconds["tutorial"] / seconds["generate"],
            "times_transformers": seconds["transformers"] / seconds["generate"],
            "share_of_resnet101": seconds["generate"] / seconds["resnet101"],
        }

    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    result = {"settings": settings, "float32": measured()}
    with bfloat16_products():
        write_result(arguments.out, result | {"bfloat16_products": measured()})


if __name__ == "__main__":
    main()
