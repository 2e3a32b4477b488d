"""Named parts: a table of built-ins plus what installed packages announce by entry points.

    python -m hf_captioner.model.registry             # all parts, with where each comes from
    python -m hf_captioner.model.registry attentions  # one kind

Standard library only, so that naming a part never imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

Part = TypeVar("Part")

# Where the registry of each kind is.


class Registry:
    """One kind of part, by name.

    A name resolves, in this order of registration, to an object given to `register`, to a built-in
    (`"module:attribute"`, imported when first asked for) or to an entry point of the group
    `hf_captioner.<kind>`. Names go into checkpoints; import paths never do.

    Args:
        kind: plural noun for the parts, also the end of the entry-point group (`"encoders"`).
        builtins: name -> `"module:attribute"`.
    """

    def __init__(self, kind: str, builtins: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = f"hf_captioner.{kind}"
        self._parts: dict[str, Any] = {}
        self._builtins = dict(builtins)

    def register(self, name: str) -> Callable[[Part], Part]:
        """Decorator that adds a part under `name` for this process.

        Raises:
            ValueError: the name is taken.
        """

        def add(part: Part) -> Part:
            if name in self.names():
                raise ValueError(
                    f"The name {name!r} is already taken among the {self.kind} (by {self.origin(name)}). "
                    "Register the part under another name."
                )
            self._parts[name] = part
            return part

        return add

    @contextmanager
    def temporarily(self, name: str, part: Any) -> Iterator[str]:
        """Register a part for as long as the `with` block lasts."""
        self.register(name)(part)
        try:
            yield name
        finally:
            del self._parts[name]

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted({*self._parts, *self._builtins, *self._plugins()})

    def origin(self, name: str) -> str:
        """Where a part comes from: `"registered in this process"`, a module of this package or a plug-in."""
        if name in self._parts:
            return "registered in this process"
        return " and ".join(self._claims(name))

    def package(self, name: str) -> str | None:
        """The installed package that provides a part; None for a built-in and what this process registered."""
        plugin = None if name in self._parts or name in self._builtins else self._plugins().get(name, [None])[0]
        return plugin.dist.name if plugin is not None and plugin.dist is not None else None

    def get(self, name: str, package: str | None = None) -> Any:
        """The part called `name`.

        Args:
            name: of the part.
            package: the package that is known to have provided it, to name if the part is missing.

        Raises:
            ValueError: no such part, a name claimed by two packages, or a plug-in that fails to import.
        """
        if name in self._parts:
            return self._parts[name]
        claims = self._claims(name)
        if not claims:
            known = f"{name!r} is not among the {self.kind}. Known: {', '.join(self.names())}."
            if package is not None:
                raise ValueError(f"{known} It came from the package {package!r}: install that, pip install {package}.")
            raise ValueError(
                f"{known} If another package provides it (entry-point group {self.group!r}), install that package."
            )
        if len(claims) > 1:
            raise ValueError(
                f"{name!r} of the {self.kind} is claimed by both {' and '.join(claims)}. "
                "Uninstall one of the packages, or ask its author for another name."
            )
        if name in self._builtins:
            return load(self._builtins[name])
        try:
            return self._plugins()[name][0].load()
        except (Exception, SystemExit) as e:
            raise ValueError(
                f"{name!r} of the {self.kind} ({claims[0]}) cannot be imported: {e}. Repair or uninstall that package."
            ) from e

    def problem(self, name: str) -> str | None:
        """Why a plug-in can't be used, None if it can: it is imported to find out, where built-ins are not."""
        if len(self._claims(name)) < 2 and name not in self._plugins():
            return None
        try:
            self.get(name)
        except ValueError as e:
            return str(e)
        return None

    def _claims(self, name: str) -> list[str]:
        """Where a name leads: one place, unless it is unknown or taken twice."""
        builtin = [self._builtins[name]] if name in self._builtins else []
        plugins = self._plugins().get(name, [])
        return builtin + [f"{point.value} of {point.dist.name if point.dist else 'no package'}" for point in plugins]

    def _plugins(self) -> dict[str, list[EntryPoint]]:
        """Entry points by name; the same one found twice, as in two places of `sys.path`, counts once."""
        plugins: dict[str, list[EntryPoint]] = {}
        for point in _entry_points(self.group, tuple(sys.path)):
            points = plugins.setdefault(point.name, [])
            if point.value not in [other.value for other in points]:
                points.append(point)
        return plugins


@cache
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Those of a group, looked for once in what was then `sys.path`: to scan all packages takes milliseconds."""
    return tuple(entry_points(group=group))


def load(place: str) -> Any:
    """What `"module:attribute"` means."""
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)
