"""Text files of captions: their encodings, their lines, and JSON in them.

UTF-8, UTF-16 and UTF-32 are recognised with certainty. A file in none of them is read as Windows-1252 if its text looks
right in it, which is reported, and is otherwise refused with the encoding that it may have.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from typing import Any

from charset_normalizer import from_bytes

from ...files import is_utf8, parse_json
from .damage import Damage, shortened
from .image_folder import ImageFolder

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Letters with accents of French, Spanish, Portuguese, Italian, German with Dutch and Swedish, Danish, Icelandic.
ACCENTS = (
    *("àâæçèéêëîïñôöœùûüÿ", "áéíïñóúüç", "àáâãçéêíóôõúü", "àèéìíîòóùúïüç"),
    *("äöüßåéèêëïàáóç", "æøåéèêòóôäöü", "áéíóúýðþæöø"),
)
MAX_LOANWORDS = 0.01  # fraction of words with accents up to which these may be of any language
# What appears inside words if a text is decoded wrongly: signs, and capitals behind small letters.
SIGNS = "‚„†‡‰‹›ˆ˜•¡¿€£¢¥¤¦§¨©¬®¯°±²³µ¶¸¹»«¼½¾×÷"
WRONG = re.compile(f"[^\\W\\d_][{SIGNS}]+[^\\W\\d_]|[a-zà-öø-ÿ][À-ÖØ-ÞŒŠŽŸ]")
# English letters, digits and commas whose two bytes in UTF-16 are exchanged, as behind a byte that is missing.
SHIFTED = re.compile(f"\ufffd|[{''.join(chr(byte << 8) for byte in b'123456789,./ abcdefghijklmnopqrstuvwxyz')}]{{4}}")
ZEROS = re.compile("\0")
CONTROLS = bytes({*range(32)} - {*b"\t\n\v\f\r\x1a\x1b"})
MAX_CONTROLS = 0.03  # fraction of control characters in a text; binary files have more
MAX_BROKEN = 0.1  # fraction of broken lines up to which a file counts as intact otherwise

SEPARATOR = re.compile('"?sep=(.)', re.IGNORECASE)  # a first line that tells Excel which character separates fields

Lines = list[tuple[int, str]]


def text_lines(folder: ImageFolder, file: str, damage: Damage) -> Lines:
    r"""Return the lines of a text file without their ends (\n, \r\n or \r), with their numbers, which begin at 1.

    Raises:
        ValueError: The file is no text, or its encoding is not known; or a line is broken, unless these are left out.
    """
    content = folder.locate(file).read_bytes()
    encoding = _unicode_encoding(content)
    # Bytes that are not UTF-8 become surrogates.
    text = content.decode(encoding, "surrogateescape" if encoding == "utf-8" else "replace").replace("\ufeff", "")
    lines, head = _split(text), content[:8192]
    if encoding != "utf-8":
        damage.repaired(f"Files read as {encoding[:6].upper()}", file)
        return _intact(lines, file, damage, SHIFTED)
    if len(head) - len(head.translate(None, CONTROLS)) > max(4, MAX_CONTROLS * len(head)):
        raise ValueError(f"{file} is not a text file.")
    if not text.isascii() and (broken := [(number, line) for number, line in lines if not is_utf8(line)]):
        num_intact = sum(not line.isascii() for _, line in lines) - len(broken)
        western = content.decode("cp1252", "replace")
        if not num_intact and _looks_right(western):
            word = next(word for word in western.split() if not word.isascii())
            where = f"{file}, {shortened(word)} in line {broken[0][0]}"
            damage.repaired("Files read as Windows-1252, since they are not UTF-8", where)
            return _intact(_split(western), file, damage)
        if len(broken) > max(num_intact, MAX_BROKEN * len(lines)):
            raise ValueError(_not_utf8(file, *broken[0], _suggest_encoding(content, broken)))
    return _intact(lines, file, damage)


def read_json(folder: ImageFolder, file: str, damage: Damage) -> Any:
    """Return the content of a JSON file, or raise a ValueError if it is not JSON."""
    return parse_json("\n".join(line for _, line in text_lines(folder, file, damage)), file)


def contains(folder: ImageFolder, file: str, *words: str) -> bool:
    """Return whether a text file contains all these ASCII words, in UTF-8 or UTF-16."""
    content = folder.locate(file).read_bytes()
    return all(any(word.encode(code) in content for code in ("utf-8", "utf-16-le", "utf-16-be")) for word in words)


def first_lines(folder: ImageFolder, file: str, size: int = 1 << 16) -> list[str]:
    """Return the lines at the beginning of a file, which may be no text."""
    with folder.locate(file).open("rb") as opened:
        content = opened.read(size)
    return [line for _, line in _split(content.decode(_unicode_encoding(content), "replace").replace("\ufeff", ""))]


def _unicode_encoding(content: bytes) -> str:
    """Return the encoding of Unicode that a file's byte order mark or its zero bytes tell; UTF-8 without them."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return encoding
    head = content[:4096]
    for encoding, zeros, others in (("utf-16-le", head[1::2], head[::2]), ("utf-16-be", head[::2], head[1::2])):
        if zeros.count(0) > max(0.1 * len(zeros), 20 * others.count(0)):
            return encoding
    return "utf-8"


def _split(text: str) -> Lines:
    """Return the numbered lines of a text."""
    return list(enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1))


def _intact(lines: Lines, file: str, damage: Damage, damaged: re.Pattern[str] = ZEROS) -> Lines:
    """Return the lines that are intact, and refuse or leave out the others, such as those that match a pattern."""
    intact = []
    for number, line in lines:
        with damage.skipping():
            if damaged.search(line):
                raise ValueError(f"{file}, line {number}, has bytes that are no text: bytes are missing or damaged.")
            if not is_utf8(line):
                raise ValueError(_not_utf8(file, number, line))
            intact.append((number, line))
    return intact


def _not_utf8(file: str, number: int, line: str, hint: str = "") -> str:
    """Return the message about the first byte of a line that is not UTF-8."""
    wrong = re.search("[\udc80-\udcff]", line)
    assert wrong is not None
    position = len(line[: wrong.start()].encode("utf-8", "surrogateescape")) + 1
    return f"{file}, line {number}, is not UTF-8 (byte 0x{ord(wrong[0]) & 255:02x} at {position}).{hint}"


def _looks_right(text: str) -> bool:
    """Return whether a text in a Western European language looks as if it was decoded by the right encoding."""
    if WRONG.search(text) or re.search("[\ufffd\x80-\x9f]", text):
        return False
    words = text.split()
    accented = ["".join(filter(str.isalpha, word.lower())) for word in words if not word.isascii()]
    letters = Counter(letter for word in accented for letter in word)
    accents = {letter for letter in letters if not letter.isascii()} - {*"ªºµ"}
    known = {*"".join(ACCENTS)}
    is_rare = sum(not word.isascii() for word in accented) <= MAX_LOANWORDS * len(words)
    in_words = sum(letters[letter] for letter in letters if letter.isascii())
    return in_words >= sum(letters[accent] for accent in accents) and (
        accents <= known if is_rare else any(accents <= {*language} for language in ACCENTS)
    )


def _suggest_encoding(content: bytes, broken: Lines) -> str:
    """Return the advice to convert a file, from the encoding that its broken lines look like."""
    sample = "\n".join(line for _, line in broken)[:20_000].encode("utf-8", "surrogateescape")
    western = (name for name in ("mac_roman", "cp850") if _looks_right(content.decode(name)))
    guess = from_bytes(sample).best()
    # Of guesses for Latin scripts, only these are good.
    is_good = guess and (guess.encoding in ("cp1250", "iso8859_2") or re.search("[\u0370-\U0010ffff]", str(guess)))
    name = next(western, guess.encoding if guess and is_good else "")
    which = f"It may be {name}; if so, c" if name else "C"
    known_to_iconv = "MACINTOSH" if name == "mac_roman" else name.upper().replace("_", "-") or "ENCODING"
    return f" {which}onvert the file: iconv -f {known_to_iconv} -t UTF-8."
