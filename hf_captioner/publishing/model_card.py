"""The model card of a published captioner, as metadata and as text. Its template is `model_card.md` in this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg

from ..evaluation.protocol import describe_metrics, software_versions
from ..evaluation.results import Results
from ..files import parse_fields
from ..model.configuration_captioner import CaptionerConfig

TEMPLATE = Path(__file__).with_name("model_card.md")
RECIPE = "recipe.yaml"
TASK = "image-to-text"

# Names on the Hub: of data sets, by their short names here, and of metrics, by the prefix of their scores.
HUB_DATASETS = {"flickr8k": "jxie/flickr8k"}
HUB_METRICS = {"evaluate_bleu": "bleu", "plain_cider": "cider", "rouge_l": "rouge"}

# Fields of a recipe that do not describe the model, and fields that may hold a path on the machine it was trained on.
FIELDS_OF_THE_RUN = (
    *("output_dir", "resume", "checkpoint_minutes", "keep_checkpoints", "tracking", "cache_cells", "cache_dir"),
    *("num_workers", "num_threads", "push_to_hub"),
)
PATH_FIELDS = ("dataset", "encoder_weights", "word_vectors", "from_captioner")


@dataclass(frozen=True)
class CardDetails:
    """Details in a model card that its author gives or the training recipe holds; `card_details` explains the fields.

    The recipe holds no paths. The image source is the data set whose validation images the card shows, as the recipe
    names it: it may be a path, and is not published.
    """

    license: str
    datasets: Sequence[str]
    language: str = "en"
    base_model: str | None = None
    recipe: Mapping[str, Any] | None = None
    image_source: str | None = None
    limits: str | None = None

    @property
    def recipe_yaml(self) -> str:
        """The recipe as YAML; empty if there is none."""
        return yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True) if self.recipe else ""


class BundleDetails(NamedTuple):
    """Terms of use of the captioner that comes with the package, and scores of its export in 8 bits, for its card."""

    terms: str
    int8_results: Results | None = None


class Sample(NamedTuple):
    """Caption of an image, and the paths within the published folder of the image and of its attention maps."""

    image: str
    attention: str
    caption: str


def card_details(
    config: CaptionerConfig,
    *,
    license: str | None = None,
    datasets: Sequence[str] | str | None = None,
    language: str = "en",
    base_model: str | None = None,
    recipe: Mapping[str, Any] | str | Path | None = None,
    limits: str | None = None,
) -> CardDetails:
    """Complete the details of a model card from the training recipe, and check them.

    Args:
        config: Configuration of the model.
        license: Licence of the weights, by its name on the Hub (default: the recipe's).
        datasets: Names or Hub ids of one or several data sets that the model was trained on (default: the recipe's).
        language: Language of the captions, as an ISO 639-1 code.
        base_model: Id on the Hub of the model whose weights the encoder started from (default: timm's, if the recipe
            uses them).
        recipe: Fields of the training recipe, or a YAML file with them (default: `recipe.yaml` in the folder that the
            model was loaded from, if there is one).
        limits: Text for the section on limits (default: the template's).

    Raises:
        ValueError: Neither the arguments nor the recipe name a licence, or a data set.
        FileNotFoundError: There is no such recipe.
    """
    fields = dict(recipe) if isinstance(recipe, Mapping) else _read_recipe(recipe, config.name_or_path)
    license = license or fields.get("license")
    if not license:
        raise ValueError(
            "The model card names no licence. Say how others may use the weights, which depends on the data that they "
            "were trained on: license='apache-2.0', 'cc-by-nc-4.0', 'other', …"
        )
    image_source = fields.get("dataset")
    names = [datasets] if isinstance(datasets, str) else list(datasets or filter(None, [image_source]))
    if not names or not all(names):
        raise ValueError("The model card names no data set. Say what the model was trained on: datasets=['…'].")
    return CardDetails(
        license=license,
        datasets=[dataset_id(name) for name in names],
        language=language,
        base_model=base_model or _pretrained_encoder(fields),
        recipe=_publishable({**fields, "license": license} if "license" in fields else fields),
        image_source=image_source,
        limits=limits,
    )


def model_card(
    repo_id: str,
    config: CaptionerConfig,
    details: CardDetails,
    results: Results | None = None,
    samples: Sequence[Sample] = (),
    bundle: BundleDetails | None = None,
) -> ModelCard:
    """Render a model card.

    Args:
        repo_id: Id on the Hub under which the card's examples load the model, or its name in this package.
        config: Configuration of the model.
        details: What the author says about the model.
        results: Scores of the model.
        samples: Captioned images to show; the card's examples use the first.
        bundle: Further details of the captioner that comes with this package; None for one on the Hub.
    """
    results = results and _with_hub_dataset(results)
    entries = _eval_results(results, details.datasets[0]) if results else []
    data = ModelCardData(
        license=details.license,
        language=details.language,
        datasets=list(details.datasets),
        base_model=details.base_model,
        metrics=list(dict.fromkeys(entry.metric_type for entry in entries)) or None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=entries or None,
    )
    return ModelCard.from_template(
        data,
        str(TEMPLATE),
        repo_id=repo_id,
        details=details,
        encoder_name=config.encoder_name,
        packages=sorted(set((config.packages or {}).values())),
        software={name: version for name, version in software_versions().items() if name != "pycocoevalcap"},
        samples=samples,
        results=results,
        bundle=bundle,
    )


def dataset_id(name: str) -> str:
    """Return the id of a data set on the Hub; for a path, its last part."""
    return Path(name).resolve().name if _is_path(name) else HUB_DATASETS.get(name, name)


def _with_hub_dataset(results: Results) -> Results:
    """Return results whose data set is named as on the Hub, so that no path is published."""
    if results.protocol is not None:
        protocol = replace(results.protocol, dataset=dataset_id(results.protocol.dataset))
        return replace(results, protocol=protocol, description=protocol.description)
    dataset, comma, rest = results.description.partition(", ")
    return replace(results, description=dataset_id(dataset) + comma + rest) if dataset else results


def _eval_results(results: Results, dataset: str) -> list[EvalResult]:
    """Return the card's metadata about scores; `dataset` is the data set of results that have no protocol."""
    protocol = asdict(results.protocol) if results.protocol else {}
    dataset = protocol.get("dataset", dataset)
    about_data = ("num_images", "split_images", "references_per_image", "ids_sha256")
    dataset_args = {name: protocol[name] for name in about_data if name in protocol}
    shared_args = {name: protocol[name] for name in ("decoding", "software") if protocol.get(name)}
    entries = []
    for prefix, metric in describe_metrics([*results.scores]).items():
        metric_args = {name: metric[name] for name in ("version", "tokenizer", "brevity_penalty") if metric[name]}
        for name in metric["scores"]:
            ends = results.intervals.get(name)
            interval = {"interval": protocol.get("interval", {}) | {"ends": list(ends)}} if ends else {}
            entries.append(
                EvalResult(
                    task_type=TASK,
                    task_name="Image captioning",
                    dataset_type=dataset,
                    dataset_name=dataset.rpartition("/")[2],
                    dataset_split=protocol.get("split"),
                    dataset_args=dataset_args or {"protocol": results.description},
                    metric_type=HUB_METRICS.get(prefix, prefix),
                    metric_name=name,
                    metric_value=results.scores[name],
                    metric_args=metric_args | interval | shared_args,
                )
            )
    return entries


def _is_path(name: Any) -> bool:
    """Tell whether a data set or a file is named by a path on this machine rather than by an id on the Hub."""
    return isinstance(name, str) and (name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists())


def _read_recipe(path: str | Path | None, model_folder: str) -> dict[str, Any]:
    """Return the fields of a recipe; without a path, of the model's own recipe, or none if it has none."""
    if path is None:
        path = Path(model_folder, RECIPE)
        if not model_folder or not path.is_file():
            return {}
    name = f"The recipe {str(path)!r}"
    try:
        fields = parse_fields(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{name} can't be read as YAML: {e}.") from e
    if not fields:
        raise ValueError(f"{name} holds no fields. Give the recipe.yaml that the training wrote.")
    for field in ("license", "encoder_name", *PATH_FIELDS):
        if not isinstance(fields.get(field), str | None):
            raise ValueError(f"{name} has {field}: {fields[field]!r:.60}, which must be text.")
    return fields


def _publishable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe that describe the model, with paths shortened to their last part."""
    fields = {name: value for name, value in recipe.items() if name not in FIELDS_OF_THE_RUN}
    return fields | {name: Path(fields[name]).resolve().name for name in PATH_FIELDS if _is_path(fields.get(name))}


def _pretrained_encoder(recipe: Mapping[str, Any]) -> str | None:
    """Return the Hub id of timm's weights that the encoder started from; None if it started from others or none."""
    if not recipe.get("pretrained") or recipe.get("encoder_weights"):
        return None
    config = get_pretrained_cfg(recipe["encoder_name"])
    return config.hf_hub_id if config else None
