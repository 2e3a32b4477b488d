"""Image captioning with attention, integrated with transformers.

Importing this package registers the captioner with transformers' Auto classes and pipelines. It imports nothing heavy:
public names import their modules when they are first used, and the registration waits until transformers is imported.
"""

import sys
from importlib import import_module

# Of `hf-captioner` and `python -m hf_captioner`, this is the first line that runs; the imports below take a while.
if sys.argv[:1] == ["-m"] or "hf-captioner" in "".join(sys.argv[:1]):
    from .interruption import end_at_ctrl_c

    end_at_ctrl_c()

import lazy_loader
from wrapt import when_imported

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@when_imported("transformers")
def _register(_: object) -> None:
    """Import the package that registers the captioner with transformers."""
    import_module(".model", __name__)
