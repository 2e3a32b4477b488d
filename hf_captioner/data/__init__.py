"""Data sets of captioned images, from files to batches."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"collator": ["CaptionCollator"], "rows": ["undecoded"]}
)
