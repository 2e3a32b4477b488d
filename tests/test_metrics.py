from __future__ import annotations

import doctest
import importlib
import json
import math
import random
import re
import shutil
import socket
import sys
from pathlib import Path

import evaluate
import pytest

import hf_captioner.metrics
from hf_captioner.metrics import METRICS, caption_metrics, scores
from hf_captioner.metrics.ngrams import NgramCounts
from hf_captioner.metrics.tokenization import _PLAIN, tokenize_13a, tokenize_captions, tokenize_ptb

ROOT = Path(__file__).parents[1]
SHARED = ROOT / ".." / "shared"
MODULES = ROOT / "hf_captioner" / "metrics"
NAMES = ["bleu", "cider", "coco_bleu", "plain_cider", "rouge_l", "diversity"]  # those without Java


@pytest.fixture(scope="module")
def golden():
    path = SHARED / "golden" / "caption_metrics.json"
    if not path.exists():
        pytest.skip("no reference scores: ../shared/golden is absent")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def validation():
    """Flickr8k validation: five captions an image."""
    path = SHARED / "flickr8k" / "data" / "validation-00000-of-00001.parquet"
    if not path.exists():
        pytest.skip("no captions: ../shared/flickr8k is absent")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = [f"caption_{number}" for number in range(5)]
    return [[row[column] for column in columns] for row in parquet.read_table(path, columns=columns).to_pylist()]


@pytest.fixture(scope="module")
def leave_one_out(validation):
    """The first caption of each image is the prediction, the other four are its references."""
    return [captions[0] for captions in validation], [captions[1:] for captions in validation]


@pytest.fixture
def load(monkeypatch, tmp_path):
    """`evaluate.load` of a metric of this package by its path, with no network to fall back on."""

    def refuse(*args):
        raise AssertionError("a metric tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return lambda name: evaluate.load(str(MODULES / f"{name}.py"), cache_dir=str(tmp_path))


def split(predictions, references):
    return [caption.split() for caption in predictions], [[c.split() for c in captions] for captions in references]


def test_ptb_equals_java_on_validation(golden, validation):
    expected = golden["ptb_tokenized_validation"]
    assert [" ".join(tokenize_ptb(c)) for captions in validation for c in captions] == expected


def test_ptb_equals_java_on_edge_cases(golden):
    cases = golden["edge_cases"]
    for key, prediction in cases["hypotheses"].items():
        assert " ".join(tokenize_ptb(prediction)) == cases["tokenized_hypotheses"][key]
        assert [" ".join(tokenize_ptb(c)) for c in cases["references"][key]] == cases["tokenized_references"][key]


# What CoreNLP 3.4.1 with pycocoevalcap's removal of punctuation makes of them, run on these very phrases.
PTB_CASES = {
    "A dog, a cat; and -- a bird...": "a dog a cat and a bird",
    "it's they're I'll we've he'd I'm": "it 's they 're i 'll we 've he 'd i 'm",
    "don't can't won't DON’T she’s": "do n't ca n't wo n't do n't she 's",
    "dogs' toys, the girls' 'quoted' dog": "dogs toys the girls quoted dog",
    "cannot gonna, gotta lemme wannabe": "can not gon na got ta lem me wannabe",
    "'tis 'twas 'em fish 'n chips": "'t is 't was 'em fish 'n chips",
    "rock'n'roll y'all o'clock o’clock ma'am s'mores": "rock 'n' roll y' all o'clock o’clock ma'am s'mores",
    "o'brien's d'artagnan hors-d'oeuvre hawai'i": "o'brien 's d'artagnan hors-d'oeuvre hawai'i",
    "the '90s the 90's 1980s 5'10": "the '90s the 90 's 1980s 5 '10",
    "t-shirt 3-year-old's and/or 24/7 a-b-": "t-shirt 3-year-old 's and/or 24/7 a-b",
    "St. Louis Mr. Smith J. Smith etc.": "st. louis mr. smith j. smith etc.",
    "a U.S. flag, at 3:30 p.m.": "a u.s. flag at 3:30 p.m.",
    "a U.S.-based t.v. a.k.a.": "a u.s.-based t.v. a.k.a.",
    "No. 5 dog no.5 no. five, 10 ft. 5 lbs.": "no. 5 dog no. 5 no five 10 ft. 5 lbs",
    "1,000 dogs -5 .5 12.5mm 10-15% $5.50 #1": "1,000 dogs -5 .5 12.5 mm 10-15 % $ 5.50 # 1",
    "man,2 dogs 2:00-3:00 dog...5 dog--5": "man ,2 dogs 2:00 -3:00 dog 5 dog 5",
    "street.The dog flickr.com yahoo! http://dog.com/a?b=c. me@dog.com": "street.the dog flickr.com yahoo http://dog.com/a?b=c me@dog.com",
    "AT&T B&W a&b cats&amp;dogs": "at&t b&w a & b cats & dogs",
    "(dog) [cat] {bird} <unk> <3 dog(s)": "-lrb- dog -rrb- -lsb- cat -rsb- -lcb- bird -rcb- <unk> < 3 dog -lrb- s -rrb-",
    "dog?! dog!! *dog* _dog_ a_b ~ @user #tag ** ##": "dog ?! dog !! * dog * _ dog _ a_b ~ @user #tag ** ##",
    "½ cup €5 £5 5¢ 70° a—b a–b “dog” ‘cat’…": "1/2 cup $ 5 # 5 5 cents 70 ° a b a b dog cat",
    "🐶 dog❤ zero\u200bwidth a\u00a0b tab\tnew\nline": "dog ❤ zero width a b tab new line",
    "Ein Hund läuft über die Straße": "ein hund läuft über die straße",
    "собака бежит, 日本語。 café cafe\u0301": "собака бежит 日本語 。 café cafe\u0301",
    "एक कुत्ता दौड़ रहा है ।": "एक कुत्ता दौड़ रहा है ।",
    " . , - '": "",
}


@pytest.mark.parametrize("caption", PTB_CASES)
def test_ptb(caption):
    assert " ".join(tokenize_ptb(caption)) == PTB_CASES[caption]


def test_plain_captions_need_no_rules(validation, monkeypatch):
    captions = [*PTB_CASES, *(caption for row in validation for caption in row), "a cat-dog,  st.", "the dog is a."]
    captions += ["we cannot see", "a dog , a cat .", "dog ,cat", "x", "a dog on the st .", "Dog runs  ", "a, b, c."]
    tokenize = tokenize_ptb.__wrapped__  # without its cache
    quickly = [tokenize(caption) for caption in captions]
    assert sum(_PLAIN.fullmatch(caption) is not None for caption in captions) > 0.8 * len(captions)
    monkeypatch.setattr("hf_captioner.metrics.tokenization._PLAIN", re.compile(r"(?!)"))
    assert [tokenize(caption) for caption in captions] == quickly


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A dog, 2.5m tall; isn't it?", "A dog , 2.5m tall ; isn't it ?"),
        ("3-4 t-shirts (1,000) a.b.", "3 - 4 t-shirts ( 1,000 ) a . b ."),
        ("R&amp;B &quot;x&quot; &lt;skipped>", 'R & B " x " < skipped >'),
        ("run-\nning\nnow<skipped>", "running now"),
        ("", ""),
    ],
)
def test_13a(caption, tokens):
    assert " ".join(tokenize_13a(caption)) == tokens


def test_equals_pycocoevalcap_and_official_bleu(golden, leave_one_out):
    expected = golden["validation_leave_one_out"]
    official = golden["evaluate_bleu_validation_leave_one_out"]
    computed = caption_metrics(*leave_one_out)
    for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l"):
        assert computed[name] == pytest.approx(expected[name], abs=1e-6), name
    for order in range(1, 5):
        assert computed[f"evaluate_bleu_{order}"] == pytest.approx(official[f"max_order_{order}"]["bleu"], abs=1e-6)
    assert computed["evaluate_bleu_4"] * 100 == pytest.approx(golden["sacrebleu_validation_leave_one_out"], abs=1e-6)


def test_equals_pycocoevalcap_on_edge_cases(golden):
    cases = golden["edge_cases"]
    computed = caption_metrics([cases["hypotheses"][k] for k in cases["references"]], [*cases["references"].values()])
    for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l"):
        assert computed[name] == pytest.approx(cases["scores"][name], abs=1e-6), name


def test_cider_of_each_image(golden, leave_one_out):
    predictions, references = tokenize_captions(*leave_one_out, tokenize_ptb)
    expected = golden["cider_per_image_first_20"]
    computed = scores.CiderD(references).scores(predictions, references)
    assert computed[:20] == pytest.approx(expected, abs=1e-6)
    per_image = caption_metrics(*leave_one_out, per_image=True)["cider_per_image"]
    assert per_image[:20] == pytest.approx(expected, abs=1e-6)
    assert per_image == pytest.approx(computed, abs=1e-9)  # counted in arrays, and caption by caption


@pytest.mark.parametrize(
    ("setting", "options"),
    [("max_order_4", {}), ("max_order_2", {"max_order": 2}), ("smooth_4", {"smooth": True})],
)
def test_official_bleu_fields(golden, leave_one_out, load, setting, options):
    predictions, references = leave_one_out
    computed = load("bleu").compute(predictions=predictions, references=references, **options)
    expected = golden["evaluate_bleu_validation_leave_one_out"][setting]
    assert computed.pop("precisions") == pytest.approx(expected.pop("precisions"), abs=1e-6)
    assert computed == pytest.approx(expected, abs=1e-6)


def test_loaded_modules_equal_caption_metrics(leave_one_out, load):
    predictions, references = leave_one_out
    together = evaluate.combine([load(name) for name in NAMES])
    for start in range(0, 1000, 300):
        together.add_batch(predictions=predictions[start : start + 300], references=references[start : start + 300])
    computed, expected = together.compute(), caption_metrics(predictions, references)
    assert computed["bleu"] == pytest.approx(expected["evaluate_bleu_4"], abs=1e-12)
    for name in expected.keys() & computed.keys():
        assert computed[name] == pytest.approx(expected[name], abs=1e-12), name
    assert {"bleu_1", "bleu_4", "cider", "rouge_l"} <= expected.keys() & computed.keys()


@pytest.mark.parametrize("name", NAMES)
def test_module(name, load, monkeypatch):
    metric = load(name)
    for text in (metric.description, metric.citation, metric.inputs_description, metric.info.reference_urls):
        assert text
    once = metric.compute(
        predictions=["a dog runs on grass", "two men"],
        references=[["a dog runs on grass"], ["two men on a horse", "a horse"]],
    )
    metric.add(prediction="a dog runs on grass", reference="a dog runs on grass")
    metric.add_batch(predictions=["two men"], references=[["two men on a horse", "a horse"]])
    assert metric.compute() == once

    monkeypatch.chdir(ROOT)  # the examples give paths relative to the root
    example = metric.inputs_description[metric.inputs_description.index("Example:") :]
    parsed = doctest.DocTestParser().get_doctest(example, {"evaluate": evaluate}, name, None, 0)
    assert parsed.examples and doctest.DocTestRunner().run(parsed).failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_registered(name, tmp_path):
    assert name in METRICS.names()
    computed = METRICS.get(name)(cache_dir=tmp_path).compute(predictions=["a dog"], references=[["a dog", "the dog"]])
    assert all(isinstance(value, (float, int)) for key, value in computed.items() if key != "precisions")
    assert caption_metrics(["a dog"], [["a dog"]])  # importing the module of a metric hides no function


def test_bleu_by_hand():
    predictions, references = split(["a b c d"], [["a b c d e f g h", "a b c d e f"]])
    official = scores.bleu(scores.match_ngrams(predictions, references, scores.shortest))
    assert official["precisions"] == [1.0, 1.0, 1.0, 1.0]
    assert official["bleu"] == official["brevity_penalty"] == pytest.approx(math.exp(1 - 6 / 4))
    assert (official["translation_length"], official["reference_length"]) == (4, 6)


def test_bleu_clips_to_one_reference_and_smooths_above_unigrams():
    predictions, references = split(["the the the the"], [["the cat the", "the"]])
    counts = scores.match_ngrams(predictions, references, scores.shortest)
    assert (counts.matches, counts.totals) == ([2, 0, 0, 0], [4, 3, 2, 1])
    assert scores.bleu(counts)["bleu"] == 0
    assert scores.bleu(counts, smooth=True)["precisions"] == [2 / 4, 1 / 4, 1 / 3, 1 / 2]
    assert scores.bleu(counts, max_order=1)["bleu"] == 0.5


@pytest.mark.parametrize(("lengths", "expected"), [([3, 6], 6), ([3, 7], 3), ([9, 2, 4], 4)])
def test_closest_reference(lengths, expected):
    assert scores.closest(lengths, 5) == expected
    assert scores.shortest(lengths, 5) == min(lengths)
    captions = [" ".join("abcdefghi"[:length]) for length in lengths]
    predictions, references = split(["a b c d e"], [captions])
    penalty = min(1, math.exp(1 - expected / 5))
    computed = scores.coco_bleu(NgramCounts(predictions, references)).of_corpus()
    assert computed["bleu_1"] == pytest.approx(penalty, abs=1e-6)


def test_cider_by_hand():
    # Two images, no n-gram in both: every weight is ln 2 and cancels in the cosine.
    references = [["a b"], ["c d e f"]]
    predictions, references = split(["a", "c d e f"], references)
    first, second = scores.CiderD(references).scores(predictions, references)
    assert first == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-1 / 72))  # one of four orders; one token short
    assert second == pytest.approx(10)
    [clipped] = scores.CiderD(references).scores([["a", "a"]], references[:1])
    assert clipped == pytest.approx(10 / 4 / (2 * math.sqrt(2)))
    counts = NgramCounts(predictions, references)
    assert scores.cider(counts).of_corpus()["cider"] == pytest.approx((first + second) / 2)
    # Without the D: the same without the penalty, and without clipping.
    assert scores.plain_cider(counts).rows[:, 0] == pytest.approx([10 / 4 / math.sqrt(2), 10])
    repeated = NgramCounts(*split(["a a", "x"], [["a"], ["c d e f"]]))
    assert scores.plain_cider(repeated).rows[0, 0] == pytest.approx(10 / 4)
    assert scores.cider(repeated).rows[0, 0] == pytest.approx(10 / 4 / 2 * math.exp(-1 / 72))


def test_cider_with_the_frequencies_of_other_images():
    training = [[["a", "b"]], [["a", "c"]], [["a", "d"]]]
    [common, rare] = scores.CiderD(training).scores([["a"], ["b"]], [[["a"]], [["b"]]])
    assert common == 0  # in every document
    assert rare == pytest.approx(10 / 4)
    with pytest.raises(ValueError, match="references is empty"):
        scores.CiderD([])


def test_rouge_l_by_hand():
    predictions, references = split(["a b c"], [["a x c d", "b"]])
    precision, recall = 2 / 3, 1  # the first reference has the better precision, the second the better recall
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert scores.rouge_l(predictions, references).of_corpus()["rouge_l"] == pytest.approx(expected)
    assert scores.rouge_l([[], []], [[[]], [["a"]]]).of_corpus()["rouge_l"] == 0.5  # two empty captions are equal


def test_common_subsequence_length():
    def table(first, second):
        row = [0] * (len(second) + 1)
        for token in first:
            diagonal = 0
            for place, other in enumerate(second, start=1):
                above = row[place]
                row[place] = diagonal + 1 if token == other else max(above, row[place - 1])
                diagonal = above
        return row[-1]

    rng = random.Random(0)
    for length in (0, 1, 5, 20, 90):
        first = rng.choices("abcd", k=length)
        second = rng.choices("abcde", k=rng.randint(0, 90))
        assert scores.common_subsequence_length(first, second) == table(first, second)


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        (["", ""], [["a dog"], ["a cat"]]),
        (["", "a"], [["", "..."], [""]]),
        (["one image"], [["one reference"]]),
        (["a", "b", "c"], [["a"], ["b", "b c"], ["c", "d", "e"]]),
        (["a dog", "a cat"], ["a dog", ["the cat"]]),
        (["собака бежит", "猫が走る", "🐶"], [["собака"], ["猫"], ["🐶 🐶"]]),
        (["word " * 1000, "dog"], [["word " * 999 + "dog", "dog"], ["cat " * 1000]]),
        (("a", "b"), (("a",), ("b", "c"))),
    ],
)
def test_edge_cases_give_numbers(predictions, references):
    computed = caption_metrics(predictions, references)
    assert len(computed) == 16
    largest = {"cider": 10, "plain_cider": 10.000001, "length": 1000, "vocabulary": 1000}
    assert all(0 <= value <= largest.get(name, 1) for name, value in computed.items())
    per_image = caption_metrics(predictions, references, per_image=True)
    assert all(len(value) == len(predictions) for name, value in per_image.items() if name.endswith("_per_image"))
    assert {name: per_image[name] for name in computed} == computed


def test_empty_captions_have_no_infinite_ratio_by_accident():
    empty = scores.bleu(scores.match_ngrams([[]], [[["a"]]], scores.shortest))
    assert (empty["bleu"], empty["brevity_penalty"], empty["length_ratio"]) == (0, 0, 0)
    nothing_to_match = scores.bleu(scores.match_ngrams([["a"]], [[[]]], scores.shortest))
    assert (nothing_to_match["bleu"], nothing_to_match["length_ratio"]) == (0, math.inf)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "nothing to score"),
        (["a"], [["a"], ["b"]], "predictions has 1 entries but references has 2"),
        (["a"], [[]], r"references\[0\] is empty"),
        (["a", "b"], [["a"], None], r"references\[1\] is empty"),
        ("a", ["a"], "predictions is 'a'"),
        (["a"], "a", "references is 'a'"),
        (["a"], None, "references is None"),
        (["a", None], [["a"], ["b"]], "Image 1 has the caption None"),
        (["a"], [[["a", "b"]]], r"Image 0 has the caption \['a', 'b'\]"),
    ],
)
def test_errors(predictions, references, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        caption_metrics(predictions, references)
    with pytest.raises(ValueError, match=message):
        METRICS.get("rouge_l")(cache_dir=tmp_path).compute(predictions=predictions, references=references)


def test_max_order_below_one(tmp_path):
    with pytest.raises(ValueError, match="max_order is 0"):
        METRICS.get("bleu")(cache_dir=tmp_path).compute(predictions=["a"], references=[["a"]], max_order=0)


def test_metrics_without_evaluate(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)  # importing it now fails
    for name in [name for name in sys.modules if name.startswith("hf_captioner.metrics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(hf_captioner, "metrics", None)
    metrics = importlib.import_module("hf_captioner.metrics")
    assert metrics.caption_metrics(["a dog"], ["a dog"])["rouge_l"] == 1
    with pytest.raises(ImportError):
        metrics.METRICS.get("cider")


def test_diversity_by_hand(load):
    metric = load("diversity")
    predictions = ["a dog runs", "A dog runs.", "a cat", ""]
    computed = metric.compute(predictions=predictions, training=["a cat ."], ended=[True, True, False, True])
    assert computed == {
        "distinct_captions": 3 / 4,
        "distinct_1": 4 / 8,  # a, dog, runs, cat
        "distinct_2": 3 / 5,
        "vocabulary": 4,
        "length": 2.0,
        "novel_captions": 3 / 4,
        "endless_captions": 1 / 4,
    }
    with pytest.raises(ValueError, match="ended has 1 entries for 2"):
        metric.compute(predictions=["a", "b"], ended=[True])
    with pytest.raises(ValueError, match="predictions is 'a'"):
        metric.compute(predictions="a")


@pytest.mark.parametrize("name", ["meteor", "spice"])
@pytest.mark.parametrize("absent", ["pycocoevalcap", "java"])
def test_metrics_in_java_say_what_they_lack(name, absent, load, monkeypatch):
    metric = load(name)
    assert metric.description and metric.citation and metric.inputs_description
    if absent == "java":
        pytest.importorskip("pycocoevalcap")
        monkeypatch.setattr(shutil, "which", lambda program: None)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises((ImportError, OSError), match=f"{name.upper()} needs {absent}".replace("java", "Java")):
        metric.compute(predictions=["a dog"], references=[["a dog"]])
    with pytest.warns(UserWarning, match=f"{name.upper()} is left out. {name.upper()} needs"):
        assert caption_metrics(["a dog"], [["a dog"]], java=True)["rouge_l"] == 1


def needs_java(module="pycocoevalcap"):
    pytest.importorskip(module)
    if shutil.which("java") is None:
        pytest.skip("there is no Java")


def test_spice_without_its_models_says_where_they_are_from(load):
    needs_java("pycocoevalcap.spice")
    if (Path(sys.modules["pycocoevalcap.spice"].__file__).parent / "lib" / "stanford-corenlp-3.6.0.jar").exists():
        pytest.skip("the models of SPICE are here")
    with pytest.raises(FileNotFoundError, match=r"python -m pycocoevalcap\.spice\.get_stanford_models"):
        load("spice").compute(predictions=["a dog"], references=[["a dog"]])


@pytest.fixture(scope="module")
def generated(validation):
    """Captions as a model writes them, not people: cut, looping, mixed from others, empty, one a reference."""
    rng = random.Random(0)
    words = [word for row in validation for caption in row for word in caption.split()]
    references = validation[:300]
    predictions = [" ".join(rng.choice(row).split()[: rng.randint(3, 12)]) for row in references]
    predictions = [re.sub(r"\w+", lambda m: m[0] if rng.random() < 0.8 else rng.choice(words), p) for p in predictions]
    predictions[:3] = ["", "a dog a dog a dog a dog", references[2][0]]
    return predictions, references


@pytest.mark.slow
def test_generated_captions_score_as_in_pycocoevalcap(generated):
    """All of it, Java's tokenizer and METEOR included, image by image."""
    needs_java()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    predictions, references = generated
    wanted = {i: [{"caption": caption} for caption in row] for i, row in enumerate(references)}
    wanted = PTBTokenizer().tokenize(wanted)
    found = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(predictions)})
    assert [" ".join(tokenize_ptb(caption)) for caption in predictions] == [row[0] for row in found.values()]
    computed = caption_metrics(predictions, references, java=True, per_image=True)
    orders = [f"bleu_{order}" for order in range(1, 5)]
    for scorer, names in ((Bleu(4), orders), (Cider(), "cider"), (Rouge(), "rouge_l"), (Meteor(), "meteor")):
        options = {"verbose": 0} if names == orders else {}
        corpus, images = scorer.compute_score(wanted, found, **options)
        if names != orders:
            corpus, images, names = [corpus], [images], [names]
        for name, total, each in zip(names, corpus, images, strict=True):
            assert computed[name] == pytest.approx(total, abs=1e-6), name
            assert computed[f"{name}_per_image"] == pytest.approx(list(each), abs=1e-6), name
