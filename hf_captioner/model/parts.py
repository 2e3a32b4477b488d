"""Looking up a captioner's parts by name, and building them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .registry import Registry


def find_part(registry: Registry, name: str, packages: Mapping[str, str] | None) -> Any:
    """Return the class or function that builds a part.

    Args:
        registry: Registry of the kind of part.
        name: Name of the part in it.
        packages: `CaptionerConfig.packages`. If the part is missing, the error names the package that provided it.

    Raises:
        ValueError: There is no such part, two packages claim its name, or it cannot be imported.
    """
    return registry.get(name, (packages or {}).get(f"{registry.kind}/{name}"))


def build_part(
    registry: Registry,
    name: str,
    packages: Mapping[str, str] | None,
    kwargs: Mapping[str, Any] | None,
    **sizes: Any,
) -> Any:
    """Build a part.

    Args:
        registry: Registry of the kind of part.
        name: Name of the part in it.
        packages: `CaptionerConfig.packages`, see `find_part`.
        kwargs: Arguments from the user, which must be among the part's other arguments.
        sizes: Arguments that follow from the configuration.

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
