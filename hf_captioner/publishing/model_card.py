"""The model card of a published captioner: what is known of it, as metadata and as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

    from ..evaluation.protocol import Protocol
    from ..evaluation.scoring import Evaluation
    from ..model.configuration_captioner import CaptionerConfig

TEMPLATE = Path(__file__).with_name("model_card.md")
RECIPE = "recipe.yaml"
TASK = "image-to-text"

# Names on the Hub: of data sets known here by a shorter one, and of metrics by the prefix of their scores.
HUB_DATASETS = {"flickr8k": "jxie/flickr8k"}
HUB_METRICS = {"evaluate_bleu": "bleu", "plain_cider": "cider", "rouge_l": "rouge"}

# Fields of a recipe that say nothing about the model, and those that may be paths of the machine it was trained on.
OF_THE_MACHINE = (
    *("output_dir", "resume", "checkpoint_minutes", "keep_checkpoints", "tracking", "cache_cells", "cache_dir"),
    *("num_workers", "num_threads", "push_to_hub"),
)
PATHS = ("dataset", "encoder_weights", "word_vectors")


@dataclass(frozen=True)
class Facts:
    """What is known of a captioner beside its weights.

    Args:
        license: of the weights, as the Hub names it: `apache-2.0`, `cc-by-nc-4.0`, …
        datasets: names of the data sets it was trained on, or ids on the Hub.
        language: of the captions, ISO 639-1.
        base_model: id on the Hub of the model whose weights the encoder started from.
        recipe: fields of `examples/train.py`.
        source: of images to caption in the card: the data set as the recipe names it, perhaps by a path.
        limits: a sentence or more for the section of that name.
    """

    license: str
    datasets: Sequence[str]
    language: str = "en"
    base_model: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    limits: str | None = None

    @classmethod
    def of(
        cls,
        config: CaptionerConfig,
        *,
        license: str | None = None,
        datasets: Sequence[str] | str | None = None,
        language: str = "en",
        base_model: str | None = None,
        recipe: Mapping[str, Any] | str | Path | None = None,
        limits: str | None = None,
    ) -> Facts:
        """Facts as given, and what the recipe says where they are not.

        Args:
            config: of the model; by default the recipe is that in the folder it was loaded from.
            license: see the class, as for the others.
            datasets: one or several.
            language: of the captions.
            base_model: by default timm's, where the recipe starts from its weights.
            recipe: fields, or a YAML file of them.
            limits: text.

        Raises:
            ValueError: no licence or no data set is named, here or in the recipe.
            FileNotFoundError: no such recipe.
        """
        fields = dict(recipe) if isinstance(recipe, Mapping) else _read_recipe(recipe, config.name_or_path)
        license = license or fields.get("license")
        if not license:
            raise ValueError(
                "The model card names no licence. Say what others may do with the weights, which depends on the data "
                "they were trained on: license='apache-2.0', 'cc-by-nc-4.0', 'other', …"
            )
        names = [datasets] if isinstance(datasets, str) else list(datasets or filter(None, [fields.get("dataset")]))
        if not all(names) or not names:
            raise ValueError("The model card names no data set. Say what the model was trained on: datasets=['…'].")
        if base_model is None and fields.get("pretrained") and not fields.get("encoder_weights"):
            base_model = _timm_id(fields["encoder_name"])
        source = fields.get("dataset")
        fields = {name: value for name, value in fields.items() if name not in OF_THE_MACHINE}
        fields |= {name: Path(fields[name]).resolve().name for name in PATHS if _is_path(fields.get(name))}
        fields |= {"license": license} if "license" in fields else {}
        return cls(license, [dataset_id(name) for name in names], language, base_model, fields, source, limits)

    def recipe_text(self) -> str:
        """The recipe as YAML; empty where there is none."""
        return yaml.safe_dump(dict(self.recipe), sort_keys=False, allow_unicode=True) if self.recipe else ""


@dataclass(frozen=True)
class Sample:
    """A captioned image; both files are paths within the published folder."""

    image: str
    attention: str
    caption: str


@dataclass(frozen=True)
class Scores:
    """Results of an evaluation, from whichever file holds them.

    Args:
        values: by name.
        line: data set, split, images and beams in a few words.
        intervals: 95 %, lower and upper end, by name.
        protocol: the whole stamp, where more than the line is known.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    line: str = ""
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    protocol: Protocol | None = None

    @classmethod
    def of(cls, results: Mapping[str, Any] | Evaluation | str | Path | None) -> Scores:
        """Read results.

        Args:
            results: an `Evaluation`, the contents of `results.json` (of examples/evaluate.py) or `scores.json` (of
                examples/train.py), or the path of such a file.

        Raises:
            ValueError: other contents.
            FileNotFoundError: no such file.
        """
        if results is None:
            return cls()
        name = "results"
        if isinstance(results, str | Path):
            name = repr(str(results))
            if not Path(results).is_file():
                raise FileNotFoundError(f"No results at {name}. Give a results.json or scores.json.")
            try:
                results = json.loads(Path(results).read_text(encoding="utf-8"))
            except json.JSONDecodeError as e:
                raise ValueError(f"The results {name} are not JSON: {e}") from e
        # Through JSON, so that tuples are lists, as in the files.
        record = json.loads(json.dumps(results if isinstance(results, Mapping) else results.as_dict()))  # type: ignore[union-attr]
        if not isinstance(record, dict):
            raise ValueError(f"{name} hold a {type(record).__name__}, not scores by name.")
        if isinstance(record.get("scores"), dict) and isinstance(record.get("protocol"), dict):
            from ..evaluation.protocol import (
                Protocol,  # with the metrics, which importing this package is not to wait for
            )

            protocol = Protocol.from_dict(record["protocol"] | {"dataset": dataset_id(record["protocol"]["dataset"])})
            return cls(record["scores"], protocol.description, record.get("intervals", {}), protocol)
        values = {key: value for key, value in record.items() if isinstance(value, int | float)}
        if not values:
            raise ValueError(f"{name} hold no scores. Give what examples/evaluate.py or examples/train.py writes.")
        scored, comma, rest = str(record.get("protocol", "")).partition(", ")
        return cls(values, dataset_id(scored) + comma + rest if scored else "")

    def eval_results(self, dataset: str) -> list[EvalResult]:
        """For the metadata: each score that has a protocol, with its stamp.

        Args:
            dataset: that was scored, if the stamp doesn't say.
        """
        from huggingface_hub import EvalResult

        from ..evaluation.protocol import describe_metrics

        stamp = asdict(self.protocol) if self.protocol else {}
        scored = stamp.get("dataset", dataset)
        about = ("num_images", "split_images", "references_per_image", "ids_sha256")
        dataset_args = {name: stamp[name] for name in about if name in stamp} or {"protocol": self.line}
        shared = {name: stamp[name] for name in ("decoding", "software") if stamp.get(name)}
        found = []
        for prefix, metric in describe_metrics([*self.values]).items():
            how = {name: metric[name] for name in ("version", "tokenizer", "brevity_penalty") if metric[name]}
            for name in metric["scores"]:
                ends = self.intervals.get(name)
                interval = {"interval": stamp.get("interval", {}) | {"ends": list(ends)}} if ends else {}
                found.append(
                    EvalResult(
                        task_type=TASK,
                        task_name="Image captioning",
                        dataset_type=scored,
                        dataset_name=scored.rpartition("/")[2],
                        dataset_split=stamp.get("split"),
                        dataset_args=dataset_args,
                        metric_type=HUB_METRICS.get(prefix, prefix),
                        metric_name=name,
                        metric_value=self.values[name],
                        metric_args=how | interval | shared,
                    )
                )
        return found


def model_card(
    repo_id: str, config: CaptionerConfig, facts: Facts, scores: Scores, samples: Sequence[Sample] = ()
) -> ModelCard:
    """Render the card.

    Args:
        repo_id: where the model is published.
        config: of the model.
        facts: for metadata and text.
        scores: likewise.
        samples: captions and pictures, the first of which the usage reads.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from ..evaluation.protocol import software_versions

    eval_results = scores.eval_results(facts.datasets[0])
    data = ModelCardData(
        license=facts.license,
        language=facts.language,
        datasets=list(facts.datasets),
        base_model=facts.base_model,
        metrics=list(dict.fromkeys(result.metric_type for result in eval_results)) or None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=eval_results or None,
    )
    return ModelCard.from_template(
        data,
        str(TEMPLATE),
        repo_id=repo_id,
        encoder_name=config.encoder_name,
        packages=sorted(set((config.packages or {}).values())),
        software={name: version for name, version in software_versions().items() if name != "pycocoevalcap"},
        samples=samples,
        trained_on=" and ".join(f"`{name}`" for name in facts.datasets),
        recipe=facts.recipe_text().rstrip(),
        scores={"protocol": scores.line, **scores.values} if scores.values else None,
        intervals=scores.intervals,
        next_to=scores.protocol.comparable_with() if scores.protocol else None,
        limits=facts.limits,
    )


def dataset_id(name: str) -> str:
    """What a data set is called on the Hub; of a path, its last part."""
    return Path(name).resolve().name if _is_path(name) else HUB_DATASETS.get(name, name)


def _is_path(name: Any) -> bool:
    return isinstance(name, str) and (name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists())


def _read_recipe(path: str | Path | None, folder: str) -> dict[str, Any]:
    """Fields of a recipe, or of that in the folder of the model if none is named."""
    if path is None:
        path = Path(folder or ".", RECIPE)
        if not folder or not path.is_file():
            return {}
    if not Path(path).is_file():
        raise FileNotFoundError(f"No recipe at {str(path)!r}. Give the recipe.yaml that the training wrote.")
    fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"The recipe {str(path)!r} holds no fields.")
    return fields


def _timm_id(encoder_name: str) -> str | None:
    """Id on the Hub of the weights that timm loads for a name."""
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(encoder_name)
    return config.hf_hub_id if config else None
