"""What is wrong with a data set on disk: said where it can be mended, else refused, or on request left out and said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

NAMES_SHOWN = 10


class Damage:
    """Collects what readers of data sets come upon.

    Args:
        report: called with a line for each kind of damage.
        skip_broken: leave out what can't be read, naming each, rather than refuse the data set.
        names_shown: most names in a line; None for all.
    """

    def __init__(
        self, report: Callable[[str], None] = print, *, skip_broken: bool = False, names_shown: int | None = NAMES_SHOWN
    ) -> None:
        self.report, self.skip_broken, self.names_shown = report, skip_broken, names_shown
        self._mended: dict[str, list[str]] = {}

    def mended(self, kind: str, name: str) -> None:
        """Something is wrong with `name` that does no harm as it is handled; `tell` says it."""
        self._mended.setdefault(kind, []).append(name)

    def broken(self, problem: str) -> None:
        """Something can't be used.

        Raises:
            ValueError: unless broken things are to be skipped.
        """
        if not self.skip_broken:
            raise ValueError(f"{problem} Mend it, or go on without it with --skip-broken (skip_broken=True).")
        self.report(f"Left out: {problem}")

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """What raises a ValueError in this block is broken."""
        try:
            yield
        except ValueError as e:
            self.broken(str(e))

    def tell(self) -> None:
        """Report what was mended since the last time, a line for each kind."""
        for kind, names in self._mended.items():
            self.report(f"{kind}: {len(names)} ({listed(names, self.names_shown)}).")
        self._mended.clear()


def listed(names: list[str], limit: int | None = NAMES_SHOWN) -> str:
    """Names in a line, the last ones counted."""
    shown = names if limit is None else names[:limit]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
