"""Image captioning with attention, integrated with transformers.

Importing this package registers the captioner with transformers' Auto classes and pipelines. It imports nothing heavy:
public names import their modules when they are first used, and the registration waits until transformers is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# Of `hf-captioner` and `python -m hf_captioner`, this is the first line that runs; the imports below take a while.
if sys.argv[:1] == ["-m"] or "hf-captioner" in "".join(sys.argv[:1]):
    from .interruption import end_at_ctrl_c

    end_at_ctrl_c()

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Registration:
    """Finder of modules that registers the captioner once transformers has been imported.

    It waits until transformers, or the module of `model/` that imports it, is complete: the registration imports all
    of `model/`, and could not import a module that is being imported.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return what Python would find without this, for a module whose import may import transformers."""
        if name != "transformers" and not name.startswith(f"{__name__}.model."):
            return None
        sys.meta_path.remove(self)  # what the module imports in turn is not waited for
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            try:
                execute(module)
            finally:
                if "transformers" not in sys.modules:
                    sys.meta_path.insert(0, self)
            if "transformers" in sys.modules:
                _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """Import the module that registers the captioner with transformers."""
    import_module(".model.registration", __name__)


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Registration())
