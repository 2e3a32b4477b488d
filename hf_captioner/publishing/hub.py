r"""A captioner as others can use it: a folder with weights, code, card and pictures, and its way to the Hub.

    python -m hf_captioner.publishing.hub outputs/shapes your-name/captioner --license apache-2.0
    python -m hf_captioner.publishing.hub outputs/flickr8k your-name/captioner --license cc-by-nc-4.0 \
        --results outputs/flickr8k/evaluation/results.json --image first.jpg second.jpg --private
    python -m hf_captioner.publishing.hub outputs/shapes your-name/captioner --license apache-2.0 --output_dir published  # no push

Pushing needs a token: `hf auth login`, the variable HF_TOKEN, or --token.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .. import model as model_folder
from ..model.attentions import ATTENTIONS
from ..model.configuration_captioner import CaptionerConfig
from ..model.decoders import DECODERS
from ..model.encoders import ENCODERS
from ..model.images import ImageSource, open_image
from ..model.modeling_captioner import CaptionerModel
from ..model.pipeline_captioner import ImageCaptioningPipeline
from ..model.processing_captioner import CaptionerProcessor
from .model_card import RECIPE, Facts, Sample, Scores, model_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard

    from ..evaluation.scoring import Evaluation


MODEL_FOLDER = Path(model_folder.__path__[0])
# Modules that go to the Hub, with all that they import, for who has no hf_captioner.
TRAVELLING = (
    *("configuration_captioner", "image_processing_captioner", "modeling_captioner", "processing_captioner"),
    *("guided_decoding", "pipeline_captioner"),
)
# Where transformers' Auto classes find theirs, by the file that says so.
AUTO_CLASSES = {
    "config.json": {
        "AutoConfig": "configuration_captioner.CaptionerConfig",
        "AutoModel": "modeling_captioner.CaptionerModel",
        "AutoModelForImageTextToText": "modeling_captioner.CaptionerModel",
    },
    "processor_config.json": {
        "AutoImageProcessor": "image_processing_captioner.CaptionerImageProcessor",
        "AutoProcessor": "processing_captioner.CaptionerProcessor",
    },
}

NUM_SAMPLES = 4
SAMPLE_SIZE = 640  # pixels of the longer edge, at most
# What an earlier version may have left behind: files of the kinds that are published, and weights of other formats.
REPLACED = re.compile(
    r"[^/]+\.(py|safetensors|safetensors\.index\.json|bin|bin\.index\.json|pt|pth|ckpt|pkl|pickle)"
    rf"|samples/[^/]+\.png|{re.escape(RECIPE)}"
)


def push(
    model: CaptionerModel,
    processor: CaptionerProcessor,
    repo_id: str,
    results: Mapping[str, Any] | Evaluation | str | Path | None = None,
    *,
    images: Sequence[ImageSource] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload captioner",
    **facts: Any,
) -> str:
    """Publish a captioner on the Hub, as one version: nobody sees a part of it.

    Large files go first, to where only their contents count, and one commit then names all files at once. If that is
    interrupted, nothing is published, and the next push sends only the files that are still missing.

    Args:
        model: to publish.
        processor: of the model.
        repo_id: `your-name/captioner`, made if it is not there; without `your-name/`, in the token's own namespace.
        results: scores, see `Scores.of`.
        images: to caption in the card, with pictures of where the model looked. By default a few of the validation
            split of the recipe's data set; they are published, so name others if their licence does not allow that.
        private: make the repository one that only its owners see; None leaves that to it, or to the Hub.
        revision: branch; made if it is not there.
        token: of a user who may write there; by default the one logged in.
        message: of the commit.
        facts: for the card, see `Facts.of`: `license`, `datasets`, `language`, `base_model`, `recipe`, `limits`.

    Returns:
        URL of the commit.

    Raises:
        ValueError: the card names no licence or no data set; a part that others can't have; a bad id; a repository
            that is not private, or is, where the other is asked for. Nothing is uploaded then.
        PermissionError: the Hub refuses the token.
        ConnectionError: the Hub can't be reached, or no longer.
    """
    known, scores = _known(model.config, repo_id, facts), Scores.of(results)
    api, user = _log_in(repo_id, token)  # before much work is done for a token that is refused
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    with TemporaryDirectory() as folder:
        _write_folder(Path(folder), model, processor, repo_id, scores, known, images)
        with _errors_in_one_line(repo_id):
            return _upload(api, Path(folder), repo_id, private, revision, message)


def export_folder(
    folder: str | Path,
    model: CaptionerModel,
    processor: CaptionerProcessor,
    repo_id: str,
    results: Mapping[str, Any] | Evaluation | str | Path | None = None,
    *,
    images: Sequence[ImageSource] | None = None,
    **facts: Any,
) -> Path:
    """Write the folder that `push` publishes: weights (safetensors), code, card, recipe and samples.

    It loads by its path like a published model by its id, with hf_captioner or with `trust_remote_code=True`.

    Args:
        folder: new or empty.
        model: see `push`, as for the others.
        processor: of the model.
        repo_id: under which the card's usage loads it.
        results: scores.
        images: to caption in the card.
        facts: for the card.

    Raises:
        ValueError: the folder is not empty, or what `push` refuses.
    """
    folder = Path(folder)
    known = _known(model.config, repo_id, facts)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} is not an empty folder. Name a new one.")
    return _write_folder(folder, model, processor, repo_id, Scores.of(results), known, images)


def check_push(config: CaptionerConfig, repo_id: str, *, token: str | None = None, **facts: Any) -> None:
    """Refuse, before a long training, what `push` would refuse after it.

    Args:
        config: of the model.
        repo_id: see `push`, as for the others.
        token: of the user.
        facts: for the card.

    Raises:
        ValueError, PermissionError, ConnectionError: see `push`.
    """
    _known(config, repo_id, facts)
    _log_in(repo_id, token)


def _known(config: CaptionerConfig, repo_id: str, facts: Mapping[str, Any]) -> Facts:
    """What the card says, of a model that others can have."""
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    types = {ENCODERS: config.encoder_type, ATTENTIONS: config.attention_type, DECODERS: config.decoder_type}
    for registry, name in types.items():
        if name in registry.names() and registry.origin(name) == "registered in this process":
            raise ValueError(
                f"{name!r} of the {registry.kind} is registered in this process alone: nobody else could load the "
                "model. Put it into a package that others can install (see the README, Add a part)."
            )
    return Facts.of(config, **facts)


def _log_in(repo_id: str, token: str | None) -> tuple[HfApi, str]:
    """The Hub's interface, and the user's name there."""
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="hf_captioner")
    with _errors_in_one_line(repo_id):
        return api, str(api.whoami()["name"])


def _write_folder(
    folder: Path,
    model: CaptionerModel,
    processor: CaptionerProcessor,
    repo_id: str,
    scores: Scores,
    facts: Facts,
    images: Sequence[ImageSource] | None,
) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    _add_code(folder)
    if facts.recipe:
        (folder / RECIPE).write_text(facts.recipe_text(), encoding="utf-8")
    images = _validation_images(facts) if images is None else images
    card = model_card(repo_id, model.config, facts, scores, _add_samples(folder, images))
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    return folder


def _add_code(folder: Path) -> None:
    """Copy the travelling modules, and say in the JSON files which classes are in them."""
    from transformers.dynamic_module_utils import get_relative_import_files

    for name in TRAVELLING:
        module = MODEL_FOLDER / f"{name}.py"
        for file in (module, *map(Path, get_relative_import_files(module))):
            shutil.copyfile(file, folder / file.name)
    for name, classes in AUTO_CLASSES.items():
        record = json.loads((folder / name).read_text(encoding="utf-8"))
        record["auto_map"] = classes
        if "image_processor" in record:
            record["image_processor"]["auto_map"] = classes
        (folder / name).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _validation_images(facts: Facts) -> list[ImageSource]:
    """A few images across the validation split of the recipe's data set; none where there is no recipe."""
    from ..data.datasets import load_captions

    if facts.source is None:
        return []
    try:
        rows = load_captions(facts.source, "validation")
    except (OSError, ValueError) as e:
        raise ValueError(
            f"No images for the card can be had from {facts.source!r}: {e} Name some, or none: images=['a.jpg']."
        ) from e
    return [rows[index]["image"] for index in range(0, len(rows), max(1, len(rows) // NUM_SAMPLES))][:NUM_SAMPLES]


def _add_samples(folder: Path, images: Sequence[ImageSource]) -> list[Sample]:
    """Caption images by the model as it lies in the folder, and draw where it looked."""
    from ..visualization.figures import attention_figure

    model, processor = CaptionerModel.from_pretrained(folder), CaptionerProcessor.from_pretrained(folder)
    captioner = ImageCaptioningPipeline(model=model, processor=processor, device="cpu")
    samples = []
    for number, source in enumerate(images, 1):
        (folder / "samples").mkdir(exist_ok=True)
        sample = Sample(f"samples/{number}.png", f"samples/{number}_attention.png", "")
        image = open_image(source)
        image.thumbnail((SAMPLE_SIZE, SAMPLE_SIZE))
        image.save(folder / sample.image)
        # What is captioned is what is published, so that everybody gets this very caption.
        caption = captioner(image, return_attentions=True)[0]
        figure = attention_figure(image, caption["words"], caption["attentions"], caption["box"])
        figure.savefig(folder / sample.attention)
        samples.append(Sample(sample.image, sample.attention, caption["generated_text"]))
    return samples


def _upload(api: HfApi, folder: Path, repo_id: str, private: bool | None, revision: str | None, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard

    _validate(ModelCard.load(folder / "README.md"))
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    before = api.model_info(repo_id, revision=revision)
    if private is not None and bool(before.private) != private:
        raise ValueError(
            f"{repo_id!r} exists and is {'private' if before.private else 'public'}: nothing is uploaded. Change that "
            "in its settings, or leave `private` alone."
        )
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    old = [sibling.rfilename for sibling in before.siblings or [] if sibling.rfilename not in files]
    # Not upload_folder: where xet is installed, it publishes a folder in several commits.
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, str(file)) for name, file in files.items()),
            *(CommitOperationDelete(name, is_folder=False) for name in old if REPLACED.fullmatch(name)),
        ],
        commit_message=message,
        revision=revision,
        parent_commit=before.sha,  # files of another version pushed meanwhile are not mixed with these
    )
    return str(commit.commit_url)


def _validate(card: ModelCard) -> None:
    """Ask the Hub whether the metadata is as it must be, before anything is made there."""
    try:
        card.validate()
    except ValueError as e:
        errors = ", ".join(re.findall(r'"message": *"((?:[^"\\]|\\.)*)"', str(e))) or str(e)
        raise ValueError(f"The Hub refuses the model card: {errors}") from e


@contextmanager
def _errors_in_one_line(repo_id: str) -> Iterator[None]:
    """What can go wrong on the way to the Hub, as built-in errors that say what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    try:
        yield
    except LocalTokenNotFoundError as e:
        raise PermissionError("You are not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN.") from e
    except OfflineModeIsEnabled as e:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it.") from e
    except HfHubHTTPError as e:
        status = e.response.status_code
        said = " ".join((e.server_message or str(e)).split())
        if status in (401, 403):
            raise PermissionError(
                f"The Hub refuses the token for {repo_id!r} ({status}: {said}). Give one that may write there: "
                "`hf auth login`, HF_TOKEN, or token='…'."
            ) from e
        if status in (409, 412):
            raise ConnectionError(f"{repo_id!r} has changed meanwhile ({said}). Push again.") from e
        raise ConnectionError(
            f"The Hub does not take {repo_id!r} ({status}: {said}). This version is not published."
        ) from e
    except (httpx.HTTPError, RuntimeError) as e:  # a RuntimeError is huggingface_hub's for an upload that fails
        reason = " ".join(str(e.__cause__ or e).split()).rstrip(".") or type(e.__cause__ or e).__name__
        raise ConnectionError(
            f"The connection to the Hub broke: {reason}. {repo_id!r} is published whole or not at all, what arrived "
            "is kept, and another push goes on from there."
        ) from e
