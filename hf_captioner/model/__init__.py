"""The captioner itself: all that goes to the Hub with a model. Importing it registers it with transformers."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_captioner import CaptionerConfig
from .image_processing_captioner import CaptionerImageProcessor
from .modeling_captioner import CaptionerModel
from .pipeline_captioner import ImageCaptioningPipeline
from .processing_captioner import CaptionerProcessor

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
