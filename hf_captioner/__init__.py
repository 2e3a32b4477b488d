"""Image captioning with attention, at home in the Hugging Face ecosystem.

Importing this package makes the captioner known to transformers' Auto classes and pipelines. Nothing heavy is imported
before it is used: public names load their modules when they are asked for, and the Auto classes learn of the captioner
as soon as transformers is imported.
"""

from importlib import import_module

import lazy_loader
from wrapt import when_imported

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@when_imported("transformers")
def _register(_: object) -> None:
    """Import the package that registers the captioner with transformers."""
    import_module(".model", __name__)
