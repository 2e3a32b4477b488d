"""Publishing a captioner on the Hub, in one commit, so that no incomplete version is ever visible."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id

from ..evaluation.results import read_results
from ..evaluation.scoring import Evaluation
from ..files import explain_write_errors
from ..model.attentions import ATTENTIONS
from ..model.configuration_captioner import CaptionerConfig
from ..model.decoders import DECODERS
from ..model.encoders import ENCODERS
from ..model.images import ImageSource
from ..model.modeling_captioner import CaptionerModel
from ..model.processing_captioner import CaptionerProcessor
from .folders import require_empty
from .model_card import RECIPE, CardDetails, card_details
from .published_folder import write_published_folder

# Files of an earlier version that a push removes: of kinds that are published, and weights in other formats.
OUTDATED = re.compile(
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
    **details: Any,
) -> str:
    """Publish a captioner on the Hub.

    Large files are uploaded first, to a store outside the repository; then one commit adds all files at once. If the
    upload is interrupted, nothing is published, and the next push uploads only what is missing.

    Args:
        model: Captioner to publish.
        processor: The model's processor.
        repo_id: Repository, such as `your-name/captioner` or, for the token's user, `captioner`; created if missing.
        results: Scores for the model card, in any form that `read_results` accepts.
        images: Images to caption in the card (default: some validation images of the recipe's data set). They are
            published, so choose others if their licence does not allow that.
        private: Whether a new repository is private (default: the Hub's setting), and an existing one must be.
        revision: Branch, created if missing (default: main).
        token: Access token of a user who may write to the repository (default: the user who is logged in).
        message: Commit message.
        details: For the card, see `card_details`: `license`, `datasets`, `language`, `base_model`, `recipe`, `limits`.

    Returns:
        URL of the commit.

    Raises:
        ValueError: No licence or no data set is named, nobody else can load a part of the model, the id is invalid,
            or the repository is not as private as it should be. Nothing is uploaded.
        PermissionError: The Hub refuses the token.
        ConnectionError: The Hub cannot be reached, or the connection broke.
    """
    card = _check(model.config, repo_id, details)
    scores = None if results is None else read_results(results)
    api, user = _log_in(repo_id, token)  # before the work below, which a refused token would waste
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    with TemporaryDirectory() as folder:
        write_published_folder(Path(folder), model, processor, repo_id, scores, card, images)
        with _explained_errors(repo_id):
            return _upload(api, Path(folder), repo_id, private, revision, message)


def export_folder(
    folder: str | Path,
    model: CaptionerModel,
    processor: CaptionerProcessor,
    repo_id: str,
    results: Mapping[str, Any] | Evaluation | str | Path | None = None,
    *,
    images: Sequence[ImageSource] | None = None,
    **details: Any,
) -> Path:
    """Write the files that `push` publishes to a new or empty folder, without publishing them.

    The folder loads by its path as a published model loads by its id, with hf_captioner or with
    `trust_remote_code=True`. All other arguments are those of `push`.

    Raises:
        ValueError: The folder is not empty, or `push` would refuse the model.
    """
    folder = Path(folder)
    card = _check(model.config, repo_id, details)
    require_empty(folder)
    scores = None if results is None else read_results(results)
    with explain_write_errors("The captioner", folder):
        return write_published_folder(folder, model, processor, repo_id, scores, card, images)


def check_push(config: CaptionerConfig, repo_id: str, *, token: str | None = None, **details: Any) -> None:
    """Raise the errors of a later `push` with these arguments now, rather than after a long training."""
    _check(config, repo_id, details)
    _log_in(repo_id, token)


def _check(config: CaptionerConfig, repo_id: str, details: Mapping[str, Any]) -> CardDetails:
    """Check the repository id and that others can load the model's parts; return the details of its card."""
    validate_repo_id(repo_id)
    types = {ENCODERS: config.encoder_type, ATTENTIONS: config.attention_type, DECODERS: config.decoder_type}
    for registry, name in types.items():
        if name in registry.names() and registry.origin(name) == "registered in this process":
            raise ValueError(
                f"{name!r} of the {registry.kind} is registered in this process alone, so nobody else could load the "
                "model. Put it into a package that others can install (see docs/extend.md)."
            )
    return card_details(config, **details)


def _log_in(repo_id: str, token: str | None) -> tuple[HfApi, str]:
    """Return a client of the Hub and the name of its user."""
    api = HfApi(token=token, library_name="hf_captioner")
    with _explained_errors(repo_id):
        return api, str(api.whoami()["name"])


def _upload(api: HfApi, folder: Path, repo_id: str, private: bool | None, revision: str | None, message: str) -> str:
    """Replace the captioner in a repository by the one in a folder, in one commit, and return the commit's URL."""
    _validate(ModelCard.load(folder / "README.md"))
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    current = api.model_info(repo_id, revision=revision)
    if private is not None and bool(current.private) != private:
        raise ValueError(
            f"{repo_id!r} exists and is {'private' if current.private else 'public'}: nothing is uploaded. Change that "
            "in its settings, or do not ask for another visibility."
        )
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    others = [sibling.rfilename for sibling in current.siblings or [] if sibling.rfilename not in files]
    # Not upload_folder, which makes several commits where hf_xet is installed.
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, str(file)) for name, file in files.items()),
            *(CommitOperationDelete(name, is_folder=False) for name in others if OUTDATED.fullmatch(name)),
        ],
        commit_message=message,
        revision=revision,
        parent_commit=current.sha,  # the Hub refuses the commit if another was made meanwhile
    )
    return str(commit.commit_url)


def _validate(card: ModelCard) -> None:
    """Have the Hub validate a card's metadata before anything is created there; raise a ValueError if it is refused."""
    try:
        card.validate()
    except ValueError as e:
        errors = ", ".join(re.findall(r'"message": *"((?:[^"\\]|\\.)*)"', str(e))) or str(e)
        raise ValueError(f"The Hub refuses the model card: {errors}") from e


@contextmanager
def _explained_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub and of the connection into built-in errors whose one-line message says what to do."""
    try:
        yield
    except LocalTokenNotFoundError as e:
        raise PermissionError("You are not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN.") from e
    except OfflineModeIsEnabled as e:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it.") from e
    except HfHubHTTPError as e:
        status = e.response.status_code
        answer = " ".join((e.server_message or str(e)).split())
        if status in (401, 403):
            raise PermissionError(
                f"The Hub refuses the token for {repo_id!r} ({status}: {answer}). Use a token that may write there: "
                "`hf auth login`, HF_TOKEN, or token='…'."
            ) from e
        if status in (409, 412):
            raise ConnectionError(f"{repo_id!r} has changed meanwhile ({answer}). Push again.") from e
        raise ConnectionError(f"The Hub refuses {repo_id!r} ({status}: {answer}). Nothing is published.") from e
    except (httpx.HTTPError, RuntimeError) as e:  # huggingface_hub raises RuntimeError when an upload fails
        reason = " ".join(str(e.__cause__ or e).split()).rstrip(".") or type(e.__cause__ or e).__name__
        raise ConnectionError(
            f"The connection to the Hub broke: {reason}. Nothing is published. What was uploaded is kept, so push "
            "again to continue."
        ) from e
