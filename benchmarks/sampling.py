"""Speed of sampling captions for rewards, compared with `generate(do_sample=True)`, which keeps finished captions.

    python benchmarks/sampling.py photographs --out benchmarks/results/sampling.json

Captions are drawn as in training: `--samples` captions for each of `--batch_size` images, among the ten likeliest
words. As their lengths decide what can be saved, the captioner must be a trained one. Both programs take turns on the
same batches. Seconds are those of the processor (`time.process_time`), so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from timing import write_result
from torch import Tensor

from hf_captioner import CaptionerModel, load_captions, undecoded
from hf_captioner.cli import load_captioner
from hf_captioner.data.rows import read_pixels
from hf_captioner.model.encoder_model import CaptionerEncoderOutput
from hf_captioner.model.modes import in_evaluation
from hf_captioner.model.objectives import IGNORED
from hf_captioner.training.rewards import sample_captions

SAMPLING = {"top_k": 10, "max_length": 27}


@torch.no_grad()
def plain_sample_captions(model: CaptionerModel, cells: Tensor, num_samples: int) -> Tensor:
    """Sample captions `(B, S, T)` by `generate()`, as version 0.1.0 did."""
    with in_evaluation(model):
        sequences = model.generate(
            encoder_outputs=CaptionerEncoderOutput.of(cells),
            do_sample=True,
            num_beams=1,
            num_return_sequences=num_samples,
            no_repeat_ngram_size=0,
            bad_words_ids=None,
            **SAMPLING,
        )[:, 1:]
    is_end = sequences == model.config.eos_token_id
    is_over = is_end.cumsum(1) - is_end.int() > 0
    return sequences.masked_fill(is_over, IGNORED).unflatten(0, (-1, num_samples))


def main() -> None:
    """Let both programs sample in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captioner", help="trained captioner")
    parser.add_argument("--data", default="../shared/flickr8k", help="data set with images")
    parser.add_argument("--num_batches", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=16, help="images")
    parser.add_argument("--samples", type=int, default=5, help="captions sampled for each image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of torch (default: all cores)")
    parser.add_argument("--out", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, processor = load_captioner(arguments.captioner)
    rows = undecoded(load_captions(arguments.data, "train", report=lambda _: None))
    programs = {
        "generate": lambda batch: plain_sample_captions(model, batch, arguments.samples),
        "sample_captions": lambda batch: sample_captions(model, batch, arguments.samples, **SAMPLING),
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    lengths: dict[str, list[Tensor]] = {name: [] for name in programs}
    for number in range(arguments.num_batches):
        indices = range(number * arguments.batch_size, (number + 1) * arguments.batch_size)
        with torch.no_grad():
            pixel_values = read_pixels([rows[index] for index in indices], processor.image_processor)
            cells = model.encoder(pixel_values).last_hidden_state
        for _ in range(arguments.repeats):
            for name, program in programs.items():
                started = time.process_time()
                samples = program(cells)
                seconds[name].append(time.process_time() - started)
                lengths[name].append((samples != IGNORED).sum(2).float())
    count = arguments.batch_size * arguments.samples
    result = {
        "settings": {name: value for name, value in vars(arguments).items() if name != "out"},
        "draws_per_second": {name: count / statistics.median(values) for name, values in seconds.items()},
        "times_as_many": statistics.median(seconds["generate"]) / statistics.median(seconds["sample_captions"]),
        "mean_length": {name: float(torch.cat(values).mean()) for name, values in lengths.items()},
        "mean_steps": {name: statistics.mean(float(v.max()) for v in values) for name, values in lengths.items()},
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
