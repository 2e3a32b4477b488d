"""Speed of sampling captions for rewards, compared with `generate(do_sample=True)`, which keeps finished captions.

    python benchmarks/sampling.py --out benchmarks/results/sampling.json

Captions are drawn as in training: `--samples` captions for each of `--batch_size` images, among the ten likeliest
words. As their lengths decide what can be saved, a decoder of the size of the Flickr8k recipe is trained on the first
images of Flickr8k for a short time before, so that its captions end where people's do. Both programs take turns on the
same batches. Seconds are those of the processor (`time.process_time`), so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice
from pathlib import Path

import torch
from timing import write_result
from torch import Tensor
from torch.utils.data import DataLoader

from hf_captioner import (
    CaptionCollator,
    CaptionerImageProcessor,
    CaptionerModel,
    CaptionerProcessor,
    build_tokenizer,
    load_captions,
)
from hf_captioner.model.encoder_model import CaptionerEncoderOutput
from hf_captioner.model.modes import in_evaluation
from hf_captioner.model.objectives import IGNORED
from hf_captioner.training.rewards import sample_captions

ENCODER = "tf_efficientnet_lite2"
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


def build(data: str, weights: str, num_images: int) -> tuple[CaptionerModel, Tensor, Tensor]:
    """Return a new captioner of the recipe's size, and the cells `(B, P, C)` and labels `(B, K, T)` of images."""
    train = load_captions(data, report=lambda _: None)["train"]
    tokenizer = build_tokenizer((caption for row in train["captions"] for caption in row), min_count=5)
    model = CaptionerModel.from_encoder(
        ENCODER, encoder_weights=weights, vocab_size=len(tokenizer), attention_size=512, embedding_size=512,
        hidden_size=512, projection_size=512, deep_output=True, tie_word_embeddings=True, label_smoothing=0.1,
    )  # fmt: skip
    model.generation_config = model.default_generation_config(unknown_token_id=tokenizer.unk_token_id)
    model.freeze_encoder()
    processor = CaptionerProcessor(CaptionerImageProcessor.from_data_config(model.data_config), tokenizer)
    collator = CaptionCollator(processor)
    batches = list(DataLoader(train.select(range(num_images)), batch_size=16, collate_fn=collator))
    with torch.no_grad():
        cells = torch.cat([model.encoder(batch["pixel_values"]).last_hidden_state for batch in batches])
    return model, cells, torch.cat([batch["labels"] for batch in batches])


def train(model: CaptionerModel, cells: Tensor, labels: Tensor, num_steps: int) -> None:
    """Train the decoder on random batches of 16 images."""
    optimizer = torch.optim.AdamW(model.decoder_parameters(), lr=1e-3, fused=True)
    for _ in range(num_steps):
        images = torch.randint(len(cells), (16,))
        loss = model.train()(cells=cells[images], labels=labels[images]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.decoder_parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Train a decoder for a short time, and let both programs sample in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/flickr8k", help="data set with captions")
    parser.add_argument("--encoder_weights", default=f"../shared/encoders/{ENCODER}.safetensors")
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--num_steps", type=int, default=150, help="optimizer steps before the measurement")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=5, help="captions sampled for each image")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="threads of torch (default: all cores)")
    parser.add_argument("--out", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, cells, labels = build(arguments.data, arguments.encoder_weights, arguments.num_images)
    train(model, cells, labels, arguments.num_steps)

    programs = {
        "generate": lambda batch: plain_sample_captions(model, batch, arguments.samples),
        "sample_captions": lambda batch: sample_captions(model, batch, arguments.samples, **SAMPLING),
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    lengths: dict[str, list[Tensor]] = {name: [] for name in programs}
    for program in programs.values():  # warm up
        program(cells[: arguments.batch_size])
    for batch in islice(cells.split(arguments.batch_size), arguments.repeats):
        for name, program in programs.items():
            started = time.process_time()
            samples = program(batch)
            seconds[name].append(time.process_time() - started)
            lengths[name].append((samples != IGNORED).sum(2).float())
    count = arguments.batch_size * arguments.samples
    result = {
        "settings": {name: value for name, value in vars(arguments).items() if name != "out"},
        "draws_per_second": {name: count / statistics.median(values) for name, values in seconds.items()},
        "times_as_many": statistics.median(seconds["generate"]) / statistics.median(seconds["sample_captions"]),
        "mean_length": {name: float(torch.cat(values).mean()) for name, values in lengths.items()},
        "steps": {name: statistics.mean(float(value.max()) for value in values) for name, values in lengths.items()},
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
