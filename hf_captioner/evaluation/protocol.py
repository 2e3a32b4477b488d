"""Protocol of an evaluation: everything that must agree before two scores may be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

PTB = "PTB (the lexer of CoreNLP 3.4.1), lower case, without punctuation"
COCO = "COCO caption evaluation (pycocoevalcap 1.2)"


@dataclass(frozen=True)
class MetricProtocol:
    """Protocol of one metric: how it is computed, and with which published scores it is comparable.

    Scores are comparable only if they also refer to the same reference captions.
    """

    prefix: str  # start of the names of its scores
    version: str
    tokenizer: str
    brevity_penalty: str | None  # reference whose length a caption is compared with
    comparable_with: str


METRIC_PROTOCOLS = (
    MetricProtocol("evaluate_bleu", "BLEU of evaluate 0.4", "mteval-v13a, case kept", "shortest reference",
                   "BLEU by evaluate, Google's NMT script or sacrebleu; not the BLEU of captioning papers"),
    MetricProtocol("bleu", COCO, PTB, "closest reference", "BLEU of captioning papers, by COCO caption evaluation"),
    MetricProtocol("plain_cider", "CIDEr without clipping and length penalty", PTB, None,
                   "CIDEr explicitly without the D; not the CIDEr of captioning papers"),
    MetricProtocol("cider", f"CIDEr-D of {COCO}, document frequencies from the references scored", PTB, None,
                   "CIDEr of captioning papers (often given times 100), on the whole split only"),
    MetricProtocol("rouge_l", COCO, PTB, None, "ROUGE-L of captioning papers; not that of rouge-score"),
    MetricProtocol("meteor", f"METEOR 1.5, {COCO}", PTB, None, "METEOR of captioning papers since 2014; not NLTK's"),
    MetricProtocol("spice", f"SPICE 1.0, {COCO}", PTB, None, "SPICE of captioning papers"),
)  # fmt: skip

# Arguments of generate() that determine how captions are decoded.
DECODING = ("num_beams", "do_sample", "length_penalty", "early_stopping", "max_length", "min_length",
            "no_repeat_ngram_size", "repetition_penalty", "bad_words_ids", "temperature", "top_k", "top_p")  # fmt: skip

# Splits for which papers publish scores: number of images and of references per image.
PUBLISHED = {("flickr8k", "test"): (1000, 5), ("flickr30k", "test"): (1000, 5), ("coco", "test"): (5000, 5)}


@dataclass(frozen=True)
class Protocol:
    """Data, decoding and software behind a set of scores.

    Args:
        system: Folder or Hub id of a captioner, or a file of captions.
        decoding: Settings of the decoding; None for captions from a file.
        dataset: Name or path of the data set.
        split: Name of the split.
        num_images: Number of images scored.
        split_images: Number of images in the whole split; `--max_images` and `--allow_missing` score fewer.
        ids_sha256: Hash of the ids of the scored images, in order.
        references_per_image: Smallest and largest number of references of an image.
        metrics: Fields of the `METRIC_PROTOCOLS` behind the scores, by prefix.
        interval: Settings of the confidence intervals.
        software: Versions of packages.
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
        """Rebuild a protocol from what `as_dict` returned.

        Raises:
            ValueError: A field is missing, or its value has another form.
        """
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in record]:
            raise ValueError(f"The protocol has no {', '.join(missing)}: hf-captioner evaluate did not write it.")
        for name, hint in get_type_hints(cls).items():
            kinds = tuple(
                get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else [hint])
            )
            if not isinstance(record[name], (*kinds, list) if tuple in kinds else kinds):
                raise ValueError(f"The protocol has {record[name]!r:.40} as its {name}: hf-captioner did not write it.")
        has_pair = [type(count) for count in record["references_per_image"]] == [int, int]
        metrics = record["metrics"].values()
        if not has_pair or not all(isinstance(m, dict) and isinstance(m.get("scores"), list) for m in metrics):
            raise ValueError("The protocol has references_per_image or metrics that hf-captioner did not write.")
        return cls(**{name: record[name] for name in names})

    @property
    def description(self) -> str:
        """Data set, split, number of images and of beams in a few words."""
        beams = "" if self.decoding is None else f", {self.decoding.get('num_beams', 1)} beams"
        return f"{self.dataset}, {self.split}, {self.num_images} images{beams}"

    def comparable_with(self) -> list[str]:
        """Say, in one line per metric, which published scores these scores are comparable with, or why with none."""
        if reason := self._reason_against_comparison():
            return [f"Not comparable with published scores: {reason}. Compare only scores with this same protocol."]
        lines = [
            f"{', '.join(metric['scores'])}: {metric.get('comparable_with', metric.get('next_to'))}"  # 0.1.0: next_to
            for metric in self.metrics.values()
        ]
        return [f"Comparable with scores on the {self.split} split of {self.dataset} with equal references:", *lines]

    def _reason_against_comparison(self) -> str | None:
        """Return why no published score is comparable; None if some are."""
        name = self.dataset.rstrip("/").rpartition("/")[2].lower()
        if (name, self.split) not in PUBLISHED:
            return f"papers don't report on split {self.split!r} of {self.dataset!r}"
        num_images, num_references = PUBLISHED[name, self.split]
        if self.num_images < self.split_images or self.num_images != num_images:
            return f"papers score {num_images:,} images, these are {self.num_images:,} of {self.split_images:,}"
        if self.references_per_image[0] != num_references:  # some images of COCO have a sixth or seventh
            return f"papers use {num_references} references per image, these images have {self.references_per_image}"
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return the protocol as a record for JSON, with the lines of `comparable_with`."""
        return {**asdict(self), "comparable_with": self.comparable_with()}


def hash_of_ids(image_ids: Sequence[str]) -> str:
    """Return the SHA-256 of a JSON list of image ids, in the order given."""
    return hashlib.sha256(json.dumps(list(image_ids)).encode()).hexdigest()


def describe_decoding(generation_config: Any, **overrides: Any) -> dict[str, Any]:
    """Return the settings of a decoding: those of a model's generation config, overridden by generate()'s arguments."""
    return {name: getattr(generation_config, name, None) for name in DECODING} | overrides


def describe_metrics(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the protocols of the metrics behind these scores, by prefix, each with the names of its scores."""
    described: dict[str, dict[str, Any]] = {}
    for name in names:
        protocol = next((p for p in METRIC_PROTOCOLS if name.startswith(p.prefix)), None)
        if protocol is not None:
            record = {key: value for key, value in asdict(protocol).items() if key != "prefix"}
            described.setdefault(protocol.prefix, {"scores": [], **record})["scores"].append(name)
    return described


def software_versions() -> dict[str, str]:
    """Return the installed versions of the packages that decode and score."""
    versions = {}
    for name in ("hf_captioner", "transformers", "torch", "pycocoevalcap"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
