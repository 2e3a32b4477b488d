"""Fonts that have the characters of a caption, in whatever language it is."""

from __future__ import annotations

from functools import cache

# Matplotlib brings the first, which has many alphabets. The others come with operating systems.
FAMILIES = (
    "DejaVu Sans",
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Source Han Sans JP", "IPAexGothic"),
    *("IPAGothic", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Hiragino Sans", "PingFang SC"),
    *("Yu Gothic", "MS Gothic", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS", "Leelawadee UI", "Nirmala UI"),
    *("Noto Sans Thai", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Khmer", "Noto Sans Myanmar"),
)


def families() -> list[str]:
    """The families that are installed, in the order in which they are asked for a character."""
    from matplotlib.font_manager import fontManager

    installed = {entry.name for entry in fontManager.ttflist}
    return [name for name in FAMILIES if name in installed]


@cache
def _characters(file: str) -> frozenset[int]:
    from matplotlib.font_manager import get_font

    return frozenset(get_font(file).get_charmap())


def font_file(text: str) -> str:
    """The file of the first font that has most characters of a text."""
    from matplotlib.font_manager import findfont

    wanted = {ord(character) for character in text if not character.isspace()}
    files = [findfont(name) for name in families()]
    return max(files, key=lambda file: len(wanted & _characters(file)))
