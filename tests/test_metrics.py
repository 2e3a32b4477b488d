"""Metrics against the programs that they reproduce, and against values worked out by hand."""

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
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import evaluate
import pytest
from conftest import CAPTIONS, SHARED
from pyarrow import parquet

import hf_captioner.metrics
from hf_captioner.metrics import METRICS, caption_metrics, java, scores
from hf_captioner.metrics.ngrams import NgramCounts
from hf_captioner.metrics.tokenization import _PLAIN, tokenize_13a, tokenize_captions, tokenize_ptb

ROOT = Path(__file__).parents[1]
MODULES = ROOT / "hf_captioner" / "metrics"
NAMES = ["bleu", "cider", "coco_bleu", "plain_cider", "rouge_l", "diversity"]  # metrics that don't run Java

# Scores of pycocoevalcap 1.2, its Java programs included, for six images: predictions, references and their PTB tokens.
PREDICTIONS = [
    "", "dog", 'a dog, a cat; and -- "a bird" (flying) !', "un café naïve — señor’s dog", "2 dogs run at 3:30 p.m.",
    "the the the the the the",
]  # fmt: skip
REFERENCES = [
    ["a dog runs ."], ["dog", "a dog"], ['A dog, a cat, and a "bird" flying.'], ["a cafe ' s naïve dog"],
    ["Two dogs run at 3:30 p.m.", "2 dogs running"], ["the cat is on the mat", "there is a cat on the mat"],
]  # fmt: skip
TOKENS = [
    "", "dog", "a dog a cat and a bird -lrb- flying -rrb-", "un café naïve señor 's dog", "2 dogs run at 3:30 p.m.",
    "the the the the the the", "a dog runs", "dog", "a dog", "a dog a cat and a bird flying", "a cafe s naïve dog",
    "two dogs run at 3:30 p.m.", "2 dogs running", "the cat is on the mat", "there is a cat on the mat",
]  # fmt: skip
SCORES = {
    "bleu_1": 0.655172413747919, "bleu_2": 0.5479848139120854, "bleu_3": 0.49339984937935777,
    "bleu_4": 0.4606881871790845, "cider": 2.4940012157072986, "rouge_l": 0.5739044722316098,
}  # fmt: skip
METEOR = 0.37927725081602387
# Alignment counts that the Java program of METEOR prints for each of these images.
ALIGNMENTS = [
    "0 3 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", "1 1 0 0 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1",
    "10 8 6 4 4 4 4 4 0 0 0 0 0 0 0 0 0 0 0 0 2 8 8", "7 5 2 2 2 2 1 1 0 0 0 0 0 0 0 0 1 1 0 0 4 4 4",
    "8 8 2 3 5 5 2 2 0 0 0 0 1 0 0 1 0 0 0 0 1 8 8", "6 6 6 4 0 0 2 2 0 0 0 0 0 0 0 0 0 0 0 0 2 2 2",
]  # fmt: skip


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Function that loads a metric of this package by its path with `evaluate.load`; the network is refused."""
    refuse = mock.Mock(side_effect=AssertionError("a metric tried to reach the network"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return lambda name: evaluate.load(str(MODULES / f"{name}.py"), cache_dir=str(tmp_path))


@pytest.fixture(scope="module")
def corpus():
    """Forty random captions, some empty or repetitive, and one to five references for each."""
    generator = random.Random(0)
    words = [*" ".join(CAPTIONS).split(), "t-shirt", "st.", "it's"]

    def caption():
        return " ".join(generator.choices(words, k=generator.randint(0, 9)))

    return [caption() for _ in range(40)], [[caption() for _ in range(generator.randint(1, 5))] for _ in range(40)]


def split(predictions, references):
    return [caption.split() for caption in predictions], [[c.split() for c in captions] for captions in references]


def test_scores_of_pycocoevalcap():
    captions = [*PREDICTIONS, *(caption for captions in REFERENCES for caption in captions)]
    assert [" ".join(tokenize_ptb(caption)) for caption in captions] == TOKENS
    computed = caption_metrics(PREDICTIONS, REFERENCES)
    assert {name: computed[name] for name in SCORES} == pytest.approx(SCORES, abs=1e-6)


def test_scores_of_pycocoevalcap_and_official_bleu_on_flickr8k(load, flickr8k):
    """Flickr8k validation: the first caption of each image is the prediction, the other four are its references."""
    golden_file, table_file = SHARED / "golden/caption_metrics.json", "data/validation-00000-of-00001.parquet"
    if not golden_file.exists():
        pytest.skip("needs golden, which is not beside this repository in shared/")
    golden = json.loads(golden_file.read_text())
    table = parquet.read_table(flickr8k / table_file, columns=[f"caption_{number}" for number in range(5)])
    rows = [list(row.values()) for row in table.to_pylist()]
    predictions, references = [row[0] for row in rows], [row[1:] for row in rows]
    assert [" ".join(tokenize_ptb(c)) for captions in rows for c in captions] == golden["ptb_tokenized_validation"]

    computed = caption_metrics(predictions, references, per_image=True)
    for name in SCORES:
        assert computed[name] == pytest.approx(golden["validation_leave_one_out"][name], abs=1e-6), name
    assert computed["evaluate_bleu_4"] * 100 == pytest.approx(golden["sacrebleu_validation_leave_one_out"], abs=1e-6)
    assert computed["cider_per_image"][:20] == pytest.approx(golden["cider_per_image_first_20"], abs=1e-6)
    official = golden["evaluate_bleu_validation_leave_one_out"]
    for order in range(1, 5):
        assert computed[f"evaluate_bleu_{order}"] == pytest.approx(official[f"max_order_{order}"]["bleu"], abs=1e-6)
    for setting, options in [("max_order_4", {}), ("max_order_2", {"max_order": 2}), ("smooth_4", {"smooth": True})]:
        fields = load("bleu").compute(predictions=predictions, references=references, **options)
        assert fields.pop("precisions") == pytest.approx(official[setting].pop("precisions"), abs=1e-6)
        assert fields == pytest.approx(official[setting], abs=1e-6)


# Phrases with their tokens from CoreNLP 3.4.1, after pycocoevalcap's removal of punctuation.
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
    "a U.S. flag, at 3:30 p.m.": "a u.s. flag at 3:30 p.m.", "a U.S.-based t.v. a.k.a.": "a u.s.-based t.v. a.k.a.",
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
    "एक कुत्ता दौड़ रहा है ।": "एक कुत्ता दौड़ रहा है ।", " . , - '": "",
}  # fmt: skip


def test_ptb():
    assert {caption: " ".join(tokenize_ptb(caption)) for caption in PTB_CASES} == PTB_CASES


def test_plain_captions_get_the_same_tokens_without_the_lexer_rules(monkeypatch):
    captions = [*CAPTIONS, *(caption.capitalize() + "." for caption in CAPTIONS), *PTB_CASES, "a cat-dog,  st."]
    captions += ["the dog is a.", "we cannot see", "a dog , a cat .", "dog ,cat", "x", "a dog on the st .", "a, b, c."]
    tokenize = tokenize_ptb.__wrapped__  # without its cache
    quickly = [tokenize(caption) for caption in captions]
    assert sum(_PLAIN.fullmatch(caption) is not None for caption in captions) > 0.6 * len(captions)
    monkeypatch.setattr("hf_captioner.metrics.tokenization._PLAIN", re.compile(r"(?!)"))
    assert [tokenize(caption) for caption in captions] == quickly


def test_13a():
    cases = {
        "A dog, 2.5m tall; isn't it?": "A dog , 2.5m tall ; isn't it ?",
        "3-4 t-shirts (1,000) a.b.": "3 - 4 t-shirts ( 1,000 ) a . b .",
        "R&amp;B &quot;x&quot; &lt;skipped>": 'R & B " x " < skipped >',
        **{"run-\nning\nnow<skipped>": "running now", "": ""},
    }
    assert {caption: " ".join(tokenize_13a(caption)) for caption in cases} == cases


def test_corpus_counts_equal_cider_caption_by_caption(corpus):
    predictions, references = tokenize_captions(*corpus, tokenize_ptb)
    expected = scores.CiderD(references).scores(predictions, references)
    per_image = caption_metrics(*corpus, per_image=True)["cider_per_image"]
    assert per_image == pytest.approx(expected, abs=1e-9) and max(expected) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_module(name, corpus, load, monkeypatch, tmp_path):
    metric = load(name)
    assert metric.description and metric.citation and metric.info.reference_urls
    predictions, references = corpus
    computed = METRICS.get(name)(cache_dir=tmp_path).compute(predictions=predictions, references=references)
    together = caption_metrics(predictions, references)  # the imported cider.py does not hide the function `cider`
    together["bleu"] = together["evaluate_bleu_4"]
    shared = computed.keys() & together.keys()
    assert shared and {key: computed[key] for key in shared} == pytest.approx({key: together[key] for key in shared})
    assert metric.compute(predictions=predictions, references=references) == computed
    metric.add(prediction=predictions[0], reference=references[0])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    assert metric.compute() == computed

    monkeypatch.chdir(ROOT)  # the examples give paths relative to the root
    example = metric.inputs_description[metric.inputs_description.index("Example:") :]
    parsed = doctest.DocTestParser().get_doctest(example, {"evaluate": evaluate}, name, None, 0)
    assert parsed.examples and doctest.DocTestRunner().run(parsed).failed == 0


def match_ngrams(predictions, references, **kwargs):
    return scores.match_ngrams(*split(predictions, references), scores.shortest, **kwargs)


def test_bleu_by_hand():
    captions = ["a b c d"], [["a b c d e f g h", "a b c d e f"]]
    official = scores.bleu(match_ngrams(*captions))
    assert official["precisions"] == [1.0, 1.0, 1.0, 1.0]
    assert official["bleu"] == official["brevity_penalty"] == pytest.approx(math.exp(1 - 6 / 4))
    assert (official["translation_length"], official["reference_length"]) == (4, 6)
    empty = scores.bleu(match_ngrams([""], [["a"]]))
    assert (empty["bleu"], empty["brevity_penalty"], empty["length_ratio"]) == (0, 0, 0)
    empty_references = scores.bleu(match_ngrams(["a"], [[""]]))
    assert (empty_references["bleu"], empty_references["length_ratio"]) == (0, math.inf)
    with pytest.raises(ValueError, match="max_order is 0"):
        match_ngrams(*captions, max_order=0)


def test_bleu_clips_to_one_reference_and_smooths_above_unigrams():
    counts = match_ngrams(["the the the the"], [["the cat the", "the"]])
    assert (counts.matches, counts.totals) == ([2, 0, 0, 0], [4, 3, 2, 1])
    assert scores.bleu(counts)["bleu"] == 0
    assert scores.bleu(counts, smooth=True)["precisions"] == [2 / 4, 1 / 4, 1 / 3, 1 / 2]
    assert scores.bleu(counts, max_order=1)["bleu"] == 0.5


@pytest.mark.parametrize(("lengths", "expected"), [([3, 6], 6), ([3, 7], 3), ([9, 2, 4], 4)])
def test_closest_reference(lengths, expected):
    assert scores.closest(lengths, 5) == expected
    assert scores.shortest(lengths, 5) == min(lengths)
    counts = NgramCounts([list("abcde")], [[list("abcdefghi"[:length]) for length in lengths]])
    computed = scores.coco_bleu(counts).of_corpus()
    assert computed["bleu_1"] == pytest.approx(min(1, math.exp(1 - expected / 5)), abs=1e-6)


def test_cider_by_hand():
    # No n-gram is in both images, so that every weight is ln 2 and cancels in the cosine.
    predictions, references = split(["a", "c d e f"], [["a b"], ["c d e f"]])
    first, second = scores.CiderD(references).scores(predictions, references)
    # One of four orders matches, and the prediction is one token short.
    assert first == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-1 / 72))
    assert second == pytest.approx(10)
    [clipped] = scores.CiderD(references).scores([["a", "a"]], references[:1])
    assert clipped == pytest.approx(10 / 4 / (2 * math.sqrt(2)))
    counts = NgramCounts(predictions, references)
    assert scores.cider(counts).of_corpus()["cider"] == pytest.approx((first + second) / 2)
    # CIDEr without the D has neither the length penalty nor clipping.
    assert scores.plain_cider(counts).rows[:, 0] == pytest.approx([10 / 4 / math.sqrt(2), 10])
    repeated = NgramCounts(*split(["a a", "x"], [["a"], ["c d e f"]]))
    assert scores.plain_cider(repeated).rows[0, 0] == pytest.approx(10 / 4)
    assert scores.cider(repeated).rows[0, 0] == pytest.approx(10 / 4 / 2 * math.exp(-1 / 72))


def test_cider_with_the_frequencies_of_other_images():
    training = [[["a", "b"]], [["a", "c"]], [["a", "d"]]]
    [common, rare] = scores.CiderD(training).scores([["a"], ["b"]], [[["a"]], [["b"]]])
    assert common == 0  # the references of every image have it
    assert rare == pytest.approx(10 / 4)  # one of four orders
    with pytest.raises(ValueError, match="references is empty"):
        scores.CiderD([])


def test_rouge_l_by_hand():
    precision, recall = 2 / 3, 1  # the first reference has the better precision, the second the better recall
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    computed = scores.rouge_l(*split(["a b c"], [["a x c d", "b"]])).of_corpus()
    assert computed["rouge_l"] == pytest.approx(expected)
    assert scores.rouge_l([[], []], [[[]], [["a"]]]).of_corpus()["rouge_l"] == 0.5  # two empty captions are equal


@pytest.mark.parametrize("length", [0, 1, 5, 20, 90])
def test_common_subsequence_length_equals_the_plain_recursion(length):
    generator = random.Random(length)
    first, second = generator.choices("abcd", k=length), generator.choices("abcde", k=generator.randint(0, 90))

    @cache
    def plain(i, j):
        """Return the length for the first i and j tokens (Lin 2004)."""
        if 0 in (i, j):
            return 0
        return plain(i - 1, j - 1) + 1 if first[i - 1] == second[j - 1] else max(plain(i - 1, j), plain(i, j - 1))

    assert scores.common_subsequence_length(first, second) == plain(len(first), len(second))


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        (["", ""], [["a dog"], ["a cat"]]), (["", "a"], [["", "..."], [""]]), (["one image"], [["one reference"]]),
        (["a", "b", "c"], [["a"], ["b", "b c"], ["c", "d", "e"]]), (["a dog", "a cat"], ["a dog", ["the cat"]]),
        (["собака бежит", "猫が走る", "🐶"], [["собака"], ["猫"], ["🐶 🐶"]]), (("a", "b"), (("a",), ("b", "c"))),
        (["word " * 1000, "dog"], [["word " * 999 + "dog", "dog"], ["cat " * 1000]]),
    ],
)  # fmt: skip
def test_edge_cases_give_scores_in_range(predictions, references):
    computed = caption_metrics(predictions, references)
    assert len(computed) == 16
    largest = {"cider": 10, "plain_cider": 10.000001, "length": 1000, "vocabulary": 1000}
    assert all(0 <= value <= largest.get(name, 1) for name, value in computed.items())
    per_image = caption_metrics(predictions, references, per_image=True)
    assert all(len(value) == len(predictions) for name, value in per_image.items() if name.endswith("_per_image"))
    assert {name: per_image[name] for name in computed} == computed


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "nothing to score"), (["a"], [["a"], ["b"]], "predictions has 1 entries but references has 2"),
        (["a"], [[]], r"references\[0\] is empty"), (["a", "b"], [["a"], None], r"references\[1\] is empty"),
        ("a", ["a"], "predictions is 'a'"), (["a"], "a", "references is 'a'"), (["a"], None, "references is None"),
        (["a", None], [["a"], ["b"]], "Image 1 has the caption None"),
        (["a"], [[["a", "b"]]], r"Image 0 has the caption \['a', 'b'\]"),
    ],
)  # fmt: skip
def test_errors(predictions, references, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        caption_metrics(predictions, references)
    with pytest.raises(ValueError, match=message):
        METRICS.get("rouge_l")(cache_dir=tmp_path).compute(predictions=predictions, references=references)


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
        "distinct_captions": 3 / 4, "distinct_1": 4 / 8, "distinct_2": 3 / 5, "vocabulary": 4,  # a, dog, runs, cat
        "length": 2.0, "novel_captions": 3 / 4, "endless_captions": 1 / 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match="ended has 1 entries for 2"):
        metric.compute(predictions=["a", "b"], ended=[True])
    with pytest.raises(ValueError, match="predictions is 'a'"):
        metric.compute(predictions="a")


@pytest.mark.parametrize("name", ["meteor", "spice"])
@pytest.mark.parametrize("missing", ["pycocoevalcap", "Java"])
def test_java_metrics_name_what_is_missing(name, missing, load, monkeypatch, caplog):
    metric = load(name)
    assert metric.description and metric.citation and metric.inputs_description
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if missing == "pycocoevalcap" else module)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises((ImportError, OSError), match=f"{name.upper()} needs {missing}"):
        metric.compute(predictions=["a dog"], references=[["a dog"]])
    assert caption_metrics(["a dog"], [["a dog"]], java=True)["rouge_l"] == 1
    assert f"{name.upper()} is left out. {name.upper()} needs {missing}" in caplog.text


def test_spice_without_its_models_says_how_to_download_them(monkeypatch, tmp_path):
    module = ModuleType("pycocoevalcap.spice")
    module.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, "pycocoevalcap.spice", module)
    monkeypatch.setattr(java, "coco_scorer", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"python -m pycocoevalcap\.spice\.get_stanford_models"):
        java.spice([["a", "dog"]], [[["a", "dog"]]])


def test_meteor_of_recorded_alignments(monkeypatch):
    class RecordedMeteor:
        """Stands for pycocoevalcap's scorer, which asks METEOR's Java program for the alignment of each image."""

        _stat = mock.Mock(side_effect=ALIGNMENTS)

        def compute_score(self, references, predictions):
            for image in references:
                self._stat(predictions[image][0], references[image])

    monkeypatch.setattr(java, "coco_scorer", lambda name: RecordedMeteor)
    tally = java.meteor(*tokenize_captions(PREDICTIONS, REFERENCES, tokenize_ptb))
    assert tally.of_corpus()["meteor"] == pytest.approx(METEOR, abs=1e-12)
    assert tally.of_images()["meteor_per_image"][:2] == [0, 1]


@pytest.mark.slow
def test_scores_equal_pycocoevalcap_run_here(corpus):
    """Compare tokens, corpus scores and scores of each image with the original, its Java programs included."""
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("Java is not installed")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    predictions, references = [*PREDICTIONS, *corpus[0]], [*REFERENCES, *corpus[1]]
    tokens, reference_tokens = (
        PTBTokenizer().tokenize({i: [{"caption": caption} for caption in row] for i, row in enumerate(rows)})
        for rows in ([[caption] for caption in predictions], references)
    )
    assert [" ".join(tokenize_ptb(caption)) for caption in predictions] == [row[0] for row in tokens.values()]
    computed = caption_metrics(predictions, references, java=True, per_image=True)
    bleu = zip(*Bleu(4).compute_score(reference_tokens, tokens), strict=True)
    expected = {f"bleu_{order}": scores_of_order for order, scores_of_order in enumerate(bleu, start=1)}
    for name, scorer in {"cider": Cider(), "rouge_l": Rouge(), "meteor": Meteor()}.items():
        expected[name] = scorer.compute_score(reference_tokens, tokens)
    for name, (total, each) in expected.items():
        assert computed[name] == pytest.approx(total, abs=1e-6), name
        assert computed[f"{name}_per_image"] == pytest.approx(list(each), abs=1e-6), name
