"""Captions as text: tokenizers built from the captions that a model is trained on, and what a word is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, WordLevelTrainer
from transformers import PreTrainedTokenizerFast

UNKNOWN, PAD, START, END = "<unk>", "<pad>", "<start>", "<end>"
# Their order is their ids. Padding must not be 0: beam search computes `pad or eos` and would pad with <end>.
SPECIAL_TOKENS = [UNKNOWN, PAD, START, END]

# English words with which no caption ends that is complete.
BAD_ENDINGS = (
    *("a", "an", "and", "are", "as", "at", "by", "for", "from", "her", "his", "in", "into"),
    *("is", "its", "near", "of", "on", "onto", "or", "the", "their", "to", "with"),
)

LETTER = r"[\p{L}\p{M}\p{N}]"
# A word may have hyphens and apostrophes inside it ("t-shirt", "don't"), not around it.
WORD = rf"{LETTER}+(?:['-]{LETTER}+)*"
# Thai to Myanmar, Khmer, then Chinese and Japanese with their punctuation: scripts without spaces between words.
UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
HALF_CHARACTER = "\ufffd"  # what bytes become that are not yet a character

# In characters, of which Latin letters need one and Chinese ones three. Without a limit, pieces would grow to whole
# captions where there are no spaces. SentencePiece's default.
LONGEST_PIECE = 16


def build_tokenizer(
    captions: Iterable[str], *, kind: str = "words", min_count: int = 5, vocab_size: int | None = None
) -> PreTrainedTokenizerFast:
    """Build a tokenizer from training captions.

    - `"words"`: a caption is normalised (NFKC, lower case) and split into words of letters and digits with inner
      hyphens and apostrophes; other punctuation is dropped.
    - `"bpe"`: byte-level byte pair encoding (Sennrich et al. 2016, Radford et al. 2019), for languages without spaces
      between words, and for text that shall stay as it is. A caption is normalised (NFKC, single spaces) and split into
      pieces, of which every text can be made, so nothing is unknown and case and punctuation stay.

    Either closes a caption with `<end>`. As in T5 there is no `<start>`: the decoder begins with it
    (`decoder_start_token_id`). A special token written out in a caption is text: `"<end>"` gives the word `end`. All of
    this is in the saved files, so `AutoTokenizer` loads them without this package.

    Args:
        captions: captions of the training split only.
        kind: `"words"` or `"bpe"`.
        min_count: how often a word must occur to get an id of its own, or two pieces beside each other to be joined;
            at least 1. Rarer words become `<unk>`.
        vocab_size: most ids, special ones included; by default no limit for words and 4,096 for BPE.

    Returns:
        Tokenizer with `<unk>`, `<pad>`, `<start>`, `<end>` as ids 0 to 3; then the words by falling frequency, equally
        frequent ones alphabetically, or the 256 bytes and the pieces in the order in which they were joined.

    Raises:
        ValueError: an unknown kind, a caption that is not a string, no word that occurs `min_count` times, or a
            `vocab_size` without room for any.
    """
    if kind not in TOKENIZERS:
        raise ValueError(f"The kind of tokenizer is {kind!r}; choose from {', '.join(TOKENIZERS)}.")
    if isinstance(captions, str):
        raise ValueError(f"captions is a single string, {captions[:40]!r}; give a list of captions.")
    captions = list(captions)
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"captions[{index}] is {caption!r}; every caption must be a string.")
    if min_count < 1:
        raise ValueError(f"min_count is {min_count}; it must be at least 1, which keeps every word.")

    chosen = TOKENIZERS[kind]
    vocab_size = chosen.vocab_size if vocab_size is None else vocab_size
    num_given = len(SPECIAL_TOKENS) + chosen.alphabet_size
    if vocab_size <= num_given:
        raise ValueError(f"vocab_size is {vocab_size}; give more than the {num_given} ids that every {kind!r} has.")
    tokenizer = chosen.untrained()
    trainer = chosen.trainer(
        vocab_size=vocab_size, min_frequency=min_count, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    if tokenizer.get_vocab_size() == num_given:
        raise ValueError(
            f"No word occurs at least {min_count} times in the {len(captions)} captions given; give more "
            "captions with words in them, or a smaller min_count."
        )
    return _closed(tokenizer)


def tokenizer_of_words(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of `build_tokenizer` for a vocabulary that is known.

    Args:
        words: without the special tokens; they get the ids from 4 on in this order.

    Raises:
        ValueError: a word occurs twice, or is a special token.
    """
    vocabulary = [*SPECIAL_TOKENS, *words]
    if len(set(vocabulary)) < len(vocabulary):
        twice = sorted({word for word in vocabulary if vocabulary.count(word) > 1})
        raise ValueError(f"{twice[0]!r} occurs twice in the vocabulary; give every word once, and no special token.")
    tokenizer = _word_tokenizer({word: index for index, word in enumerate(vocabulary)})
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return _closed(tokenizer)


def _word_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """How a caption becomes words."""
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[\u2019\u02bc]"), "'"),  # typographic apostrophes
            normalizers.Replace("\u2010", "-"),  # typographic hyphen
        ]
    )
    tokenizer.pre_tokenizer = Split(Regex(WORD), behavior="removed", invert=True)
    return tokenizer


def _bpe_tokenizer() -> Tokenizer:
    """How a caption becomes pieces, which begin with the space before a word, and a caption again."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    # A first word gets a space too, so that it is the word that it is elsewhere.
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def _bpe_trainer(**kwargs: Any) -> BpeTrainer:
    return BpeTrainer(initial_alphabet=ByteLevel.alphabet(), max_token_length=LONGEST_PIECE, **kwargs)


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer: how it is trained, the ids that it has before, and most ids by default."""

    untrained: Callable[[], Tokenizer]
    trainer: Callable[..., Any]
    alphabet_size: int
    vocab_size: int


TOKENIZERS = {
    # The trainer orders words by frequency, then alphabetically. Its default vocab_size is 30,000.
    "words": Kind(lambda: _word_tokenizer({}), WordLevelTrainer, alphabet_size=0, vocab_size=2**31),
    "bpe": Kind(_bpe_tokenizer, _bpe_trainer, alphabet_size=256, vocab_size=4096),
}


def _closed(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers has it, with `<end>` at the end of captions."""
    tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, SPECIAL_TOKENS.index(END))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        padding_side="right",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def bad_endings(tokenizer: PreTrainedTokenizerFast, words: Iterable[str] = BAD_ENDINGS) -> list[list[int]]:
    """What keeps captions from ending in these words, for `bad_words_ids` of `generate()` or a generation config.

    Words that the tokenizer does not know are left out. Where it has full stops, words before one end a caption too.
    """
    endings: list[list[int]] = []
    for word in words:
        for stop in ("", ".", " ."):
            ids = [*tokenizer(word + stop, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            if tokenizer.unk_token_id not in ids and ids not in endings:
                endings.append(ids)
    return endings


def caption_words(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of a caption, each with the places among the ids where its pieces are.

    A word ends at a space. In scripts without spaces, every piece that ends with a whole character is a word. Special
    tokens belong to none.
    """
    special = set(tokenizer.all_special_ids)
    words: list[tuple[str, list[int]]] = []
    read: list[int] = []
    text, pending = "", []
    for place, token in enumerate(ids):
        if token in special:
            continue
        read.append(token)
        pending.append(place)
        longer = str(tokenizer.decode(read))
        piece = longer[len(text) :]
        if not piece.strip() or piece.endswith(HALF_CHARACTER):
            continue
        if words and not _is_border(text, piece):
            words[-1] = words[-1][0] + piece, words[-1][1] + pending
        else:
            words.append((piece.strip(), pending))
        text, pending = longer, []
    if pending:  # bytes that are no character, with which a caption was cut off
        words.append((str(tokenizer.decode(read))[len(text) :].strip() or HALF_CHARACTER, pending))
    return words


def _is_border(before: str, after: str) -> bool:
    """Whether a word ends between two texts."""
    if unicodedata.category(after[0]).startswith("M"):  # a mark on the letter before
        return False
    return after[0].isspace() or bool(UNSPACED.match(before[-1]) or UNSPACED.match(after[0]))


def spaced(caption: str) -> str:
    """The caption with spaces between the characters of scripts that have none between words.

    What counts words, such as every metric, then counts characters there, as is usual for Chinese and Japanese.
    """
    if not UNSPACED.search(caption):
        return caption
    pairs = zip(" " + caption, caption, strict=False)
    return "".join(f" {character}" if _is_border(before, character) else character for before, character in pairs)
