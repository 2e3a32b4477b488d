"""The two tokenizers behind caption scores: 13a (official BLEU) and PTB (COCO caption evaluation)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

Tokens = Sequence[str]
Captions = Sequence[str]  # reference captions of one image

_CACHE_SIZE = 2**16  # a validation split is scored after every epoch against the same references


def check_captions(
    predictions: Sequence[str] | None, references: Sequence[Captions | str] | None
) -> tuple[list[str], list[list[str]]]:
    """Return captions as lists of strings and lists of lists, or raise an error that names the malformed one.

    Args:
        predictions: One caption per image; it may be empty.
        references: Reference captions of each image, one or more; a plain string counts as one reference.

    Raises:
        ValueError: One of the two is missing or a single string, they differ in length, an image has no
            references, or a caption is not a string.
    """
    if predictions is None or isinstance(predictions, str):
        raise ValueError(f"predictions is {predictions!r}; it must be a list with one caption per image.")
    if references is None or isinstance(references, str):
        raise ValueError(f"references is {references!r}; it must be a list with one list of captions per image.")
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions has {len(predictions)} entries but references has {len(references)}; both need one "
            "per image (the references of an image are a list of their own)."
        )
    listed = [[captions] if isinstance(captions, str) else captions for captions in references]
    for image, (prediction, captions) in enumerate(zip(predictions, listed, strict=True)):
        if captions is None or len(captions) == 0:
            raise ValueError(f"references[{image}] is empty; every image needs at least one caption.")
        for caption in (prediction, *captions):
            if not isinstance(caption, str):
                raise ValueError(
                    f"Image {image} has the caption {caption!r:.80}; captions must be strings. Decode predictions by "
                    "generate(): token ids or logits of a forward pass on the true captions can't be scored."
                )
    return list(predictions), [list(captions) for captions in listed]


def tokenize_captions(
    predictions: Sequence[str],
    references: Sequence[Captions | str],
    tokenize: Callable[[str], Tokens],
) -> tuple[list[Tokens], list[list[Tokens]]]:
    """Check captions as `check_captions` does, and tokenize each with `tokenize`.

    Raises:
        ValueError: The captions are malformed, or there are none.
    """
    checked, listed = check_captions(predictions, references)
    if not checked:
        raise ValueError("predictions is empty: there is nothing to score. Give one caption per image.")
    return [*map(tokenize, checked)], [[*map(tokenize, captions)] for captions in listed]


_13A_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_13A_RULES = (
    (re.compile(r"([!-&(-+:-@/\[-`{-~])"), r" \1 "),  # all ASCII punctuation but ' , - .
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # . and , stay only between digits
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


@lru_cache(_CACHE_SIZE)
def tokenize_13a(caption: str) -> tuple[str, ...]:
    """Tokenize a caption as mteval-v13a does; case and punctuation are kept.

    Source: the mteval-v13a script of WMT, as ported by sacrebleu and used by `evaluate`'s "bleu".
    """
    caption = caption.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _13A_ENTITIES.items():
        caption = caption.replace(entity, character)
    caption = f" {caption} "
    for pattern, replacement in _13A_RULES:
        caption = pattern.sub(replacement, caption)
    return tuple(caption.split())


# Characters that the Penn Treebank spells differently, mainly brackets. COCO removes the token "-LRB-" as punctuation,
# but only after lower-casing, so that it never matches and brackets remain as words. They remain here too.
_PTB_CHARACTERS = str.maketrans(
    {
        **{"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "},
        **{"¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "},
        **{"€": " $ ", "£": " # ", "¢": " cents ", "…": "..."},
        **dict.fromkeys("\u2010\u2011", "-"),  # typographic hyphens
        **dict.fromkeys("\u2013\u2014\u2015", "--"),  # dashes
    }
)

# Words that keep a period at their end, always (abbreviations) or only before a number (numbered).
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
_QUOTE = "['\u2019]"  # an apostrophe, straight or curly
_CLITIC = rf"(?:n{_QUOTE}t|{_QUOTE}(?:s|m|d|re|ve|ll))(?!\w)"

# Punctuation, then controls, formatting characters and (as the lexer is older than they are) emoji.
_REMOVED = (
    r"""\-.,;:?!'"`«»\u2018\u2019\u201b-\u201d"""
    r"\x00-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u206f\ufe00-\ufeff\U00010000-\U0010ffff"
)

# Nine captions in ten consist of plain words, which can be split quickly without the lexer's rules.
_PLAIN = re.compile(r"[A-Za-z]+(?:(?:-| ?, | +)[A-Za-z]+)*(?: *| ?\.)")
_COMPOUNDS = frozenset(("cannot", "gimme", "gonna", "gotta", "lemme", "wanna"))
_PERIODS = frozenset(_ABBREVIATIONS.split()) | frozenset("abcdefghijklmnopqrstuvwxyz")

_PTB_CLITIC = re.compile(_CLITIC, re.IGNORECASE)
_PTB_COMPOUND = re.compile(r"(?<![\w/-])(?:" + "|".join(sorted(_COMPOUNDS)) + r")(?![\w/-])", re.IGNORECASE)
_PTB_TOKEN = re.compile(
    rf"""(?=\S)(?:
    [a-z]+(?!\S)                                                       # most words: nothing but letters
  | -[lr][rsc]b-                                                       # brackets
  | </?[a-z][^<>\s]*>                                                  # markup, such as <unk>
  | https?://[^\s"<>]*[^\s"<>.,;:!?'] | \w[\w.]*@\w+(?:\.\w+)*         # addresses
  | {_CLITIC}
  | 't(?=is|was\b) | {_QUOTE}(?:em|till?|cause|n{_QUOTE}|n(?!\w))      # 'tis, 'em, rock 'n' roll
  | {_QUOTE}\d\ds?(?![\w"]|{_QUOTE}|\ '[a-z])                          # the '90s
  | (?:{_WORD}-)*[dlno]{_QUOTE}{_WORD} | c'(?:est|mon) | s'mores       # o'clock, d'or
  | {_LETTER}+[aeiouy]{_QUOTE}[aeiou]\w*                               # ma'am, hawai'i
  | (?:ol|[dlj]){_QUOTE} | y{_QUOTE}(?=\w)                             # y'all
  | (?-i:[A-Z]+(?:&[A-Z]+)+)                                           # AT&T, B&W
  | (?:{"|".join(_NUMBERED.split())})\.(?=\s*\d)                       # no. 5
  | (?:{_WORD}-)*{_LETTER}(?:\.{_LETTER}(?!\w))+\.?(?:-{_WORD})*       # p.m., U.S.-based
  | (?:{"|".join(_ABBREVIATIONS.split())}|{_LETTER})\.(?!\w)           # st. louis, j. smith
  | {_LETTER}\w*(?:[.!?]{_LETTER}\w*)+(?:-{_WORD})*                    # flickr.com, but also "street.The"
  | (?<!-)(?<!\.\.)(?:[-+]?\d*(?:[.,:]\d+)+|[-+]\d+)                   # 3:30, 1,000, .5, -5
  | [@\#]{_LETTER}\w*                                                  # @user, #topic
  | {_WORD}(?:[-_/]{_WORD})*                                           # t-shirt, black/white, 1/2
  | [!?]{{2,}} | [*_\#@]+                                              # only a lone ! or ? is removed
  | [^\s{_REMOVED}]
    )""",
    re.VERBOSE | re.IGNORECASE,
)


@lru_cache(_CACHE_SIZE)
def tokenize_ptb(caption: str) -> tuple[str, ...]:
    """Tokenize a caption as COCO caption evaluation does: Penn Treebank tokens, no punctuation, lower case.

    Source: `PTBTokenizer` of pycocoevalcap 1.2, which runs the Java lexer of Stanford CoreNLP 3.4.1. The rules here
    reproduce the lexer's behaviour; tokens are equal on all 34,995 captions of Flickr8k's training and validation
    splits. Emoticons, telephone numbers, C++ and US$ are too rare in captions to be handled.
    """
    if _PLAIN.fullmatch(caption):
        words = tuple(caption.lower().replace(",", "").rstrip(" .").split())
        if words[-1] not in _PERIODS and _COMPOUNDS.isdisjoint(words):
            return words
    caption = caption.translate(_PTB_CHARACTERS).replace("&amp;", "&")
    caption = _PTB_CLITIC.sub(lambda match: " " + match[0].replace("\u2019", "'"), caption)
    caption = _PTB_COMPOUND.sub(lambda match: f"{match[0][:3]} {match[0][3:]}", caption)
    return tuple(map(str.lower, _PTB_TOKEN.findall(caption)))
