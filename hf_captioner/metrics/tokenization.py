"""The two tokenizers captions are scored with: 13a (official BLEU) and PTB (COCO caption evaluation)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

Tokens = Sequence[str]

_CACHE_SIZE = 2**16  # a validation split is scored again and again, against the same references


def tokenize_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str] | str],
    tokenize: Callable[[str], Tokens],
) -> tuple[list[Tokens], list[list[Tokens]]]:
    """Check and tokenize one predicted caption and the reference captions of each image.

    Args:
        predictions: one caption an image; it may be empty.
        references: the captions of each image, one or more; a plain string counts as one reference.
        tokenize: splits one caption.

    Raises:
        ValueError: no images, as many predictions as references are not given, an image without references,
            or a caption that is not a string.
    """
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("predictions and references must be lists with one entry an image, not a string.")
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions but references of {len(references)} images: give one each an image."
        )
    if not len(predictions):
        raise ValueError("predictions is empty: there is nothing to score. Give one caption an image.")

    def split(caption: str, name: str) -> Tokens:
        if not isinstance(caption, str):
            raise ValueError(f"{name} is {caption!r}; every caption must be a string.")
        return tokenize(caption)

    split_references = []
    for image, captions in enumerate(references):
        captions = [captions] if isinstance(captions, str) else captions
        if captions is None or not len(captions):
            raise ValueError(f"references[{image}] is {captions!r}; every image needs at least one caption.")
        split_references.append([split(caption, f"a caption of references[{image}]") for caption in captions])
    return [split(caption, f"predictions[{i}]") for i, caption in enumerate(predictions)], split_references


_13A_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_13A_RULES = (
    (re.compile(r"([!-&(-+:-@/\[-`{-~])"), r" \1 "),  # all ASCII punctuation but ' , - .
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # . and , stay only between digits
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


@lru_cache(_CACHE_SIZE)
def tokenize_13a(caption: str) -> tuple[str, ...]:
    """Split a caption as mteval-v13a does; case and punctuation stay.

    Source: the mteval-v13a script of WMT, by way of sacrebleu, as in the "bleu" of `evaluate`.
    """
    caption = caption.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _13A_ENTITIES.items():
        caption = caption.replace(entity, character)
    caption = f" {caption} "
    for pattern, replacement in _13A_RULES:
        caption = pattern.sub(replacement, caption)
    return tuple(caption.split())


# Characters the treebank writes in other ones, brackets foremost. COCO's removal of punctuation looks for
# "-LRB-" after lower-casing and never finds it, so brackets stay as words; so they do here.
_PTB_CHARACTERS = str.maketrans(
    {
        **{"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "},
        **{"¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "},
        **{"€": " $ ", "£": " # ", "¢": " cents ", "…": "...", "‐": "-", "‑": "-"},
        **dict.fromkeys("–—―", "--"),
        **dict.fromkeys("“”«»", '"'),
    }
)

# Words that keep a period at their end, before anything and (the second list) before a number.
_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros calif capt cf
    cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla
    fri ft ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md
    mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte
    pptes ppty pptys pres prof profs pte ptes pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt
    spc sq sr st ste supt supts sys tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo
"""
_NUMBERED = "art ca fig figs no nos op pp prop"

_LETTER = r"[^\W\d_]"
# \w lacks the combining marks; without them the words of many scripts (Hindi, Thai) would fall apart.
_MARKS = "".join(c for c in map(chr, range(0x300, 0x3100)) if unicodedata.category(c) in ("Mn", "Mc"))
_WORD = rf"(?:[^\W_]|[{_MARKS}])+"
_CLITICS = r"n['’]t|['’](?:s|m|d|re|ve|ll)"

_PTB_CLITIC = re.compile(rf"(?:{_CLITICS})(?!\w)", re.IGNORECASE)
# Split after their third letter, all of them.
_PTB_COMPOUND = re.compile(
    r"(?<![\w/-])(?:cannot|gimme|gonna|gotta|lemme|wanna)(?![\w/-])", re.IGNORECASE
)
_PTB_TOKEN = re.compile(
    rf"""
    (?=\S)(?:
    [a-z]+(?!\S)                                                  # most words: nothing but letters to see
  | -[lr][rsc]b-                                                  # brackets
  | </?[a-z][^<>\s]*>                                             # markup, such as <unk>
  | (?:https?://|www\.)[^\s"<>]*[^\s"<>.,;:!?'] | [\w.]+@\w+(?:\.\w+)*
  | (?:{_CLITICS})(?!\w)
  | 't(?=is|was\b) | ['’](?:em|till?|cause|n['’]|n(?!\w))         # 'tis, 'em, rock 'n' roll
  | ['’]\d\ds?(?![\w"'’]|\ '[a-z])                                # the '90s
  | (?:{_WORD}-)*[dlno]['’]{_WORD} | c'(?:est|mon) | s'mores      # o'clock, d'or
  | {_LETTER}+[aeiouy]['’][aeiou]\w*                              # ma'am, hawai'i
  | (?:ol|[dlj])['’] | y['’](?=\w)
  | (?-i:[A-Z]+(?:&[A-Z]+)+)                                      # AT&T, B&W
  | (?:{"|".join(_NUMBERED.split())})\.(?=\s*\d)                  # no. 5
  | (?:{_WORD}-)*{_LETTER}(?:\.{_LETTER}(?!\w))+\.?(?:-{_WORD})*  # p.m., U.S., U.S.-based
  | (?:{"|".join(_ABBREVIATIONS.split())}|{_LETTER})\.(?!\w)      # st. louis, j. smith
  | {_LETTER}\w*(?:[.!?]{_LETTER}\w*)+(?:-{_WORD})*               # flickr.com, and "street.The"
  | (?<!-)(?<!\.\.)(?:[-+]?\d*(?:[.,:]\d+)+|[-+]\d+)            # 3:30, 1,000, .5, -5
  | [@\#]{_LETTER}\w*                                             # @user, #topic
  | {_WORD}(?:[-_/]{_WORD})*                                      # t-shirt, black/white, 1/2
  | [!?]{{2,}} | [*_\#@]+                                         # kept: only a lone ! or ? is removed
  | [^\s.,;:?!'"`‘’\-\x00-\x1f\x7f-\x9f\u200b-\u206f\ufe00-\ufeff\U00010000-\U0010ffff]
    )""",
    re.VERBOSE | re.IGNORECASE,
)


@lru_cache(_CACHE_SIZE)
def tokenize_ptb(caption: str) -> tuple[str, ...]:
    """Split a caption as COCO caption evaluation does: Penn Treebank tokens, punctuation removed, lower case.

    Source: `PTBTokenizer` of pycocoevalcap 1.2, which runs the Java lexer of Stanford CoreNLP 3.4.1. Written
    from its behaviour on captions; equal to it on all 34,995 captions of Flickr8k. Left out as too rare in
    captions: emoticons and telephone numbers.
    """
    caption = caption.translate(_PTB_CHARACTERS).replace("&amp;", "&")
    caption = _PTB_CLITIC.sub(lambda match: " " + match[0].replace("’", "'"), caption)
    caption = _PTB_COMPOUND.sub(lambda match: f"{match[0][:3]} {match[0][3:]}", caption)
    return tuple(map(str.lower, _PTB_TOKEN.findall(caption)))
