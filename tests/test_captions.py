"""Tokenizers for captions, and the splitting of captions into words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hf_captioner.model.captions import LONGEST_PIECE, bad_endings, build_tokenizer, caption_words, spaced

CAPTIONS = ["A dog runs .", "a dog and a cat", "A cat sits on the T-shirt", "the end of a dog's day"]
UNKNOWN, PAD, START, END = range(4)
JAPANESE = [
    f"{who}が{where}{doing}。"
    for who in ("犬", "黒い犬", "女の子", "赤い服を着た男")
    for where in ("海辺で", "雪の中を", "公園で")
    for doing in ("走っている", "遊んでいる")
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(CAPTIONS, min_count=1)


def test_ids_are_special_tokens_then_words_by_frequency_then_alphabet(tokenizer):
    words = "<unk> <pad> <start> <end> a cat dog the and day dog's end of on runs sits t-shirt"
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == words.split()
    assert build_tokenizer((caption for caption in CAPTIONS[::-1]), min_count=1).get_vocab() == tokenizer.get_vocab()
    frequent = build_tokenizer(CAPTIONS, min_count=2)
    assert frequent.convert_ids_to_tokens(range(4, len(frequent))) == ["a", "cat", "dog", "the"]
    assert frequent.tokenize("the dog barks") == ["the", "dog", "<unk>"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Two DOGS, running.", ["two", "dogs", "running"]),
        ("a t-shirt - it's 'red'-ish--", ["a", "t-shirt", "it's", "red", "ish"]),
        ("the dog\u2019s up\u2010side", ["the", "dog's", "up-side"]),
        ("3 men; 3.5 #3", ["3", "men", "3", "5", "3"]),
        ("caf\u00e9 cafe\u0301 \uff44\uff4f\uff47 \ufb01sh", ["caf\u00e9", "caf\u00e9", "dog", "fish"]),
        ("\u0441\u043e\u0431\u0430\u043a\u0430 \u0939\u093f\u0928\u094d\u0926\u0940 \u72ac", None),
        ("dogs\n\trun  fast \U0001f415", ["dogs", "run", "fast"]),
        ("snake_case", ["snake", "case"]),
    ],
)
def test_words(text, words):
    words = text.split() if words is None else words
    tokenizer = build_tokenizer([" ".join(words)], min_count=1)
    assert tokenizer.tokenize(text) == words


def test_captions_end_with_end_also_when_padded_or_cut_and_decode_to_plain_words(tokenizer):
    batch = tokenizer(["a dog", "a cat runs"], padding=True)
    a, cat, dog, runs = tokenizer.convert_tokens_to_ids(["a", "cat", "dog", "runs"])
    ids, mask = [[a, dog, END, PAD], [a, cat, runs, END]], [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch == {"input_ids": ids, "attention_mask": mask}
    assert tokenizer("a dog runs", truncation=True, max_length=3).input_ids == [a, dog, END]
    ids = [START, *tokenizer("A dog's t-shirt, on the cat!").input_ids, PAD]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a dog's t-shirt on the cat"


def test_special_tokens_in_a_caption_are_text(tokenizer):
    dog, end = tokenizer.convert_tokens_to_ids(["dog", "end"])
    assert tokenizer("dog <end> <pad> <start> dog").input_ids == [dog, end, UNKNOWN, UNKNOWN, dog, END]
    assert tokenizer.encode("<end>") == [end, END]
    assert tokenizer(["<end>", "dog"], padding=True).input_ids == [[end, END], [dog, END]]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return build_tokenizer([*JAPANESE, *CAPTIONS] * 2, kind="bpe", min_count=2, vocab_size=400)


def test_every_text_is_restored_from_its_pieces(bpe):
    odd = ("A Dog's T-shirt, 'quoted' (twice)!", "Привет 🐕 <end> <unk> </s> Ġ é น้ำตก", "\t\x00\x7f")
    for text in (*JAPANESE, *CAPTIONS, *odd):
        expected = " ".join(unicodedata.normalize("NFKC", text).split())
        ids = bpe(text).input_ids
        assert bpe.decode([START, *ids, PAD, PAD], skip_special_tokens=True) == expected
        assert ids[-1] == END and not set(ids[:-1]) & {UNKNOWN, PAD, START, END}
    assert bpe("ｃａｆｅ\u0301  犬").input_ids == bpe("café 犬").input_ids


def test_pieces_have_the_same_special_ids_and_are_short(tokenizer, bpe):
    for each in (tokenizer, bpe):
        ids = (each.unk_token_id, each.pad_token_id, each.bos_token_id, each.eos_token_id)
        assert ids == (UNKNOWN, PAD, START, END)
    assert bpe(["犬", "the unheard-of cat"], padding=True).input_ids[0][-1] == PAD
    assert 260 < len(bpe) <= 400
    assert max(len(piece) for piece in bpe.get_vocab()) <= LONGEST_PIECE
    assert len(bpe(JAPANESE[0]).input_ids) < len(JAPANESE[0])
    again = build_tokenizer([*CAPTIONS, *JAPANESE[::-1]] * 2, kind="bpe", min_count=2, vocab_size=400)
    assert again.get_vocab() == bpe.get_vocab()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dog's t-shirt , on the unheard-of cat!", ["A", "dog's", "t-shirt", ",", "on", "the", "unheard-of", "cat!"]),
        ("犬 と a dog", ["犬", "と", "a", "dog"]),
        ("dog犬dog", ["dog", "犬", "dog"]),
        ("🐕 <end>", ["🐕", "<end>"]),
    ],
)
def test_pieces_are_joined_to_words(bpe, text, words):
    ids = [START, *bpe(text).input_ids, PAD]
    found = caption_words(bpe, ids)
    assert [word for word, _ in found] == words
    assert [index for _, indices in found for index in indices] == list(range(1, len(ids) - 2))


def test_without_spaces_pieces_are_words_of_whole_characters(bpe):
    for caption in [*JAPANESE, "猫がいる。", "น้ำตกสวยงาม"]:
        words = [word for word, _ in caption_words(bpe, bpe(caption).input_ids)]
        assert "".join(words) == unicodedata.normalize("NFKC", caption)
        assert len(words) > 2 and not any(unicodedata.category(word[0]).startswith("M") for word in words)
    ids = bpe("猫").input_ids
    assert len(ids) > 3 and caption_words(bpe, ids) == [("猫", list(range(len(ids) - 1)))]
    assert caption_words(bpe, ids[:-2]) == [("\ufffd", list(range(len(ids) - 2)))]
    assert caption_words(bpe, [*bpe("a dog").input_ids[:-1], *ids[:1]])[:2] == [("a", [0]), ("dog", [1])]


def test_words_of_the_word_tokenizer_are_its_tokens(tokenizer):
    ids = [START, *tokenizer("A dog's day, barking").input_ids, PAD]
    assert caption_words(tokenizer, ids) == [("a", [1]), ("dog's", [2]), ("day", [3])]
    assert caption_words(tokenizer, [START, END]) == []


def test_bad_endings_forbid_the_end_after_known_words_only(tokenizer, bpe):
    ids = tokenizer.get_vocab()
    assert bad_endings(tokenizer, ["dog", "xylophone"]) == [[ids["dog"], END]]
    assert [ids["the"], END] in bad_endings(tokenizer) and [ids["dog"], END] not in bad_endings(tokenizer)
    forbidden = bad_endings(bpe, ["the", "xylophone"])  # of pieces, also with a full stop
    for text in ("the", "the.", "the .", "xylophone"):
        assert bpe("on " + text).input_ids[-len(bpe(text).input_ids) :] in forbidden
    assert bpe("the dog").input_ids not in forbidden


def test_characters_of_scripts_without_spaces_are_spaced():
    assert spaced("A dog's day.") == "A dog's day."
    assert spaced("Tシャツの犬。").split() == ["T", *"シャツの犬。"]
    assert spaced("น้ำ").split() == ["น้", "ำ"]


@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_vocab_size_is_a_limit(kind):
    assert len(build_tokenizer(CAPTIONS, kind=kind, min_count=1, vocab_size=263)) == {"words": 17, "bpe": 263}[kind]
    smallest = {"words": 4, "bpe": 260}[kind]
    assert len(build_tokenizer(CAPTIONS, kind=kind, min_count=1, vocab_size=smallest + 1)) == smallest + 1
    with pytest.raises(ValueError, match=rf"vocab_size is {smallest}; give more than the {smallest} ids"):
        build_tokenizer(CAPTIONS, kind=kind, vocab_size=smallest)
    with pytest.raises(ValueError, match=r"kind of tokenizer is 'char'; choose from words, bpe\."):
        build_tokenizer(CAPTIONS, kind="char")


@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_reloads_through_auto_tokenizer_without_this_package(kind, tmp_path, request):
    tokenizer = request.getfixturevalue({"words": "tokenizer", "bpe": "bpe"}[kind])
    text = "A dog's <end> <pad>, unheard"
    tokenizer(text, truncation=True, max_length=2)  # arguments of a call must not be saved
    tokenizer.save_pretrained(tmp_path)
    # As in a captioner's folder, whose model type transformers does not know without this package.
    (tmp_path / "config.json").write_text('{"model_type": "unknown_captioner"}')
    code = (
        "import json, sys; sys.modules['hf_captioner'] = None\n"  # makes every import of it fail
        "from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained('.');"
        "assert not any(m.startswith('hf_captioner.') for m in sys.modules);"
        f"ids = t({text!r}).input_ids; decoded = t.decode(ids, skip_special_tokens=True);"
        "print(json.dumps([ids, decoded, t.get_vocab(), t.special_tokens_map, t.padding_side]))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True)
    ids = tokenizer(text).input_ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded == {"words": "a dog's end", "bpe": text}[kind]
    assert json.loads(output) == [ids, decoded, tokenizer.get_vocab(), tokenizer.special_tokens_map, "right"]


@pytest.mark.parametrize(
    ("captions", "min_count", "message"),
    [
        ([], 1, "No word occurs at least 1 times in the 0 captions"),
        (["...", "!?"], 1, "in the 2 captions given; give more captions with words"),
        (["a dog"], 2, "a smaller min_count"),
        (["a dog", None], 1, r"captions\[1\] is None"),
        ([["a dog"]], 1, r"captions\[0\] is \['a dog'\]"),
        ("a dog", 1, "single string"),
        (["a dog"], 0, "min_count is 0"),
    ],
)
def test_errors(captions, min_count, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(captions, min_count=min_count)


@pytest.fixture(scope="module")
def flickr8k_captions(flickr8k: Path) -> list[str]:
    from pyarrow import parquet

    table = parquet.read_table(flickr8k / "data", columns=[f"caption_{i}" for i in range(5)])
    return [caption for column in table.columns for caption in column.to_pylist()]


def test_flickr8k_is_restored_from_pieces(flickr8k_captions):
    tokenizer = build_tokenizer(flickr8k_captions, kind="bpe")
    assert len(tokenizer) == 4096
    captions = flickr8k_captions[::5]
    ids = tokenizer(captions).input_ids
    expected = [" ".join(unicodedata.normalize("NFKC", caption).split()) for caption in captions]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == expected
    assert sum(map(len, ids)) / len(ids) < 14  # of 11.8 words and marks, and <end>
    for row, caption in zip(ids[:300], expected, strict=False):
        assert [word for word, _ in caption_words(tokenizer, row)] == caption.split()


def test_flickr8k_vocabulary_equals_that_of_plain_counting(flickr8k_captions):
    tokenizer, word = build_tokenizer(flickr8k_captions), r"[^\W_]+(?:['-][^\W_]+)*"
    split = [re.findall(word, unicodedata.normalize("NFKC", caption).lower()) for caption in flickr8k_captions]
    counts = Counter(word for words in split for word in words)
    ranked = sorted((word for word in counts if counts[word] >= 5), key=lambda word: (-counts[word], word))
    assert tokenizer.convert_ids_to_tokens(range(4, len(tokenizer))) == ranked
    assert 2500 < len(ranked) < 3500
    ids = tokenizer(flickr8k_captions[:5000]).input_ids
    assert all(row[-1] == END and END not in row[:-1] for row in ids)
    assert sum(row.count(UNKNOWN) for row in ids) / sum(map(len, ids)) < 0.03
    for words, row in zip(split[:500], ids, strict=False):
        known = [word for word in words if counts[word] >= 5]
        assert tokenizer.decode(row, skip_special_tokens=True) == " ".join(known)
