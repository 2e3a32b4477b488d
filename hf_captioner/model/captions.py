"""Captions as text: tokenizers that are built from training captions, and the splitting of captions into words."""

from __future__ import annotations

import copy
import re
import unicodedata
from collections import Counter
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
# Ids 0 to 3 in this order. <pad> must not be 0, because beam search computes `pad or eos` and would pad with <end>.
SPECIAL_TOKENS = [UNKNOWN, PAD, START, END]

# English words with which a complete caption does not end.
BAD_ENDINGS = (
    *("a", "an", "and", "are", "as", "at", "by", "for", "from", "her", "his", "in", "into"),
    *("is", "its", "near", "of", "on", "onto", "or", "the", "their", "to", "with"),
)

LETTER = r"[\p{L}\p{M}\p{N}]"
# A word may have hyphens and apostrophes inside ("t-shirt", "don't"), but not at its ends.
WORD = rf"{LETTER}+(?:['-]{LETTER}+)*"
# Scripts without spaces between words: Thai to Myanmar, Khmer, Chinese and Japanese with their punctuation.
UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
HALF_CHARACTER = "\ufffd"  # decoders return it for bytes that do not form a whole character

# Maximum length of a BPE piece in bytes; a Latin letter has one byte and a Chinese character three. Without a limit, a
# piece could grow to a whole caption in scripts without spaces. SentencePiece's default.
LONGEST_PIECE = 16


def build_tokenizer(
    captions: Iterable[str], *, kind: str = "words", min_count: int = 5, vocab_size: int | None = None
) -> PreTrainedTokenizerFast:
    """Build a tokenizer from training captions.

    - `"words"`: A caption is normalised (NFKC, lower case) and split into words of letters and digits, with hyphens and
      apostrophes inside words. Other punctuation is dropped.
    - `"bpe"`: Byte-level byte pair encoding (Sennrich et al. 2016, Radford et al. 2019), for languages without spaces
      between words, and to preserve case and punctuation. A caption is normalised (NFKC, single spaces) and split into
      pieces. Every text can be composed of pieces, so that nothing becomes `<unk>`.

    Both kinds end a caption with `<end>`. As in T5, ids do not begin with `<start>`: the decoder reads it first
    (`decoder_start_token_id`). A special token that is written out in a caption is text: `"<end>"` becomes the word
    `end`. The saved files hold all of this, so that `AutoTokenizer` loads the tokenizer without this package.

    Args:
        captions: Captions of the training split only.
        kind: `"words"` or `"bpe"`.
        min_count: Number of times that a word must occur to get an id of its own, or two pieces must occur next to
            each other to be merged; at least 1. Rarer words become `<unk>`.
        vocab_size: Maximum number of ids, special tokens included; by default unlimited for words and 4,096 for BPE.

    Returns:
        Tokenizer with `<unk>`, `<pad>`, `<start>`, `<end>` as ids 0 to 3. Then follow the words by falling frequency,
        equally frequent ones alphabetically, or the 256 bytes and the pieces in the order in which they were merged.

    Raises:
        ValueError: The kind is unknown, a caption is not a string, no word occurs `min_count` times, or `vocab_size`
            has no room for any.
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
    return _with_end(tokenizer)


def tokenizer_of_words(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return the word tokenizer that `build_tokenizer` would build for words with the ids from 4 on in this order.

    Raises:
        ValueError: A word occurs twice, or is a special token.
    """
    vocabulary = [*SPECIAL_TOKENS, *words]
    if len(set(vocabulary)) < len(vocabulary):
        twice = sorted({word for word in vocabulary if vocabulary.count(word) > 1})
        raise ValueError(f"{twice[0]!r} occurs twice in the vocabulary; give every word once, and no special token.")
    tokenizer = _word_tokenizer({word: index for index, word in enumerate(vocabulary)})
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return _with_end(tokenizer)


def is_of_words(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether the vocabulary of a tokenizer consists of whole words."""
    return isinstance(tokenizer.backend_tokenizer.model, WordLevel)


def widened_tokenizer(
    tokenizer: PreTrainedTokenizerFast, captions: Iterable[str], *, min_count: int = 1, vocab_size: int | None = None
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words with the words of new captions added, which get the ids after the known ones.

    Args:
        tokenizer: Tokenizer of words, see `is_of_words`; it stays as it is.
        captions: New captions.
        min_count: Number of times that a new word must occur in them.
        vocab_size: Maximum number of ids; by default unlimited.
    """
    widened = copy.deepcopy(tokenizer)
    backend, known = widened.backend_tokenizer, widened.get_vocab()
    counts = Counter(
        word
        for caption in captions
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption))
    )
    new = [word for word, count in counts.items() if count >= min_count and word not in known]
    new.sort(key=lambda word: (-counts[word], word))
    if vocab_size is not None:
        new = new[: max(0, vocab_size - len(known))]
    vocabulary = known | {word: index for index, word in enumerate(new, start=len(known))}
    backend.model = WordLevel(vocabulary, unk_token=widened.unk_token)
    return widened


def _word_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """Return the tokenizer that splits captions into words of a vocabulary."""
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
    """Return an untrained tokenizer that splits captions into byte pieces and joins them to captions again.

    A piece at the beginning of a word includes the space before it.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    # With a space before it, the first word of a caption has the same pieces as elsewhere.
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def _bpe_trainer(**kwargs: Any) -> BpeTrainer:
    return BpeTrainer(initial_alphabet=ByteLevel.alphabet(), max_token_length=LONGEST_PIECE, **kwargs)


@dataclass(frozen=True)
class Kind:
    """Kind of tokenizer that `build_tokenizer` can build."""

    untrained: Callable[[], Tokenizer]
    trainer: Callable[..., Any]
    alphabet_size: int  # number of ids before training, without special tokens
    vocab_size: int  # maximum number of ids by default


TOKENIZERS = {
    # The trainer orders words by frequency, then alphabetically. Its default vocab_size is 30,000.
    "words": Kind(lambda: _word_tokenizer({}), WordLevelTrainer, alphabet_size=0, vocab_size=2**31),
    "bpe": Kind(_bpe_tokenizer, _bpe_trainer, alphabet_size=256, vocab_size=4096),
}


def _with_end(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer as a transformers tokenizer that ends captions with `<end>`."""
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
    """Return the id sequences that keep captions from ending with these words.

    Set them as `bad_words_ids` in a generation config or a call of `generate()`. Words that the tokenizer does not
    know are skipped. If it has full stops, a word before a full stop at the end counts as an ending too.
    """
    endings: list[list[int]] = []
    for word in words:
        for stop in ("", ".", " ."):
            ids = [*tokenizer(word + stop, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            if tokenizer.unk_token_id not in ids and ids not in endings:
                endings.append(ids)
    return endings


def caption_words(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Split the ids of a caption into words.

    A word ends at a space. In scripts without spaces, every piece that ends with a whole character is a word. Special
    tokens belong to no word.

    Returns:
        Each word with the positions of its pieces among the ids.
    """
    special = set(tokenizer.all_special_ids)
    words: list[tuple[str, list[int]]] = []
    read: list[int] = []
    text, pending = "", []
    for position, token in enumerate(ids):
        if token in special:
            continue
        read.append(token)
        pending.append(position)
        longer = str(tokenizer.decode(read))
        piece = longer[len(text) :]
        if not piece.strip() or piece.endswith(HALF_CHARACTER):
            continue
        if words and not _is_boundary(text, piece):
            words[-1] = words[-1][0] + piece, words[-1][1] + pending
        else:
            words.append((piece.strip(), pending))
        text, pending = longer, []
    if pending:  # bytes of an incomplete character at the end of a caption that was cut off
        words.append((str(tokenizer.decode(read))[len(text) :].strip() or HALF_CHARACTER, pending))
    return words


def _is_boundary(before: str, after: str) -> bool:
    """Return whether a word ends between two adjacent pieces of text."""
    if unicodedata.category(after[0]).startswith("M"):  # a combining mark on the previous letter
        return False
    return after[0].isspace() or bool(UNSPACED.match(before[-1]) or UNSPACED.match(after[0]))


def spaced(caption: str) -> str:
    """Insert spaces between the characters of scripts that have no spaces between words.

    Metrics then count characters as words in these scripts, as is usual for Chinese and Japanese.
    """
    if not UNSPACED.search(caption):
        return caption
    pairs = zip(" " + caption, caption, strict=False)
    return "".join(f" {character}" if _is_boundary(before, character) else character for before, character in pairs)
