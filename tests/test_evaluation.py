"""Evaluation: decoding a data set, reading captions, scores with their protocol, files of results, the report page."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import importlib.metadata
import json
import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image

from hf_captioner import CaptionerModel, CaptionerProcessor, load_captions
from hf_captioner.data.rows import open_row, undecoded
from hf_captioner.evaluation import predictions as predictions_module
from hf_captioner.evaluation import scoring
from hf_captioner.evaluation.predictions import Prediction, decode_captions, read_predictions
from hf_captioner.evaluation.protocol import Protocol, hash_of_ids
from hf_captioner.evaluation.report_page import report_page
from hf_captioner.evaluation.results import find_results, read_results, write_results
from hf_captioner.metrics import caption_metrics, caption_tallies
from hf_captioner.metrics.resampling import compare, intervals, resampled

Build = Callable[..., CaptionerModel]


def test_every_image_is_captioned_once_in_order(tiny_model: Build, processor: CaptionerProcessor) -> None:
    rows = undecoded(load_captions("shapes", "test", num_images=7))
    model = tiny_model().train()
    arguments, kwargs = (model, processor, rows, Accelerator(cpu=True)), {"num_beams": 2, "max_length": 6}
    predictions = decode_captions(*arguments, batch_size=3, **kwargs)
    assert model.training
    assert [p.image_id for p in predictions] == rows["image_id"][:]
    assert [p.references for p in predictions] == rows["captions"][:]
    model.eval()
    images = processor(images=[open_row(row) for row in rows])["pixel_values"]
    assert [p.caption for p in predictions] == processor.batch_decode(model.generate(images, **kwargs))
    with torch.no_grad():
        cells = model.encoder(images).last_hidden_state.numpy()
    assert decode_captions(*arguments, cells=cells, **kwargs) == predictions

    parts: list[Prediction] = []
    for index in (0, 1):  # two processes with four and three of the images; tests/test_commands.py runs real ones
        process = SimpleNamespace(num_processes=2, process_index=index, device=model.device, is_local_main_process=True)
        with mock.patch.object(predictions_module, "gather_object", lambda own: parts.extend(own) or predictions):
            assert decode_captions(model, processor, rows, process, batch_size=2, **kwargs) == predictions
    assert [part.index for part in parts] == [0, 2, 4, 6, 1, 3, 5]
    assert sorted(parts, key=lambda part: part.index) == predictions


@pytest.mark.parametrize(
    ("caption", "num_endless", "warnings"),
    [
        ("dog {}", 0, []),
        ("a dog", 0, ["only 5.0% of them are distinct"]),
        ("dog {}", 6, ["30.0% of the captions never reach <end>"]),
        ("a a a a", 20, ["only 5.0%", "100.0% of the captions"]),
    ],
)
def test_warnings_of_collapsed_captions(caption: str, num_endless: int, warnings: list[str]) -> None:
    predictions = [Prediction(0, "photo", caption.format(n), n >= num_endless, ["a dog"]) for n in range(20)]
    found = scoring.collapse_warnings(scoring.score_captions(predictions))
    assert len(found) == len(warnings)
    assert all(part in line for part, line in zip(warnings, found, strict=True))
    assert scoring.collapse_warnings({"distinct_captions": 1.0}) == []  # unknown whether captions ended


def test_teacher_forced_captions_are_refused(tiny_model: Build, processor: CaptionerProcessor, tmp_path: Path) -> None:
    rows = undecoded(load_captions("shapes", "test", num_images=1))
    for name in ("labels", "captions", "decoder_input_ids"):
        with pytest.raises(ValueError, match=f"{name} is given: teacher-forced"):
            decode_captions(tiny_model(), processor, rows, Accelerator(cpu=True), **{name: torch.ones(1, 3).long()})
    # With labels, forward() returns logits, not captions.
    with pytest.raises(ValueError, match="forward pass on the true captions can't be scored"):
        caption_metrics(torch.zeros(1, 3, 9), [["a dog"]])  # type: ignore[arg-type]
    file = tmp_path / "forced.json"
    file.write_text(json.dumps([{"image_id": rows["image_id"][0], "caption": "a dog", "teacher_forced": True}]))
    with pytest.raises(ValueError, match="is teacher-forced"):
        read_predictions(file, rows)


def dataset(names: list[str]) -> Dataset:
    captions = [["a dog", f"dog {n}"][: 1 + n % 2] for n in range(len(names))]
    return Dataset.from_dict({"image_id": names, "captions": captions})


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["b.jpg", "a.jpg"], ["a.jpg", "b.jpg", "c.jpg"]),
        (["COCO_val2014_000000000042.jpg", "COCO_val2014_000000391895.jpg"], [391895, 42, 7]),
        (["7", "8"], [8, 7, 9]),
    ],
)
def test_captions_of_a_file_find_their_images(
    names: list[str], ids: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"image_id": name, "caption": f"caption of {name}"} for name in ids]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    found = read_predictions(tmp_path / "a.json", dataset(names))
    assert [p.caption for p in found] == [f"caption of {ids[1]}", f"caption of {ids[0]}"]
    assert [(p.image_id, p.ended) for p in found] == [(name, None) for name in names]
    assert [message.split(" of ")[0] for message in caplog.messages] == ["1 captions"]
    assert read_predictions(tmp_path / "a.jsonl", dataset(names)) == found
    evaluation = scoring.evaluate_predictions(found, system="a", dataset="coco", split="val", num_resamples=10)
    assert "endless_captions" not in evaluation.scores and evaluation.protocol.decoding is None


def test_images_without_a_caption_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "captions.json").write_text('[{"image_id": "c", "caption": "x"}]')
    (found,) = read_predictions(tmp_path / "captions.json", dataset(["a", "b", "c"]), allow_missing=True)
    assert (found.index, found.image_id, found.caption) == (2, "c", "x")
    assert caplog.messages[0].startswith("2 of 3 images have no caption")


@pytest.mark.parametrize(
    ("names", "text", "message"),
    [
        (["a", "b"], '[{"image_id": "a", "caption": "x"}]', "no caption for 1 of 2 images, such as 'b'"),
        (["a"], '[{"image_id": "a", "caption": "x"}, {"image_id": "a", "caption": "y"}]', "'a' more than once"),
        (["a", "a"], '[{"image_id": "a", "caption": "x"}]', "image id 'a' more than once"),
        (["a"], '{"a": "x"}', "not a list of records"), (["a"], '[{"image_id": "a"}]', "record 1: this is not a record like"),
        (["a"], "a dog", "is not JSON"), (["a"], "[]", "no caption for 1 of 1 images"),
        (["a"], '[{"image_id": "a", "caption": null}]', "record 1: the caption is None, a NoneType"),
        (["a"], '[{"image_id": true, "caption": "x"}]', "record 1: the image_id is True, a bool"),
        (["a"], '[{"image_id": "a", "caption": "\\ud800"}]', "record 1: the caption has half a character"),
        (["a"], '[{"image_id": "a", "caption": "x", "ended": 1}]', "the ended is 1, a int"),
        (["a"], "[" * 9999, "is not JSON"), (["a"], "[" + "9" * 9999 + "]", "is not JSON"),
        (["a"], "\0\0", "is not JSON"),
    ],
)  # fmt: skip
def test_bad_files_of_captions(names: list[str], text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path / "captions.json", dataset(names))


REFERENCES = [
    ["a black dog runs", "a dog"],
    ["two men ride a horse"],
    ["a cat sleeps on a bed", "the cat"],
    ["snow"],
] * 5
CAPTIONS = ["a dog runs", "men on a horse", "a cat on a bed", "a dog"] * 5


def test_intervals_are_those_of_resampled_corpora() -> None:
    """Each resampled score equals the score of the resampled captions as a corpus of their own."""
    tallies = caption_tallies(CAPTIONS, REFERENCES)
    drawn = np.random.default_rng(3).integers(20, size=20)
    one = {name: values[0] for name, values in resampled(tallies, num_resamples=1, seed=3).items()}
    expected = caption_metrics([CAPTIONS[i] for i in drawn], [REFERENCES[i] for i in drawn])
    for name in ("bleu_1", "bleu_4", "rouge_l", "evaluate_bleu_2"):  # CIDEr would have other document frequencies
        assert one[name] == pytest.approx(expected[name], abs=1e-12)
    found = intervals(tallies)
    assert found == intervals(tallies) and found != intervals(tallies, seed=1)
    scores = {name: value for tally in tallies for name, value in tally.of_corpus().items()}
    assert all(low <= scores[name] <= high for name, (low, high) in found.items())
    assert found["bleu_1"][0] < found["bleu_1"][1]
    with pytest.raises(ValueError, match="num_resamples is 0"):
        intervals(tallies, num_resamples=0)


def test_paired_comparison() -> None:
    first = caption_tallies(CAPTIONS, REFERENCES)
    better = caption_tallies([captions[0] for captions in REFERENCES], REFERENCES)
    found = compare(first, better)
    assert found["rouge_l"].low > 0 and found["rouge_l"].fraction_better == 1
    assert compare(better, first)["rouge_l"].value == pytest.approx(-found["rouge_l"].value)
    # On the same resamples a system is exactly as good as itself.
    assert set(compare(first, caption_tallies(CAPTIONS, REFERENCES))["cider"]) == {0, 0.5}
    with pytest.raises(ValueError, match="captioned 20 and 4 images"):
        compare(first, caption_tallies(CAPTIONS[:4], REFERENCES[:4]))
    with pytest.raises(ValueError, match="captioned different images"):
        scoring.compare_evaluations(evaluation_of("shapes", "test"), evaluation_of("shapes", "test", 10))


def evaluation_of(dataset: str, split: str, num_images: int = 20, **fields: Any) -> scoring.Evaluation:
    rows = [(CAPTIONS[i % 20], REFERENCES[i % 20][:1] * 5) for i in range(num_images)]
    predictions = [Prediction(i, f"photo{i}", caption, True, texts) for i, (caption, texts) in enumerate(rows)]
    fields = {"system": "x", "num_resamples": 5, **fields}
    return scoring.evaluate_predictions(predictions, dataset=dataset, split=split, **fields)


def test_results_are_written_with_their_protocol_and_read(tmp_path: Path) -> None:
    evaluation = evaluation_of("shapes", "test", decoding={"num_beams": 3}, training=["A dog."], split_images=30)
    assert find_results(tmp_path) is None
    results_file, predictions_file = write_results(evaluation, tmp_path)
    assert find_results(tmp_path) == results_file
    results = read_results(results_file)
    assert results == read_results(evaluation) == read_results(json.loads(results_file.read_text()))
    assert results.scores == evaluation.scores and results.scores["novel_captions"] == 0.75
    assert results.description == "shapes, test, 20 images, 3 beams"
    records = [json.loads(line) for line in predictions_file.read_text().splitlines()]
    assert records[1]["caption"] == CAPTIONS[1] and records[1]["scores"].keys() == evaluation.intervals.keys()

    protocol = json.loads(results_file.read_text())["protocol"]
    names = [f"photo{i}" for i in range(20)]
    assert protocol["ids_sha256"] == hashlib.sha256(json.dumps(names).encode()).hexdigest() == hash_of_ids(names)
    assert hash_of_ids(names) != hash_of_ids(names[::-1])
    assert (protocol["num_images"], protocol["split_images"], protocol["references_per_image"]) == (20, 30, [5, 5])
    assert protocol["interval"] | {"level": 0.95, "resamples": 5, "seed": 0} == protocol["interval"]
    assert protocol["metrics"]["bleu"]["brevity_penalty"] == "closest reference"
    assert protocol["metrics"]["evaluate_bleu"]["brevity_penalty"] == "shortest reference"
    assert protocol["metrics"]["evaluate_bleu"]["tokenizer"].startswith("mteval")
    covered = {name for metric in protocol["metrics"].values() for name in metric["scores"]}
    assert covered == set(evaluation.intervals)
    assert protocol["software"]["torch"] == importlib.metadata.version("torch")


def test_scores_of_the_first_release_are_read() -> None:
    path = Path(__file__).parent / "fixtures/first_release/captioner/scores.json"
    assert find_results(path.parent) == path
    results = read_results(path)
    assert results.description == "shapes, validation, 80 images, 3 beams" and results.protocol is None
    assert results.scores["bleu_4"] == 0.36466134477501655 and "protocol" not in results.scores


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("words", "not JSON"), ("[1]", "holds no scores"), ('{"words": "many"}', "holds no scores"),
        ('{"scores": {"cider": 1.0}, "protocol": {"system": "x"}}', "The protocol has no decoding, dataset"),
        ('{"scores": {"cider": "x"}, "protocol": {}}', "the score 'cider' 'x', which is no number"),
        ('{"scores": {"cider": 1}, "protocol": {}, "intervals": {"cider": [1]}}', "intervals that are not two numbers"),
    ],
)  # fmt: skip
def test_malformed_results(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "results.json")
    with pytest.raises(FileNotFoundError, match="No results at"):
        read_results(tmp_path / "nowhere.json")


@pytest.mark.parametrize("field", [field.name for field in fields(Protocol)])
@pytest.mark.parametrize("value", [7.5, [], [1, "x"], {"x": []}], ids=str)
def test_fields_of_a_protocol_are_checked(field: str, value: Any) -> None:
    evaluation = scoring.evaluate_predictions(
        [Prediction(0, "a", "a dog", True, ["a dog"])], system="a", dataset="coco", split="val", num_resamples=9
    )
    record = json.loads(json.dumps(evaluation.protocol.as_dict()))
    assert Protocol.from_dict(record).description == "coco, val, 1 images"
    if field in ("decoding", "interval", "software") and isinstance(value, dict):
        return  # settings and versions of any form
    with pytest.raises(ValueError, match=r"The protocol has .* hf-captioner did not write"):
        Protocol.from_dict(record | {field: value})


@pytest.mark.parametrize(
    ("dataset", "split", "num_images", "line"),
    [
        ("shapes", "test", 20, "papers don't report on split 'test' of 'shapes'"),
        ("flickr8k", "validation", 1000, "papers don't report on split 'validation'"),
        ("flickr8k", "test", 20, "papers score 1,000 images, these are 20 of 1,000"),
        ("jxie/flickr8k", "test", 1000, "cider: CIDEr of captioning papers (often given times 100)"),
    ],
)
def test_table_says_which_published_scores_are_comparable(dataset: str, split: str, num_images: int, line: str) -> None:
    table = "\n".join(evaluation_of(dataset, split, num_images, split_images=1000).table())
    assert line in table and ("of captioning papers" in table) == (dataset == "jxie/flickr8k")


def test_report_page_is_complete_and_loads_nothing() -> None:
    evaluation = evaluation_of("shapes", "test")
    evaluation.predictions[3] = Prediction(3, "<photo>", "<script>alert(1)</script>", True, ["snow & ice"])
    open_image = mock.Mock(side_effect=lambda index: Image.new("RGB", (40, 30), (index * 9, 0, 0)))
    page = report_page(evaluation, open_image, num_images=20)
    html.parser.HTMLParser().feed(page)
    assert sorted(call.args[0] for call in open_image.mock_calls) == list(range(20)) and page.count("<figure>") == 60
    titles = "Best images,Worst images,Random images,Words per caption,Most frequent words,95 % interval"
    assert all(title in page for title in titles.split(","))
    assert "<script" not in page and "&lt;script&gt;alert" in page and "snow &amp; ice" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)|url\(|@import""", page)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None and "style=" not in page
    style_hash = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{style_hash}'" in page  # otherwise the browser would refuse the style
    assert evaluation.scores and f"{evaluation.scores['bleu_4']:.4f}" in page


def test_captions_without_spaces_are_scored_by_characters() -> None:
    references = ["赤い丸が青い四角の上にある。", "青い四角の上に赤い丸がある。"]
    near, far = (
        scoring.score_captions([Prediction(i, str(i), caption, True, references) for i in range(2)])
        for caption in ("赤い丸が青い星の上にある。", "犬が海辺で走っている。")
    )
    assert 0.5 < near["bleu_4"] < 1 and far["bleu_4"] < 0.1
    assert near["bleu_1"] == pytest.approx(12 / 13 * math.exp(1 - 14 / 13))
