"""Look-up by name and construction of a captioner's parts: its encoder, attention and decoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .registry import Registry


def find_part(registry: Registry, name: str, packages: Mapping[str, str] | None) -> Any:
    """Return the class of a part, given `CaptionerConfig.packages`.

    Raises:
        ValueError: The part is not installed; the message names the package that provides it, if `packages` does.
    """
    return registry.get(name, (packages or {}).get(f"{registry.kind}/{name}"))


def build_part(
    registry: Registry, name: str, packages: Mapping[str, str] | None, kwargs: Mapping[str, Any] | None, **sizes: Any
) -> Any:
    """Build a part with the sizes that the configuration determines and the user's own arguments `kwargs`.

    Raises:
        ValueError: The part does not take one of the user's arguments, or cannot be found.
    """
    part, kwargs = find_part(registry, name, packages), kwargs or {}
    parameters = inspect.signature(part).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    allowed = [parameter for parameter in parameters if parameter not in sizes]
    if unknown := kwargs.keys() & sizes.keys() if takes_any else kwargs.keys() - allowed:
        raise ValueError(
            f"{name!r} of the {registry.kind} does not take {', '.join(map(repr, sorted(unknown)))} as "
            f"{registry.kind.removesuffix('s')}_kwargs, but {', '.join(allowed) or 'nothing'}."
        )
    return part(**sizes, **kwargs)
