"""Damage of a data set on disk: reported where readers can repair it, otherwise refused or, on request, left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...errors import shortened_message

NAMES_SHOWN = 10
LONGEST_NAME = 200  # characters of a name in a message

logger = logging.getLogger(__name__)


class RefusedError(ValueError):
    """Error of a reader that has refused something broken, with the advice what to do about it."""


class Damage:
    """Collector of the damage that readers of a data set find; it reports the damage, or refuses it by an error.

    Args:
        report: Function that is called with a line for each kind of damage.
        skip_broken: Leave out and report what can't be read, instead of raising an error.
        names_shown: Largest number of names in one line; None for no limit.
    """

    def __init__(
        self,
        report: Callable[[str], None] = logger.warning,
        *,
        skip_broken: bool = False,
        names_shown: int | None = NAMES_SHOWN,
    ) -> None:
        self.report, self.skip_broken, self.names_shown = report, skip_broken, names_shown
        self._repairs: dict[str, list[str]] = {}

    def repaired(self, kind: str, name: str) -> None:
        """Record damage of some kind that was repaired in the named file, line or image; see `report_repairs`."""
        self._repairs.setdefault(printable(kind), []).append(printable(name))

    def report_repairs(self) -> None:
        """Pass the repairs since the last call to `report`, by default the log, in one line for each kind."""
        for kind, names in self._repairs.items():
            self.report(f"{kind}: {len(names)} ({join_names(names, self.names_shown)}).")
        self._repairs.clear()

    def broken(self, problem: str) -> None:
        """Report something unusable, which the reader then leaves out; raise a ValueError if `skip_broken` is False."""
        problem = printable(problem)
        if not self.skip_broken:
            raise RefusedError(f"{problem} Fix it, or go on without it with --skip_broken (skip_broken=True).")
        self.report(f"Left out: {problem}")

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Pass the message of a ValueError that is raised within this context to `broken`."""
        try:
            yield
        except RefusedError:
            raise
        except ValueError as e:
            self.broken(str(e))


@contextmanager
def located(location: str) -> Iterator[None]:
    """Put the location before the message of a ValueError that is raised within this context."""
    try:
        yield
    except RefusedError:
        raise
    except ValueError as e:
        raise ValueError(f"{location}: {printable(str(e))}") from e


def printable(text: str) -> str:
    """Return a text for a message: in one line, without the middle of a very long one.

    Line breaks, control characters and halves of characters are escaped.
    """
    text = shortened_message(text)
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def shortened(name: str) -> str:
    """Return a name in quotes for a message; the end of a very long one, such as a data URI, is left out."""
    quoted = repr(name[: LONGEST_NAME + 1])  # a character may take several here
    return quoted if len(quoted) <= LONGEST_NAME else f"{quoted[:LONGEST_NAME]}…{quoted[0]} ({len(name)} characters)"


def join_names(names: list[str], limit: int | None = NAMES_SHOWN) -> str:
    """Join at most `limit` names with commas, and say how many more there are."""
    shown = names if limit is None else names[:limit]
    num_more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {num_more} more" if num_more else "")
