"""Captions decoded for a data set, or read from a file, and what they are worth."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ..data.loading import read_ahead
from ..data.rows import read_pixels
from ..metrics import caption_metrics, caption_tallies
from ..metrics.resampling import NUM_RESAMPLES, Difference, intervals
from ..metrics.scores import Tally, diversity
from ..metrics.tokenization import tokenize_ptb
from ..model.captions import spaced
from ..model.modeling_captioner import CaptionerEncoderOutput, CaptionerModel
from ..model.modes import in_evaluation
from ..model.processing_captioner import CaptionerProcessor
from .protocol import Protocol, describe_interval, describe_metrics, hash_of_ids, software

if TYPE_CHECKING:
    from datasets import Dataset

# Below these shares the captions say more about the language of the data set than about the images.
FEW_DISTINCT = 0.1
MANY_ENDLESS = 0.1

# Arguments of generate() by which a model would see the words it has to find.
TEACHER_FORCING = ("labels", "captions", "decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class Prediction:
    """The caption decoded for one image.

    Args:
        index: row of the image in its data set.
        image_id: its name.
        caption: decoded words.
        ended: whether decoding reached `<end>` rather than the longest length allowed; None where a file doesn't say.
        references: the captions people wrote.
    """

    index: int
    image_id: str
    caption: str
    ended: bool | None
    references: list[str]


@torch.no_grad()
def decode_captions(
    model: CaptionerModel,
    processor: CaptionerProcessor,
    dataset: Dataset,
    accelerator: Accelerator,
    *,
    cells: np.ndarray | None = None,
    batch_size: int = 32,
    description: str = "Decoding captions",
    **generate_kwargs: Any,
) -> list[Prediction]:
    """Caption every image of a data set once, whatever the number of processes.

    Process r of n takes the images r, r + n, r + 2n, …, so shares differ by at most one image, none is decoded
    twice, and no process has to know how the others are getting on.

    Args:
        model: not wrapped for distribution; its mode is restored.
        processor: of the model.
        dataset: undecoded rows with captions (see `data.undecoded`).
        accelerator: names this process and collects from the others.
        cells: image cells computed earlier, `(images, P, C)`, in place of the images.
        batch_size: images decoded at once.
        description: beside the progress bar.
        generate_kwargs: for `model.generate`, such as `num_beams`.

    Returns:
        Predictions in the order of the data set, the same on every process.

    Raises:
        ValueError: `generate_kwargs` would show the model the words it has to find.
    """
    if shown := [name for name in TEACHER_FORCING if name in generate_kwargs]:
        raise ValueError(f"{shown[0]} is given: teacher-forced captions are not scored. Let the model find its words.")
    mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    texts = dataset.select_columns(["image_id", "captions"])
    predictions: list[Prediction] = []

    def read(indices: range) -> tuple[range, Tensor]:
        if cells is not None:
            return indices, torch.from_numpy(np.stack([cells[i] for i in indices]))
        return indices, read_pixels(dataset.__getitems__(list(indices)), processor.image_processor)

    batches = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    bar = tqdm(
        total=len(mine), desc=description, unit="image", disable=not accelerator.is_local_main_process, leave=False
    )
    for indices, batch in read_ahead(read, batches):
        batch = batch.to(accelerator.device, model.dtype)
        inputs = {"pixel_values": batch} if cells is None else {"encoder_outputs": CaptionerEncoderOutput.of(batch)}
        with in_evaluation(model):
            sequences = model.generate(**inputs, **generate_kwargs).cpu()
        ended = (sequences == processor.tokenizer.eos_token_id).any(1).tolist()
        captions = processor.batch_decode(sequences)
        for index, caption, end in zip(indices, captions, ended, strict=True):
            text = texts[index]
            predictions.append(Prediction(index, text["image_id"], caption, end, text["captions"]))
        bar.update(len(indices))
    bar.close()
    gathered = gather_object(predictions) if accelerator.num_processes > 1 else predictions
    predictions = sorted(gathered, key=lambda prediction: prediction.index)
    assert [prediction.index for prediction in predictions] == list(range(len(dataset)))
    return predictions


def read_predictions(path: str | Path, dataset: Dataset, *, report: Callable[[str], None] = print) -> list[Prediction]:
    """Captions of any system, from a file of COCO's result format, for the images of a data set.

    Args:
        path: a JSON list of `{"image_id": …, "caption": …}`, or such records line by line (`.jsonl`). Ids are those of
            the data set, or the numbers in which its ids end, as in COCO.
        dataset: with `image_id` and `captions`.
        report: called with a line where captions of other images are left aside.

    Returns:
        Predictions in the order of the data set.

    Raises:
        ValueError: another format; an id twice, in the file or in the data set; an image without caption; captions
            marked as teacher-forced.
        OSError: the file can't be read.
    """
    captions: dict[str, dict[str, Any]] = {}
    for record in _read_records(Path(path)):
        name = str(record["image_id"])
        if name in captions:
            raise ValueError(f"{str(path)!r} has image {name!r} more than once; one caption an image is scored.")
        if record.get("teacher_forced"):
            raise ValueError(f"The caption of image {name!r} is teacher-forced. Such captions are not scored: decode.")
        captions[name] = record
    names = [str(name) for name in dataset["image_id"][:]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"The data set has the image id {twice!r} more than once; captions of a file can't be told apart."
        )
    keys = names
    if not captions.keys() & set(names):
        keys = [
            number[1].lstrip("0") or "0" if (number := re.search(r"(\d+)(?:\.\w+)?$", name)) else "" for name in names
        ]
        if len(set(keys)) < len(keys):
            keys = names
    missing = [name for name, key in zip(names, keys, strict=True) if key not in captions]
    if missing:
        raise ValueError(
            f"{str(path)!r} has no caption for {len(missing)} of {len(names)} images, such as {missing[0]!r}; it has "
            f"{len(captions)}, such as {next(iter(captions), 'none')!r}. Name the data set and split it belongs to."
        )
    if len(captions) > len(names):
        report(f"{len(captions) - len(names)} captions of {path} are of other images: left aside.")
    rows = zip(names, keys, dataset["captions"][:], strict=True)
    return [
        Prediction(index, name, captions[key]["caption"], captions[key].get("ended"), list(references))
        for index, (name, key, references) in enumerate(rows)
    ]


def _read_records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    try:
        records = (
            [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else json.loads(text)
        )
    except json.JSONDecodeError as e:
        raise ValueError(f"{str(path)!r} is not JSON: {e}") from e
    fields = {"image_id", "caption"}
    if not isinstance(records, list) or not all(isinstance(r, dict) and fields <= r.keys() for r in records):
        raise ValueError(f'{str(path)!r} is not a list of records like {{"image_id": 42, "caption": "a dog"}}.')
    return records


def score_captions(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Scores of `caption_metrics`, with the share of captions without `<end>`.

    In scripts without spaces between words, characters are what is counted (see `captions.spaced`).
    """
    return caption_metrics(*_spaced(predictions), ended=_ends(predictions))


def _spaced(predictions: Sequence[Prediction]) -> tuple[list[str], list[list[str]]]:
    """Captions and references as metrics take them."""
    captions = [spaced(prediction.caption) for prediction in predictions]
    return captions, [[*map(spaced, prediction.references)] for prediction in predictions]


def _ends(predictions: Sequence[Prediction]) -> list[bool] | None:
    """Whether each caption ended, if that is known of all."""
    ended = [prediction.ended for prediction in predictions if prediction.ended is not None]
    return ended if len(ended) == len(predictions) else None


@dataclass(frozen=True)
class Evaluation:
    """Scores with all that must be known to compare them.

    Args:
        predictions: what was scored.
        tallies: what each image adds to the scores.
        scores: of all images.
        intervals: 95 % interval of each score that has references.
        protocol: the stamp.
    """

    predictions: list[Prediction]
    tallies: list[Tally]
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    protocol: Protocol

    def as_dict(self) -> dict[str, Any]:
        """For JSON: scores, intervals and the stamp."""
        return {"scores": self.scores, "intervals": self.intervals, "protocol": self.protocol.as_dict()}

    @cached_property
    def image_scores(self) -> dict[str, list[float]]:
        """Scores of each image, by the names of the scores."""
        columns = {name: column for tally in self.tallies for name, column in tally.of_images().items()}
        return {name.removesuffix("_per_image"): column for name, column in columns.items()}

    def table(self) -> list[str]:
        """Scores with their intervals, then what they may be put next to, line by line."""
        lines = []
        for name, value in self.scores.items():
            low_high = self.intervals.get(name)
            interval = "" if low_high is None else "  [{:.4f}, {:.4f}]".format(*low_high)
            lines.append(f"{name:<18} {written(value)}{interval}")
        return [*lines, *self.protocol.next_to()]


def written(score: float) -> str:
    """A score for people: counts as they are, others with four decimals."""
    return str(score) if isinstance(score, int) else f"{score:.4f}"


def evaluate_predictions(
    predictions: Sequence[Prediction],
    *,
    system: str,
    dataset: str,
    split: str,
    split_images: int | None = None,
    decoding: dict[str, Any] | None = None,
    training: Sequence[str] | None = None,
    java: bool = False,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> Evaluation:
    """Score predictions and stamp the scores with their protocol.

    Args:
        predictions: of `decode_captions` or `read_predictions`.
        system: what made them.
        dataset: its name.
        split: of the data set.
        split_images: images of the whole split; by default those predicted.
        decoding: settings of the search, if known.
        training: captions that the system was trained on, to find novel ones.
        java: score METEOR and SPICE too, where they can be run.
        num_resamples: bootstrap samples behind the intervals.
        seed: of these samples.
        report: called with a line for each score that is left out.

    Raises:
        ValueError: no predictions, or what `caption_metrics` raises.
    """
    predictions = list(predictions)
    captions, references = _spaced(predictions)
    tallies = caption_tallies(captions, references, java=java, report=report)
    known = None if training is None else (tokenize_ptb(spaced(caption)) for caption in training)
    scores = {name: value for tally in tallies for name, value in tally.of_corpus().items()}
    scores |= diversity([*map(tokenize_ptb, captions)], training=known, ended=_ends(predictions))
    counts = [len(row) for row in references]
    protocol = Protocol(
        system=system,
        decoding=decoding,
        dataset=dataset,
        split=split,
        num_images=len(predictions),
        split_images=split_images or len(predictions),
        ids_sha256=hash_of_ids([prediction.image_id for prediction in predictions]),
        references_per_image=(min(counts), max(counts)),
        metrics=describe_metrics([*scores]),
        interval=describe_interval(num_resamples, seed),
        software=software(),
    )
    found = intervals(tallies, num_resamples=num_resamples, seed=seed)
    return Evaluation(predictions, tallies, scores, found, protocol)


def comparison_lines(first: str, second: str, differences: dict[str, Difference]) -> list[str]:
    """Whether a second system is better, score by score, and how surely."""
    lines = []
    for name, (value, low, high, share) in differences.items():
        verdict = "better" if low > 0 else "worse" if high < 0 else "not surely different"
        lines.append(
            f"{name:<18} {value:+.4f}  [{low:+.4f}, {high:+.4f}]  {second} is {verdict}: "
            f"ahead of {first} in {share:.1%} of resamples"
        )
    return lines


def collapse_warnings(scores: dict[str, float]) -> list[str]:
    """What to tell the user where captions have collapsed; empty where they have not."""
    warnings = []
    if scores["distinct_captions"] < FEW_DISTINCT:
        warnings.append(
            f"Captions have collapsed: only {scores['distinct_captions']:.1%} of them are distinct. "
            "Early epochs look like this; later, lower the learning rate or check that images reach the model."
        )
    if scores.get("endless_captions", 0) > MANY_ENDLESS:
        warnings.append(
            f"{scores['endless_captions']:.1%} of the captions never reach <end>. "
            "Train longer, or raise max_length if the references are that long."
        )
    return warnings


def prediction_records(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Predictions as plain records for JSON."""
    return [asdict(prediction) for prediction in predictions]
