"""Registries of parts by name: parts of this package, and those that installed packages announce by entry points.

A part is a named component of one kind: an encoder, an attention, a decoder, a data set or a metric.

It needs the standard library alone, and parts are imported only when they are used. `hf-captioner parts` lists them.
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


class Registry:
    """Registry of the parts (named components) of one kind.

    A name stands for an object given to `register`, for a built-in part or for an entry point of the group
    `hf_captioner.<kind>`. Checkpoints hold names and never import paths.

    Args:
        kind: Plural noun for the parts, which is also the end of the entry-point group (`"encoders"`).
        builtins: Where each built-in part is, `"module:attribute"`, by name.
    """

    def __init__(self, kind: str, builtins: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = f"hf_captioner.{kind}"
        self._parts: dict[str, Any] = {}
        self._builtins = dict(builtins)

    def register(self, name: str) -> Callable[[Part], Part]:
        """Return a decorator that adds a part under `name`, in this process alone.

        Raises:
            ValueError: The name is taken.
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
        """Register a part within the `with` block; yield its name."""
        self.register(name)(part)
        try:
            yield name
        finally:
            del self._parts[name]

    def names(self) -> list[str]:
        """Return all known names, sorted."""
        return sorted({*self._parts, *self._builtins, *self._plugins()})

    def origin(self, name: str) -> str:
        """Return where a part comes from: a module of this package, a plug-in, or `"registered in this process"`."""
        if name in self._parts:
            return "registered in this process"
        return " and ".join(self._claims(name))

    def package(self, name: str) -> str | None:
        """Return the installed package that provides a part; None for built-in parts and those of this process."""
        plugin = None if name in self._parts or name in self._builtins else self._plugins().get(name, [None])[0]
        return plugin.dist.name if plugin is not None and plugin.dist is not None else None

    def get(self, name: str, package: str | None = None) -> Any:
        """Return a part, and import it if that has not been done.

        Args:
            name: Name of the part.
            package: Package that once provided the part, which the error names if there is no such part.

        Raises:
            ValueError: There is no such part, two packages claim its name, or it can't be imported.
        """
        if name in self._parts:
            return self._parts[name]
        claims = self._claims(name)
        if not claims:
            known = f"{name!r} is not among the {self.kind}. Known: {', '.join(self.names())}."
            if package is not None:
                raise ValueError(f"{known} It came from the package {package!r}: pip install {package}.")
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
        """Return why a part can't be used, None if it can. A plug-in is imported to find out, a built-in is not."""
        if len(self._claims(name)) < 2 and name not in self._plugins():
            return None
        try:
            self.get(name)
        except ValueError as e:
            return str(e)
        return None

    def _claims(self, name: str) -> list[str]:
        """Return where parts of this name come from: one place, none for an unknown name, several for a conflict."""
        builtin = [self._builtins[name]] if name in self._builtins else []
        plugins = self._plugins().get(name, [])
        return builtin + [f"{point.value} of {point.dist.name if point.dist else 'no package'}" for point in plugins]

    def _plugins(self) -> dict[str, list[EntryPoint]]:
        """Return the entry points by name. The same one found twice, as in two folders of `sys.path`, counts once."""
        plugins: dict[str, list[EntryPoint]] = {}
        for point in _entry_points(self.group, tuple(sys.path)):
            points = plugins.setdefault(point.name, [])
            if point.value not in [other.value for other in points]:
                points.append(point)
        return plugins


@cache
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group. They are remembered for each `sys.path`, as scanning packages is slow."""
    return tuple(entry_points(group=group))


def load(location: str) -> Any:
    """Import and return the object at `"module:attribute"`."""
    module, _, attribute = location.partition(":")
    return getattr(import_module(module), attribute)
