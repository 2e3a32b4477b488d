"""How fast beam search by `generate()` captions a batch of images, compared within one run.

    python benchmarks/decoding.py --out benchmarks/results/decoding.json

It is compared with

- transformers' own beam search on the same model, which keeps images in the batch until the last caption is finished;
- a beam search as in the usual tutorials: one image at a time, the cells copied for each beam, and all cells projected
  again for every word and beam;
- ResNet-101 on the same number of images of 224 pixels.

Weights are random, but captions end as those of a trained model do: at a different length for each image, and at
slightly different lengths for its beams. (Captions of one length would hide what dropping finished images saves.)

Results are given in float32, and with matrix products in bfloat16 (`torch.set_float32_matmul_precision("medium")`) for
all of the programs; compare only within one of the two.
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
from hf_captioner.model.encoder_model import CaptionerEncoderOutput

END_SLOPE = 1.5  # by how much the logit of END rises with each word


def end_bonus(num_words: int, length: Tensor) -> Tensor:
    """Return what is added to the logit of END after some words, so that it is likelier than all others from a length.

    The likeliest captions are about three words shorter than that.
    """
    return END_SLOPE * (num_words - length)


class EndingModel(CaptionerModel):
    """A captioner that ends the captions of each image at about the length that stands in the image's cells."""

    neutral_end: float  # logit of END at which it is as likely as all other words together

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the captioner's output, with a bonus on the logit of END."""
        output: Any = super().forward(*args, **kwargs)
        length = output.cache.memory.cells[:, 0, 0]
        length = length.repeat_interleave(len(output.logits) // len(length))  # of each beam
        output.logits[:, -1, END] = self.neutral_end + end_bonus(output.cache.length - 1, length)
        return output


class TutorialSearch(TutorialDecoder):
    """Beam search that captions one image at a time."""

    @torch.no_grad()
    def caption(self, cells: Tensor, num_beams: int, max_words: int, neutral_end: float) -> list[int]:
        """Return the best caption of an image.

        Args:
            cells: Cells of the image, `(1, P, C)`.
            num_beams: Number of beams.
            max_words: Most words of a caption, END included.
            neutral_end: Logit of END at which it is as likely as all other words together.
        """
        vocab_size, length = self.output.out_features, cells[0, 0, 0]
        cells = cells.expand(num_beams, P, C)
        words = torch.full((num_beams, 1), START)
        scores = torch.zeros(num_beams, 1)
        finished: list[tuple[float, list[int]]] = []
        hidden, cell = self.start(cells)
        for step in range(max_words):
            hidden, cell = self.read(self.embedding(words[:, -1]), hidden, cell, cells)
            logits = self.output(hidden)
            logits[:, END] = neutral_end + end_bonus(step, length)
            total = scores + logits.log_softmax(1)
            flat = total[0] if step == 0 else total.view(-1)
            best, index = flat.topk(len(words), 0)
            parents, following = index // vocab_size, index % vocab_size
            words = torch.cat([words[parents], following.unsqueeze(1)], 1)
            running = [beam for beam, word in enumerate(following.tolist()) if word != END]
            ended = [beam for beam in range(len(words)) if beam not in running]
            finished += [(best[beam].item() / (step + 1), words[beam].tolist()) for beam in ended]
            if not running:
                break
            parents = parents[running]
            words, scores = words[running], best[running].unsqueeze(1)
            hidden, cell, cells = hidden[parents], cell[parents], cells[parents]
        finished += [(score.item() / max_words, row.tolist()) for score, row in zip(scores, words, strict=True)]
        return max(finished)[1]


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch_size", type=int, default=32)
    add("--num_beams", type=int, default=5)
    add("--num_words", type=float, default=13.0, help="words after which END is likelier than all others")
    add("--spread", type=float, default=2.5, help="standard deviation of that number over images")
    add("--max_words", type=int, default=30, help="most words of a caption, END included")
    add("--hidden_size", type=int, default=512)
    add("--vocab_size", type=int, default=2539)
    add("--repeats", type=int, default=5)
    add("--out", type=Path, help="write the result to this file")
    return parser.parse_args()


def main() -> None:
    """Time the programs in turns."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    size, vocab_size, max_words = arguments.hidden_size, arguments.vocab_size, arguments.max_words
    model: Any = EndingModel.from_encoder(
        "mobilenetv2_100", pretrained=False, vocab_size=vocab_size, hidden_size=size, attention_size=size,
        embedding_size=size,
    ).eval()  # fmt: skip
    model.neutral_end = torch.tensor(float(vocab_size)).log().item()  # random logits are close to 0
    tutorial = TutorialSearch(size, vocab_size, torch.tanh).eval()
    encoder = timm.create_model("resnet101", pretrained=False, num_classes=0, global_pool="").eval()
    images = torch.randn(arguments.batch_size, 3, 224, 224)
    cells = torch.randn(arguments.batch_size, P, C).relu()
    lengths = arguments.num_words + arguments.spread * torch.randn(arguments.batch_size)
    cells[:, :, 0] = lengths.clamp(1, max_words).unsqueeze(1)

    def generate() -> Tensor:
        return model.generate(  # type: ignore[no-any-return]
            encoder_outputs=CaptionerEncoderOutput.of(cells), num_beams=arguments.num_beams, max_length=max_words + 1,
            suppress_tokens=None,
        )  # fmt: skip

    def generate_by_transformers() -> Tensor:
        with mock.patch.object(modeling_captioner, "can_drop_images", lambda *_: False):
            return generate()

    def generate_by_tutorial() -> list[list[int]]:
        neutral_end = model.neutral_end
        return [tutorial.caption(image[None], arguments.num_beams, max_words, neutral_end) for image in cells]

    def encode() -> None:
        with torch.no_grad():
            encoder(images)

    sequences = generate()
    assert torch.equal(sequences, generate_by_transformers())
    words = (sequences == END).int().argmax(1).float()
    tutorial_words = torch.tensor([len(words) - 1 for words in generate_by_tutorial()]).float()
    jobs = {
        "generate": generate,
        "transformers": generate_by_transformers,
        "tutorial": generate_by_tutorial,
        "resnet101": encode,
    }

    def measure() -> dict[str, Any]:
        seconds = seconds_of(jobs, arguments.repeats)
        return {
            "seconds": seconds,
            "captions_per_second": arguments.batch_size / seconds["generate"],
            "times_transformers": seconds["transformers"] / seconds["generate"],
            "times_the_tutorial": seconds["tutorial"] / seconds["generate"],
            "fraction_of_resnet101": seconds["generate"] / seconds["resnet101"],
        }

    result = {
        "settings": {name: value for name, value in vars(arguments).items() if name != "out"},
        "words_per_caption": {"mean": words.mean().item(), "std": words.std().item(), "longest": words.max().item()},
        "words_per_caption_of_the_tutorial": tutorial_words.mean().item(),
        "float32": measure(),
    }
    with bfloat16_products():
        result["bfloat16_products"] = measure()
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
