"""A run on random cells, with hundreds of steps per second; also a script, for tests with several processes.

python tests/tiny_run.py OUT.json --num_steps 20 --batch_size 4
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import set_seed
from conftest import CAPTIONS
from datasets import Dataset

from hf_captioner import CaptionerModel, CaptionerProcessor
from hf_captioner.data.collator import CaptionCollator
from hf_captioner.data.loading import StepLoader, StepSampler
from hf_captioner.evaluation.predictions import decode_captions
from hf_captioner.evaluation.scoring import score_captions
from hf_captioner.interruption import Interruption
from hf_captioner.training.accelerator import Precision, build_accelerator
from hf_captioner.training.checkpoints import Checkpoints
from hf_captioner.training.rewards import CaptionReward, Rewards
from hf_captioner.training.run import Run
from hf_captioner.training.stages import Likelihood, Optimization, Stage

DATA_CONFIG = {
    "input_size": (3, 64, 64), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9,
    "crop_mode": "center",
}  # fmt: skip


class Tiny:
    """A run of one or two stages with its data: 27 images of 4 cells, with 1 to 3 captions each."""

    def __init__(
        self,
        *,
        epochs: int = 3,
        batch_size: int = 4,
        accumulation: int = 1,
        dropout: float = 0.3,
        ema_decay: float = 0.9,
        reward_epochs: int = 0,
        num_workers: int = 0,
        folder: Path | None = None,
        interruption: Interruption | None = None,
        num_images: int = 27,
        mixed_precision: Precision = "no",
        **kwargs: Any,
    ) -> None:
        set_seed(0)
        self.accelerator = build_accelerator(mixed_precision, 1, accumulation)
        captions = [[CAPTIONS[(5 * i + j) % len(CAPTIONS)] for j in range(1 + i % 3)] for i in range(num_images)]
        self.rows = Dataset.from_dict({"captions": captions, "image_id": [f"image{i}" for i in range(num_images)]})
        self.processor = CaptionerProcessor.from_captions(CAPTIONS, DATA_CONFIG, min_count=1)
        self.model = CaptionerModel.from_encoder(
            "test_resnet", pretrained=False, vocab_size=len(self.processor.tokenizer), hidden_size=16, attention_size=8,
            embedding_size=16, memory_dropout=dropout, embedding_dropout=dropout, output_dropout=dropout,
            data_config={"input_size": (3, 64, 64)}, label_smoothing=0.1,
            **{"decoder_type": "lstm", "doubly_stochastic_weight": 0.5, **kwargs},
        )  # fmt: skip
        shape = (2, num_images, 4, self.model.encoder.part.hidden_size)
        self.cells = np.random.default_rng(0).normal(size=shape).astype(np.float16)
        self.model.generation_config = self.model.default_generation_config()
        self.model.freeze_encoder()
        sampler = StepSampler(
            num_images, batch_size, seed=3, num_processes=self.accelerator.num_processes,
            process=self.accelerator.process_index, accumulation=accumulation,
        )  # fmt: skip
        collator = CaptionCollator(self.processor, cells=self.cells[0], mirror=True, mirrored_cells=self.cells[1])
        self.loader = StepLoader(self.rows, sampler, collator, num_workers=num_workers)
        stages = [Stage("Epoch", epochs, 1e-2, Likelihood())]
        if reward_epochs:
            reward = CaptionReward(captions)
            rewards = Rewards(self.model, self.processor, reward, num_samples=3, top_k=0, max_length=9)
            stages.append(Stage("Rewards", reward_epochs, 1e-3, rewards))
        self.run = Run(
            self.model, stages, self.accelerator, num_steps=sampler.num_steps,
            optimization=Optimization(ema_decay=ema_decay), interruption=interruption, settings={"epochs": epochs},
            checkpoints=None if folder is None else Checkpoints(folder, keep=1000), checkpoint_minutes=0.0,
        )  # fmt: skip
        set_seed(0, device_specific=True)

    def train(self) -> None:
        """Train for the rest of the run."""
        while self.run.stage is not None:
            if not self.run.is_under_way:
                self.run.start_stage()
            while self.run.has_epochs_left:
                self.run.train_epoch(self.loader)
                self.run.end_epoch({}, float(self.run.progress.epoch))
            self.run.end_stage()

    def weights(self) -> dict[str, Any]:
        """Return the weights of the model and of the average by name."""
        average = {} if self.run.average is None else self.run.average.module.state_dict()
        return {**self.model.state_dict(), **{f"average {name}": tensor for name, tensor in average.items()}}


def main() -> None:
    """Train some steps, then write their losses, and captions and scores, to a JSON file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--mixed_precision", default="no")
    arguments = parser.parse_args()
    fields = {name: getattr(arguments, name) for name in ("batch_size", "accumulation", "mixed_precision")}
    tiny = Tiny(dropout=0.0, epochs=12, **fields)
    run = tiny.run
    run.start_stage()
    losses: list[float] = []
    while len(losses) < arguments.num_steps:
        for batches in tiny.loader.steps(run.progress.epoch):
            before = run.progress.totals.metric
            run._train_step(batches)
            losses.append(run.progress.totals.metric - before)
        run.progress.epoch += 1
    predictions = decode_captions(
        run.validated_model, tiny.processor, tiny.rows, tiny.accelerator, cells=tiny.cells[0], num_beams=2,
        max_length=9, batch_size=4,
    )  # fmt: skip
    if tiny.accelerator.is_main_process:
        result = {
            "num_processes": tiny.accelerator.num_processes, "losses": losses[: arguments.num_steps],
            "captions": [p.caption for p in predictions], "scores": score_captions(predictions),
            "num_captions": run.progress.totals.num_captions, "steps": tiny.loader.num_steps,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(result))
    tiny.accelerator.end_training()


if __name__ == "__main__":
    main()
