"""Captioners are pushed to a Hub on the loopback interface, and loaded from it by other processes."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import HubServer, hub_server
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load as load_safetensors
from workers import FailedError, Worker

from hf_captioner import CaptionerConfig
from hf_captioner.evaluation.results import read_results
from hf_captioner.publishing.model_card import CardDetails, model_card

ROOT = Path(__file__).resolve().parents[1]
ID = "me/captioner"
INHERITED = os.environ.get("PYTHONPATH", "")
OFFLINE = {"HF_HUB_OFFLINE": "1"}
REMOTE_CODE_NEEDS = ("transformers", "timm", "torch")  # according to the card

RESULTS = {
    "scores": {"bleu_4": 0.21, "cider": 0.53, "evaluate_bleu_4": 0.2, "num_words": 17},
    "intervals": {"bleu_4": [0.19, 0.23], "cider": [0.5, 0.56]},
    "protocol": {
        "system": "/home/me/outputs", "decoding": {"num_beams": 5}, "dataset": "flickr8k", "split": "test",
        "num_images": 1000, "split_images": 1000, "ids_sha256": "0" * 64, "references_per_image": [5, 5],
        "metrics": {"bleu": {"scores": ["bleu_4"], "comparable_with": "BLEU of captioning papers"}},
        "interval": {"level": 0.95, "resamples": 1000}, "software": {"hf_captioner": "0.1.0"},
    },
}  # fmt: skip
RECIPE = {
    "dataset": "/home/me/flickr8k_of_mine", "output_dir": "/home/me/outputs", "encoder_name": "test_resnet",
    "pretrained": True, "epochs": 9, "license": "cc-by-nc-4.0", "push_to_hub": ID,
}  # fmt: skip

SET_UP = """
import os, time
from pathlib import Path
import huggingface_hub.utils
from hf_captioner import CaptionerModel, CaptionerProcessor, push
from hf_captioner.publishing.hub import export_folder
from transformers.utils import logging
from hf_captioner.model.guided_decoding import diverse_beam_search

logging.disable_progress_bar()
model = CaptionerModel.from_pretrained(folder).eval()
model.generation_config.max_length = 8
processor = CaptionerProcessor.from_pretrained(folder)
details = {"license": "mit", "datasets": "shapes", "images": []}
"""
PUSH = f"answer = push(model, processor, {ID!r}, results, recipe=recipe, images=photos[:2])"

# Run by processes that have loaded `model`, `processor` and `diverse_beam_search`.
CAPTION = """
inputs = processor(photos)
answer = {
    "beams": processor.batch_decode(model.generate(**inputs)),
    "greedy": processor.batch_decode(model.generate(**inputs, num_beams=1)),
    "diverse": processor.batch_decode(
        model.generate(**inputs, custom_generate=diverse_beam_search, num_beams=4, num_beam_groups=2)),
    "score": model.score(**inputs, captions=processor(text=["a black dog"] * len(photos))["labels"]).scores.tolist(),
}
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with hub_server(me="hf_mine", you="hf_yours") as server:
        yield server


@pytest.fixture(autouse=True)
def connected(hub: HubServer) -> Iterator[None]:
    """Restore the Hub's connections after each test."""
    yield
    hub.cut = lambda sha, arrived: False
    hub.hold.clear()


Start = Callable[..., Worker]


@pytest.fixture(scope="module")
def start(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a process that uses this Hub; processes of the same name share a cache."""
    workers, folder = [], tmp_path_factory.mktemp("workers")

    def start(name: str, environment: dict[str, str] | None = None, **kwargs: Any) -> Worker:
        # Xet, the Hub's other store for large files, is a service of its own that this Hub lacks.
        shared = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_mine"}
        shared |= {"HF_HOME": str(folder / name / "home"), "PYTHONPATH": f"{ROOT}{os.pathsep}{INHERITED}"}
        workers.append(Worker(folder / name, shared | (environment or {}), **kwargs))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def pusher(start: Start, captioner_folder: Path, photo_files: list[Path]) -> Worker:
    """Process that has loaded a captioner, its processor and photographs."""
    worker = start("pusher")
    photos = [str(file) for file in photo_files[:3]]
    worker.run(SET_UP, folder=str(captioner_folder), photos=photos, results=RESULTS, recipe=RECIPE)
    return worker


@pytest.fixture(scope="module")
def published(hub: HubServer, pusher: Worker) -> dict[str, bytes]:
    """Push the captioner, and return the files that are then on the Hub."""
    url = pusher.run(PUSH)
    assert url == f"{hub.endpoint}/{ID}/commit/{hub.repos[ID].branches['main']}"
    return hub.contents(ID)


@pytest.fixture(scope="module")
def expected(pusher: Worker) -> dict[str, Any]:
    """Captions and scores of the captioner before it was pushed."""
    return dict(pusher.run(CAPTION))


@pytest.fixture(scope="module")
def alone(start: Start, published: dict[str, bytes]) -> Worker:
    """Process in which only transformers, timm, torch and what they require can be imported."""
    return start("alone", only=REMOTE_CODE_NEEDS, without=("hf_captioner",))


@pytest.fixture(scope="module")
def reader(start: Start, hub: HubServer, published: dict[str, bytes]) -> Worker:
    """Process with the package; it also adds a private repository with three different captioners to the Hub."""
    files = hub.repos[ID].find("main").files  # type: ignore[union-attr]
    hub.repos["me/private"] = repo = type(hub.repos[ID])(private=True, owner="me")
    repo.add("main", "first", {**files, **{f"inside/{name}": file for name, file in changed(files, 3).items()}})
    repo.add("old", "older", changed(files, 2))
    return start("reader", {"HF_TOKEN": ""})


def changed(files: dict[str, bytes | str], number: int) -> dict[str, bytes | str]:
    """Return the files of a captioner, changed so that each of its parts shows this number when it is loaded."""
    records = {name: json.loads(files[name]) for name in files if name.endswith("config.json")}
    records["config.json"]["initializer_range"] = number / 10
    records["generation_config.json"]["max_length"] = number
    records["tokenizer_config.json"]["model_max_length"] = number
    records["processor_config.json"]["image_processor"]["crop_pct"] = number / 10
    return files | {name: json.dumps(record).encode() for name, record in records.items()}


# Reads files by their suffix.
READERS: dict[str, Callable[[bytes], Any]] = {
    ".json": json.loads, ".yaml": yaml.safe_load, ".py": ast.parse, ".safetensors": load_safetensors,
    ".png": lambda data: Image.open(io.BytesIO(data)).load(), ".md": bytes.decode, "": bytes.decode,
}  # fmt: skip


def test_a_push_is_one_commit_of_safe_files(
    hub: HubServer, published: dict[str, bytes], captioner_folder: Path
) -> None:
    assert hub.repos[ID].history() == ["Upload captioner", "initial commit"]
    assert {Path(name).suffix for name in published} == READERS.keys()
    assert len(load_safetensors(published["model.safetensors"])) > 50
    for name, data in published.items():
        READERS[Path(name).suffix](data)
        assert str(captioner_folder).encode() not in data, name
        # Neither a pickle (of any protocol since 2) nor an archive of torch.save.
        assert not data.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")), name


def test_the_card_has_metadata_and_scores_with_their_protocol(published: dict[str, bytes]) -> None:
    card = ModelCard(published["README.md"].decode())
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("hf_captioner", "image-to-text", "cc-by-nc-4.0")
    assert (data.language, data.datasets, data.metrics) == ("en", ["flickr8k_of_mine"], ["bleu", "cider"])
    assert data.base_model == "timm/test_resnet.r160_in1k"
    results = {result.metric_name: result for result in data.eval_results}
    assert set(results) == {"bleu_4", "cider", "evaluate_bleu_4"}
    bleu = results["bleu_4"]
    assert (bleu.metric_value, bleu.metric_type, bleu.dataset_type) == (0.21, "bleu", "jxie/flickr8k")
    assert bleu.dataset_split == "test" and bleu.dataset_args["num_images"] == 1000
    assert bleu.metric_args["interval"]["ends"] == [0.19, 0.23] and bleu.metric_args["decoding"] == {"num_beams": 5}
    assert "PTB" in bleu.metric_args["tokenizer"]
    assert "13a" in results["evaluate_bleu_4"].metric_args["tokenizer"]

    assert "| bleu_4 | 0.2100 | 0.1900 to 0.2300 |" in card.text and "| num_words | 17 |  |" in card.text
    assert "jxie/flickr8k, test, 1000 images, 5 beams" in card.text
    assert "- bleu_4: BLEU of captioning papers" in card.text
    assert "/home/me" not in str(card) and "{{" not in str(card)
    recipe = yaml.safe_load(published["recipe.yaml"])
    assert recipe == {
        "dataset": "flickr8k_of_mine", "encoder_name": "test_resnet", "pretrained": True, "epochs": 9,
        "license": "cc-by-nc-4.0",
    }  # fmt: skip
    assert published["recipe.yaml"].decode().strip() in card.text
    assert "The weights are licensed under `cc-by-nc-4.0`" in card.text


def test_a_card_shows_scores_of_the_first_release() -> None:
    results = read_results(ROOT / "tests" / "fixtures" / "first_release" / "captioner" / "scores.json")
    card = model_card("me/x", CaptionerConfig(), CardDetails("mit", ["shapes"]), results)
    assert "Scores on shapes, validation, 80 images, 3 beams:" in card.text and "| bleu_4 | 0.3647 |" in card.text
    assert card.data.eval_results[3].dataset_args == {"protocol": "shapes, validation, 80 images, 3 beams"}


def test_the_card_shows_captioned_images(published: dict[str, bytes], photos: list[Image.Image]) -> None:
    card = published["README.md"].decode()
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card)
    assert pictures == ["samples/1_attention.png", "samples/2_attention.png"]
    captions = re.findall(r"^> (.+)$", card, re.MULTILINE)
    assert len(captions) == 2 and all(len(caption.split()) >= 3 for caption in captions)
    for number, photo in enumerate(photos[:2], 1):
        sample = Image.open(io.BytesIO(published[f"samples/{number}.png"]))
        assert sample.size == photo.size and min(Image.open(io.BytesIO(published[pictures[number - 1]])).size) > 200


def test_the_python_in_the_card_runs(published: dict[str, bytes], alone: Worker, reader: Worker) -> None:
    card = published["README.md"].decode()
    with_package, without = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    caption = re.findall(r"^> (.+)$", card, re.MULTILINE)[0]
    assert reader.run(PRINTED, program=with_package).strip() == caption
    assert alone.run(PRINTED, program=without).strip() == caption


# Runs `program` and answers what it prints.
PRINTED = """
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()) as out:
    exec(program)
answer = out.getvalue()
"""

LOAD_ALONE = """
import sys
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

trust = {"trust_remote_code": True}
config, model, tokenizer = (auto.from_pretrained(id, **trust) for auto in (AutoConfig, AutoModel, AutoTokenizer))
other = AutoModelForImageTextToText.from_pretrained(id, **trust)
image_processor, processor = (auto.from_pretrained(id, **trust) for auto in (AutoImageProcessor, AutoProcessor))
diverse_beam_search = get_class_from_dynamic_module("guided_decoding.diverse_beam_search", id)
answer = {
    "classes": [type(part).__name__ for part in (config, model, other, image_processor, processor)],
    "remote": all(type(part).__module__.startswith("transformers_modules.")
                  for part in (config, model, other, image_processor, processor)),
    "words": tokenizer.get_vocab() == processor.tokenizer.get_vocab(),
    "size": image_processor.size == processor.image_processor.size,
    "imported": sorted(name for name in ("hf_captioner", "datasets", "matplotlib", "accelerate", "evaluate")
                       if sys.modules.get(name)),
}
"""
ALL_CLASSES = {
    "classes": ["CaptionerConfig", "CaptionerModel", "CaptionerModel", "CaptionerImageProcessor", "CaptionerProcessor"],
    "remote": True, "words": True, "size": True, "imported": [],
}  # fmt: skip


def test_everything_works_without_the_package(
    alone: Worker, expected: dict[str, Any], photo_files: list[Path], tmp_path: Path
) -> None:
    assert alone.run(LOAD_ALONE, id=ID) == ALL_CLASSES
    photos = [str(file) for file in photo_files[:3]]
    assert same(alone.run(CAPTION, photos=photos), expected)
    pipeline = """
build = get_class_from_dynamic_module("pipeline_captioner.ImageCaptioningPipeline", id)
captions = build(model=model, processor=processor, device="cpu")(photos, return_attentions=True)
answer = [(caption["generated_text"], caption["attentions"].shape[1:]) for (caption,) in captions]
"""
    assert alone.run(pipeline) == [[caption, [4, 4]] for caption in expected["beams"]]
    # A copy saved by the remote code works as well.
    alone.run("model.save_pretrained(again)\nprocessor.save_pretrained(again)", again=str(tmp_path / "again"))
    shutil.copy(ROOT / "hf_captioner" / "model" / "guided_decoding.py", tmp_path / "again")
    assert alone.run(LOAD_ALONE, id=str(tmp_path / "again")) == ALL_CLASSES
    assert same(alone.run(CAPTION), expected)


def same(captions: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Compare captions exactly, and scores up to rounding."""
    scores = [value for row in captions.pop("score") for value in row]
    assert scores == pytest.approx([value for row in expected["score"] for value in row], abs=1e-4)
    return captions == {name: value for name, value in expected.items() if name != "score"}


ENTRY_POINTS = """
import os
from hf_captioner import CaptionerConfig, CaptionerImageProcessor, CaptionerModel, CaptionerProcessor
from hf_captioner.cli import load_captioner
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline)

def build_pipeline(id, revision=None, token=None, **kwargs):
    built = pipeline("image-captioning", model=id, revision=revision, token=token, model_kwargs=kwargs)
    return built.model, built.processor

classes = (CaptionerConfig, CaptionerModel, CaptionerImageProcessor, CaptionerProcessor, AutoConfig, AutoModel,
           AutoModelForImageTextToText, AutoImageProcessor, AutoProcessor, AutoTokenizer)
ways = {kind.__name__: kind.from_pretrained for kind in classes}
ways |= {"pipeline": build_pipeline, "load_captioner": load_captioner}

def numbers(part):
    "Return the numbers that `changed` set, from whatever was loaded."
    if isinstance(part, tuple):
        return [number for each in part for number in numbers(each)]
    found = [getattr(part, "initializer_range", None), getattr(part, "crop_pct", None)]
    if hasattr(part, "generation_config"):
        found += [part.config.initializer_range, part.generation_config.max_length / 10]
    tokenizer = getattr(part, "tokenizer", part)
    found += [getattr(tokenizer, "model_max_length", 10) / 10]
    if hasattr(part, "image_processor"):
        found += [part.image_processor.crop_pct]
    return [number for number in found if number not in (None, 1.0)]
"""


LOAD_ALL_WAYS = """
answer = {}
for name, load in ways.items():
    try:
        answer[name] = sorted(set(numbers(load("me/private", **kwargs))))
    except Exception as e:
        answer[name] = type(e).__name__
"""


def test_every_entry_point_takes_revision_subfolder_token_and_cache(
    reader: Worker, start: Start, tmp_path: Path
) -> None:
    shared = {"cache_dir": str(tmp_path / "cache")}

    def check_numbers(process: Worker, **kwargs: str) -> None:
        for location, number in (({"revision": "old"}, 0.2), ({"subfolder": "inside"}, 0.3)):
            found = process.run(LOAD_ALL_WAYS, kwargs={**shared, **kwargs, **location})
            assert len(found) == 12 and set(map(tuple, found.values())) == {(number,)}, (location, found)

    reader.run(ENTRY_POINTS)
    check_numbers(reader, token="hf_mine")
    for token in ({}, {"token": "hf_yours"}):  # neither may read the repository
        found = reader.run(LOAD_ALL_WAYS, kwargs={"cache_dir": str(tmp_path / "empty"), "revision": "old", **token})
        assert all(isinstance(error, str) and error.endswith("Error") for error in found.values()), found
    downloads = 'answer = os.path.exists(os.path.join(os.environ["HF_HOME"], "hub", "models--me--private"))'
    assert reader.run(downloads) is False

    # The same from the cache, without a Hub.
    offline = start("offline", {**OFFLINE, "HF_ENDPOINT": "http://127.0.0.1:9"})
    offline.run(ENTRY_POINTS)
    check_numbers(offline)
    with pytest.raises(FailedError, match=r"ConnectionError: HF_HUB_OFFLINE is set"):
        offline.run(
            "from hf_captioner import push\nmodel, processor = load_captioner('me/private', **kwargs)\n"
            "push(model, processor, 'me/x', license='mit', datasets='shapes')",
            kwargs={**shared, "revision": "old"},
        )


@pytest.mark.slow
def test_remote_code_runs_offline_from_the_cache(
    alone: Worker, start: Start, expected: dict[str, Any], photo_files: list[Path]
) -> None:
    alone.run(LOAD_ALONE, id=ID)
    environment = {**OFFLINE, "HF_ENDPOINT": "http://127.0.0.1:9"}
    offline = start("alone", environment, only=REMOTE_CODE_NEEDS, without=("hf_captioner",))
    assert offline.run(LOAD_ALONE, id=ID) == ALL_CLASSES
    assert same(offline.run(CAPTION, photos=[str(file) for file in photo_files[:3]]), expected)


def test_commands_load_captioners_from_the_hub(reader: Worker, photo_files: list[Path], tmp_path: Path) -> None:
    hub = ["--revision", "old", "--token", "hf_mine", "--cache-dir", str(tmp_path / "cache")]

    def run(*arguments: str) -> str:
        program = "from hf_captioner.__main__ import main\nassert main(arguments) == 0"
        return str(reader.run(PRINTED, program=program, arguments=[*arguments, *hub]))

    line = run("caption", "me/private", str(photo_files[0]), "--device", "cpu")
    assert len(line.split("\t")[1].split()) == 1  # max_length is 2, with <start>
    printed = run("evaluate", "me/private", "--max_images", "2", "--training_split", "", "--num_resamples", "10")
    assert "Scores of me/private on shapes, validation, 2 images" in printed
    assert "private_evaluation/results.json" in printed  # not a folder `me/private`, which would hide the repository


def wait_for(condition: Callable[[], Any]) -> None:
    """Wait until a condition is true, at most a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_interrupted_push_publishes_nothing_and_can_be_continued(hub: HubServer, pusher: Worker) -> None:
    name = "me/killed"
    pusher.run(f"push(model, processor, {name!r}, **details)")
    before = hub.contents(name)
    pusher.run("changed = CaptionerModel.from_pretrained(folder)\nchanged.decoder.output.weight.data *= 1.5")
    # The Hub holds up the weights half-way; a new picture is small and arrives.
    push = f"push(changed, processor, {name!r}, **details | {{'images': photos[2:]}})"
    known = set(hub.objects)
    hub.hold.set()
    process = pusher.run(f"answer = os.fork()\nif not answer:\n    {push}\n    os._exit(0)")
    wait_for(lambda: hub.held.is_set() and set(hub.objects) - known)
    os.kill(process, signal.SIGKILL)
    assert pusher.run("answer = os.waitpid(pid, 0)[1]", pid=process) == signal.SIGKILL
    hub.hold.clear()
    assert hub.contents(name) == before and len(hub.repos[name].history()) == 2
    arrived = set(hub.objects)

    start = len(hub.uploads)
    pusher.run(push)
    again = [sha for sha, _ in hub.uploads[start:]]
    assert again and not set(again) & arrived  # files that had arrived are not sent again
    after = hub.contents(name)
    assert len(hub.repos[name].history()) == 3 and after["model.safetensors"] != before["model.safetensors"]
    assert {"samples/1.png", "samples/1_attention.png"} <= after.keys()


def test_a_push_retries_a_broken_connection_and_reports_one_that_stays_broken(hub: HubServer, pusher: Worker) -> None:
    name, cut = "me/cut", []

    def once(sha: str, arrived: int) -> bool:
        if cut or arrived < 100_000:
            return False
        cut.append((hub.repos[name].history(), arrived))
        return True

    pusher.run("time.sleep = lambda seconds: None")  # huggingface_hub waits between tries
    # Weights that no other test has sent.
    pusher.run("new = CaptionerModel.from_pretrained(folder)\nnew.decoder.output.weight.data *= 2.5")
    push = f"answer = push(new, processor, {name!r}, **details)"
    hub.cut = once
    assert pusher.run(push).startswith(hub.endpoint)
    assert cut and cut[0][0] == ["initial commit"]
    assert hub.repos[name].history() == ["Upload captioner", "initial commit"]
    before = hub.contents(name)

    hub.cut = lambda sha, arrived: arrived > 100_000
    pusher.run("new.decoder.output.weight.data *= 3.5")
    with pytest.raises(FailedError) as failed:
        pusher.run(push)
    message = str(failed.value)
    assert message.startswith("ConnectionError: The connection to the Hub broke: ") and "\n" not in message
    assert "Nothing is published." in message
    assert hub.contents(name) == before
    hub.cut = lambda sha, arrived: False
    pusher.run(push)
    assert hub.contents(name)["model.safetensors"] != before["model.safetensors"]


def test_a_push_replaces_the_version_before_and_keeps_other_files(hub: HubServer, pusher: Worker) -> None:
    name = "me/again"
    pusher.run(f"push(model, processor, {name!r}, **details | {{'images': photos[:2]}})")
    repo = hub.repos[name]
    added = {"pytorch_model.bin": b"\x80\x02.", "notes.txt": b"mine", "other/model.safetensors": b"theirs"}
    repo.add("main", "by hand", {**repo.find("main").files, **added})  # type: ignore[union-attr]
    pusher.run(f"push(model, processor, {name!r}, **details | {{'images': photos[:1]}}, message='Second')")
    assert repo.history() == ["Second", "by hand", "Upload captioner", "initial commit"]
    names = hub.contents(name).keys()
    assert {"notes.txt", "other/model.safetensors"} <= names
    assert not {"pytorch_model.bin", "samples/2.png", "samples/2_attention.png"} & names
    # Push to a branch that does not exist yet.
    pusher.run(f"push(model, processor, {name!r}, **details, revision='v2')")
    assert len(repo.history("v2")) == 5 and len(repo.history()) == 4


def test_private_repositories(hub: HubServer, pusher: Worker) -> None:
    pusher.run("push(model, processor, 'secret', **details, private=True)")
    assert hub.repos["me/secret"].private  # without an owner in the id, the token's user
    assert "me/secret" in hub.contents("me/secret")["README.md"].decode()
    pusher.run("push(model, processor, 'secret', **details)")  # an existing repository keeps its visibility
    pusher.run("push(model, processor, 'me/open', **details)")
    assert not hub.repos["me/open"].private
    before = hub.repos["me/open"].history()
    with pytest.raises(FailedError, match=r"^ValueError: 'me/open' exists and is public: nothing is uploaded"):
        pusher.run("push(model, processor, 'me/open', **details, private=True)")
    assert hub.repos["me/open"].history() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("'me/x', datasets='shapes'", "ValueError: The model card names no licence."),
        ("'me/x', license='mit'", "ValueError: The model card names no data set."),
        ("'me/x', license='mit', datasets=['']", "ValueError: The model card names no data set."),
        ("'me/x', license='mine', datasets='shapes', images=[]", "ValueError: The Hub refuses the model card"),
        ("'me/x', 'nowhere.json', **details", "FileNotFoundError: No results at 'nowhere.json'"),
        ("'me/x', {'words': 'many'}, **details", "ValueError: The record of results holds no scores"),
        ("'me/x', recipe='nowhere.yaml'", "FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.yaml'"),
        ("'me/x/y', **details", "HFValidationError: Repo id must be"),
        ("'me/x', **details, token='hf_wrong'", "PermissionError: The Hub refuses the token for 'me/x' (401"),
        ("'you/x', **details", "PermissionError: The Hub refuses the token for 'you/x' (403"),
        ("'me/x', **details | {'images': ['nowhere.jpg']}", "FileNotFoundError: nowhere.jpg does not exist"),
    ],
)  # fmt: skip
def test_a_refused_push_uploads_nothing(hub: HubServer, pusher: Worker, arguments: str, message: str) -> None:
    start = len(hub.requests)
    with pytest.raises(FailedError) as failed:
        pusher.run(f"push(model, processor, {arguments})")
    assert str(failed.value).startswith(message) and "\n" not in str(failed.value)
    assert {"me/x", "you/x"}.isdisjoint(hub.repos)
    changing = [request for request in hub.requests[start:] if request[0] == "PUT" or "commit" in request[1]]
    assert not changing


def test_a_part_registered_in_this_process_alone_is_refused(pusher: Worker) -> None:
    program = """
from hf_captioner.model.attentions import ATTENTIONS, AdditiveAttention
with ATTENTIONS.temporarily("mine", AdditiveAttention):
    model.config.attention_type = "mine"
    try:
        push(model, processor, "me/x", **details)
    finally:
        model.config.attention_type = "additive"
"""
    with pytest.raises(FailedError, match=r"'mine' of the attentions is registered in this process alone"):
        pusher.run(program)


def test_a_push_is_refused_if_another_was_made_meanwhile(hub: HubServer, pusher: Worker) -> None:
    name = "me/busy"
    pusher.run(f"push(model, processor, {name!r}, **details)")
    repo = hub.repos[name]

    def meanwhile(sha: str, arrived: int) -> bool:
        if len(repo.history()) == 2:
            repo.add("main", "theirs", dict(repo.find("main").files))  # type: ignore[union-attr]
        return False

    pusher.run("late = CaptionerModel.from_pretrained(folder)\nlate.decoder.output.weight.data *= 4.5")
    hub.cut = meanwhile
    with pytest.raises(FailedError, match=r"ConnectionError: 'me/busy' has changed meanwhile .* Push again"):
        pusher.run(f"push(late, processor, {name!r}, **details)")
    assert repo.history()[0] == "theirs"


def test_export_folder_writes_the_files_of_a_push(pusher: Worker, published: dict[str, bytes], tmp_path: Path) -> None:
    export = f"export_folder(target, model, processor, {ID!r}, results, recipe=recipe, images=photos[:2])"
    pusher.run(export, target=str(tmp_path / "folder"))
    files = {
        file.relative_to(tmp_path / "folder").as_posix(): file.read_bytes()
        for file in (tmp_path / "folder").rglob("*") if file.is_file()
    }  # fmt: skip
    assert files == {name: data for name, data in published.items() if name != ".gitattributes"}
    with pytest.raises(FailedError, match="not an empty folder"):
        pusher.run(export)


@pytest.mark.slow
def test_training_publishes_its_best_model(hub: HubServer, pusher: Worker, tmp_path: Path) -> None:
    arguments = [
        "--max_images", "8", "--epochs", "1", "--batch_size", "8", "--hidden_size", "16", "--embedding_size", "16",
        "--attention_size", "16", "--max_length", "7", "--num_beams", "1", "--final_num_beams", "2", "--tracking", "none",
        "--output_dir", str(tmp_path / "out"), "--push-to-hub", "me/shapes",
    ]  # fmt: skip
    pusher.run("from hf_captioner.commands import train, push as push_command")
    with pytest.raises(FailedError, match="ValueError: The model card names no licence"):
        pusher.run("train.main(arguments)", arguments=arguments)
    assert not (tmp_path / "out" / "log.jsonl").exists()  # refused before training
    pusher.run("train.main(arguments)", arguments=[*arguments, "--license", "apache-2.0"])
    files = hub.contents("me/shapes")
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.datasets == ["shapes"] and card.data.base_model is None
    bleu = next(result for result in card.data.eval_results if result.metric_name == "bleu_4")
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    assert bleu.metric_value == pytest.approx(scores["bleu_4"]) and bleu.metric_args["decoding"]["num_beams"] == 2
    assert len([name for name in files if name.endswith("_attention.png")]) == 4
    assert str(tmp_path) not in str(card) and "epochs: 1" in card.text

    # Its output folder can be pushed later, with the recipe and the results in it.
    pusher.run("push_command.main(arguments)", arguments=[str(tmp_path / "out"), "me/later", "--private", "--image"])
    later = ModelCard(hub.contents("me/later")["README.md"].decode())
    assert hub.repos["me/later"].private and later.data.license == "apache-2.0"
    assert f"| bleu_4 | {scores['bleu_4']:.4f} |" in later.text and "photo.jpg" in later.text
