"""Registration of the captioner with transformers' Auto classes and pipelines, by importing this module."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .. import __version__
from ..pretrained import PHOTOGRAPHS
from .configuration_captioner import CaptionerConfig
from .image_processing_captioner import CaptionerImageProcessor
from .modeling_captioner import CaptionerModel
from .pipeline_captioner import ImageCaptioningPipeline
from .processing_captioner import CaptionerProcessor

AutoConfig.register(CaptionerConfig.model_type, CaptionerConfig)
AutoModel.register(CaptionerConfig, CaptionerModel)
AutoModelForImageTextToText.register(CaptionerConfig, CaptionerModel)
# The same class for both backends of transformers: with "pil" alone, every load would warn of a fallback.
AutoImageProcessor.register(
    CaptionerConfig, image_processor_classes={"torchvision": CaptionerImageProcessor, "pil": CaptionerImageProcessor}
)
AutoProcessor.register(CaptionerConfig, CaptionerProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "image-captioning",
    pipeline_class=ImageCaptioningPipeline,
    pt_model=AutoModelForImageTextToText,
    default={"model": (PHOTOGRAPHS, __version__)},
    type="multimodal",
)
