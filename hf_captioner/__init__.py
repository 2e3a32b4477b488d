"""Image captioning with attention, at home in the Hugging Face ecosystem.

Importing this package registers the captioner with transformers' Auto classes and pipelines.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .captions import build_tokenizer
from .configuration_captioner import CaptionerConfig
from .data import load_captions
from .hub import push
from .image_processing_captioner import CaptionerImageProcessor
from .images import open_image
from .modeling_captioner import CaptionerModel, CaptionerOutput
from .pipeline_captioner import ImageCaptioningPipeline
from .processing_captioner import CaptionerProcessor

__version__ = "0.1.0"

__all__ = [
    "CaptionerConfig",
    "CaptionerImageProcessor",
    "CaptionerModel",
    "CaptionerOutput",
    "CaptionerProcessor",
    "ImageCaptioningPipeline",
    "build_tokenizer",
    "load_captions",
    "open_image",
    "push",
]

AutoConfig.register(CaptionerConfig.model_type, CaptionerConfig)
AutoModel.register(CaptionerConfig, CaptionerModel)
AutoModelForImageTextToText.register(CaptionerConfig, CaptionerModel)
# One class for both of transformers' backends: under "pil" alone every load would warn that it falls back to it.
AutoImageProcessor.register(
    CaptionerConfig,
    image_processor_classes={"torchvision": CaptionerImageProcessor, "pil": CaptionerImageProcessor},
)
AutoProcessor.register(CaptionerConfig, CaptionerProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "image-captioning",
    pipeline_class=ImageCaptioningPipeline,
    pt_model=AutoModelForImageTextToText,
    type="multimodal",
)
