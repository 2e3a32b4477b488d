"""The stamp that scores carry: all that must agree before two scores may be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..metrics.resampling import LEVEL

PTB = "PTB (the lexer of CoreNLP 3.4.1), lower case, without punctuation"
COCO = "COCO caption evaluation (pycocoevalcap 1.2)"


@dataclass(frozen=True)
class MetricProtocol:
    """How a score is computed, and whose scores were computed so."""

    prefix: str  # of the names of its scores
    version: str
    tokenizer: str
    brevity_penalty: str | None
    next_to: str  # what published figures it may be put next to, on the same images and references


METRIC_PROTOCOLS = (
    MetricProtocol("evaluate_bleu", "BLEU of evaluate 0.4", "mteval-v13a, case kept", "shortest reference",
                   "BLEU by evaluate, Google's NMT script or sacrebleu; not the BLEU of captioning papers"),
    MetricProtocol("bleu", COCO, PTB, "closest reference", "BLEU of captioning papers, by COCO caption evaluation"),
    MetricProtocol("plain_cider", "CIDEr without clipping and length penalty", PTB, None,
                   "CIDEr expressly without the D; not the CIDEr of captioning papers"),
    MetricProtocol("cider", f"CIDEr-D of {COCO}, frequencies from the references scored", PTB, None,
                   "CIDEr of captioning papers (there often times 100), on the whole split only"),
    MetricProtocol("rouge_l", COCO, PTB, None, "ROUGE-L of captioning papers; not that of rouge-score"),
    MetricProtocol("meteor", f"METEOR 1.5, {COCO}", PTB, None, "METEOR of captioning papers since 2014; not NLTK's"),
    MetricProtocol("spice", f"SPICE 1.0, {COCO}", PTB, None, "SPICE of captioning papers"),
)  # fmt: skip

# Settings of generate() that say how captions are searched for.
DECODING = ("num_beams", "do_sample", "length_penalty", "early_stopping", "max_length", "min_length",
            "no_repeat_ngram_size", "repetition_penalty", "bad_words_ids", "temperature", "top_k", "top_p")  # fmt: skip

# Splits on which there are published figures: images, references of each.
PUBLISHED = {("flickr8k", "test"): (1000, 5), ("flickr30k", "test"): (1000, 5), ("coco", "test"): (5000, 5)}


@dataclass(frozen=True)
class Protocol:
    """Where scores come from.

    Args:
        system: a captioner's folder, or a file of captions.
        decoding: how captions were searched for; None where a file doesn't say.
        dataset: its name.
        split: of the data set.
        num_images: images scored.
        split_images: images of the split; fewer are scored with `--max_images`.
        ids_sha256: hash of the image ids scored, in their order.
        references_per_image: least and most.
        metrics: `METRIC_PROTOCOLS` of the scores computed.
        interval: how their intervals were computed.
        software: versions.
    """

    system: str
    decoding: dict[str, Any] | None
    dataset: str
    split: str
    num_images: int
    split_images: int
    ids_sha256: str
    references_per_image: tuple[int, int]
    metrics: dict[str, dict[str, Any]]
    interval: dict[str, Any]
    software: dict[str, str]

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Protocol:
        """The stamp that `as_dict` wrote.

        Raises:
            ValueError: it is not whole.
        """
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in record]:
            raise ValueError(f"The protocol has no {', '.join(missing)}: it is not one of examples/evaluate.py.")
        return cls(**{name: record[name] for name in names})

    def line(self) -> str:
        """Data set, split, images and decoding in a few words."""
        beams = "" if self.decoding is None else f", {self.decoding.get('num_beams', 1)} beams"
        return f"{self.dataset}, {self.split}, {self.num_images} images{beams}"

    def next_to(self) -> list[str]:
        """What published figures the scores may be put next to, a line each."""
        reason = self._unpublished()
        if reason:
            return [f"No published figures: {reason}. Compare with scores of this very stamp."]
        lines = [f"{', '.join(metric['scores'])}: {metric['next_to']}" for metric in self.metrics.values()]
        return [f"Figures on the {self.split} split of {self.dataset} with the same references, and of these:", *lines]

    def _unpublished(self) -> str | None:
        name = self.dataset.rstrip("/").rpartition("/")[2].lower()
        known = PUBLISHED.get((name, self.split))
        if known is None:
            return f"papers don't report on split {self.split!r} of {self.dataset!r}"
        if self.num_images < self.split_images or self.num_images != known[0]:
            return f"papers score {known[0]:,} images, these are {self.num_images:,} of {self.split_images:,}"
        if self.references_per_image[0] != known[1]:  # some images of COCO have a sixth or seventh
            return f"papers have {known[1]} references an image, these have {self.references_per_image}"
        return None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "may_be_put_next_to": self.next_to()}


def hash_of_ids(image_ids: Sequence[str]) -> str:
    """SHA-256 of image ids in their order, as a JSON list."""
    return hashlib.sha256(json.dumps(list(image_ids)).encode()).hexdigest()


def describe_decoding(settings: Any, **search: Any) -> dict[str, Any]:
    """How captions are searched for: what a model's `generation_config` says, but for what `search` says."""
    return {name: getattr(settings, name, None) for name in DECODING} | search


def describe_metrics(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The protocols of these scores, each with the names it is for."""
    described: dict[str, dict[str, Any]] = {}
    for name in names:
        protocol = next((p for p in METRIC_PROTOCOLS if name.startswith(p.prefix)), None)
        if protocol is not None:
            fields = {key: value for key, value in asdict(protocol).items() if key != "prefix"}
            described.setdefault(protocol.prefix, {"scores": [], **fields})["scores"].append(name)
    return described


def describe_interval(num_resamples: int, seed: int) -> dict[str, Any]:
    """How intervals are computed."""
    method = "percentile bootstrap over images; document frequencies stay those of all images"
    return {"level": LEVEL, "method": method, "resamples": num_resamples, "seed": seed}


def software() -> dict[str, str]:
    """Versions of what decodes and scores."""
    versions = {}
    for name in ("hf_captioner", "transformers", "torch", "pycocoevalcap"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
