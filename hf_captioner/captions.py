"""Captions as text: the word-level tokenizer, built from the captions that a model is trained on."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFKC, Lowercase, Replace, Sequence
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
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


def build_tokenizer(captions: Iterable[str], *, min_count: int = 5) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer from training captions.

    A caption is normalised (NFKC, lower case), split into words of letters and digits with inner hyphens and
    apostrophes, and closed with `<end>`; other punctuation is dropped. As in T5 there is no `<start>`: the
    decoder begins with it (`decoder_start_token_id`). A special token written out in a caption is text:
    `"<end>"` gives the word `end`. All of this is in the saved files, so `AutoTokenizer` loads them without
    this package.

    Args:
        captions: captions of the training split only.
        min_count: how often a word must occur to get an id of its own, at least 1. The others become `<unk>`.

    Returns:
        Tokenizer with `<unk>`, `<pad>`, `<start>`, `<end>` as ids 0 to 3, then the words by falling
        frequency, equally frequent ones alphabetically.

    Raises:
        ValueError: a caption is not a string, or no word occurs `min_count` times.
    """
    if isinstance(captions, str):
        raise ValueError(f"captions is a single string, {captions[:40]!r}; give a list of captions.")
    captions = list(captions)
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"captions[{index}] is {caption!r}; every caption must be a string.")
    if min_count < 1:
        raise ValueError(f"min_count is {min_count}; it must be at least 1, which keeps every word.")

    tokenizer = _tokenizer({})
    # The trainer orders words by frequency, then alphabetically. Its default vocab_size is 30,000.
    trainer = WordLevelTrainer(
        vocab_size=2**31, min_frequency=min_count, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    if tokenizer.get_vocab_size() == len(SPECIAL_TOKENS):
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
    tokenizer = _tokenizer({word: index for index, word in enumerate(vocabulary)})
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return _closed(tokenizer)


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """How a caption becomes words."""
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = Sequence(
        [
            NFKC(),
            Lowercase(),
            Replace(Regex("[\u2019\u02bc]"), "'"),  # typographic apostrophes
            Replace("\u2010", "-"),  # typographic hyphen
        ]
    )
    tokenizer.pre_tokenizer = Split(Regex(WORD), behavior="removed", invert=True)
    return tokenizer


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

    Words that the tokenizer does not know are left out.
    """
    known = tokenizer.get_vocab()
    return [[known[word], tokenizer.eos_token_id] for word in words if word in known]
