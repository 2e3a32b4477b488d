"""Named parts: a table of built-ins plus what installed packages announce by entry points.

Standard library only, so that listing parts never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

Part = TypeVar("Part")


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

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted({*self._parts, *self._builtins, *self._plugins()})

    def origin(self, name: str) -> str:
        """Where a part comes from: `"registered in this process"`, a module of this package or a plug-in."""
        if name in self._parts:
            return "registered in this process"
        if name in self._builtins:
            return self._builtins[name]
        plugin = self._plugins()[name]
        package = plugin.dist.name if plugin.dist else "an unnamed package"
        return f"{plugin.value} of {package}"

    def get(self, name: str) -> Any:
        """The part called `name`.

        Raises:
            ValueError: no such part, a name claimed by two packages, or a plug-in that fails to import.
        """
        if name in self._parts:
            return self._parts[name]
        if name in self._builtins:
            module, _, attribute = self._builtins[name].partition(":")
            return getattr(import_module(module), attribute)
        plugin = self._plugins().get(name)
        if plugin is None:
            raise ValueError(
                f"{name!r} is not among the {self.kind}. Known: {', '.join(self.names())}. "
                f"If another package provides it (entry-point group {self.group!r}), install that package."
            )
        try:
            return plugin.load()
        except Exception as e:
            raise ValueError(
                f"{name!r} of the {self.kind} ({self.origin(name)}) cannot be imported: {e}. "
                "Repair or uninstall that package."
            ) from e

    def _plugins(self) -> dict[str, EntryPoint]:
        plugins: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            earlier = plugins.get(point.name)
            claimed_twice = earlier is not None and earlier.value != point.value
            if claimed_twice or point.name in self._builtins:
                rival = earlier.value if earlier is not None else self._builtins[point.name]
                raise ValueError(
                    f"{point.name!r} of the {self.kind} is claimed by both {rival} and {point.value}. "
                    "Uninstall one of the packages, or ask its author for another name."
                )
            plugins[point.name] = point
        return plugins
