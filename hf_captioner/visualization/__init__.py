"""Pictures of what a captioner says and where it looks, as figures, an animation and a web page."""

from .figures import attention_figure, captions_figure, curves_figure
from .overlay import attention_animation, attention_overlay
from .page import attention_page

__all__ = [
    "attention_animation",
    "attention_figure",
    "attention_overlay",
    "attention_page",
    "captions_figure",
    "curves_figure",
]
