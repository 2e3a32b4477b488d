from .data.collator import CaptionCollator as CaptionCollator
from .data.datasets import DATASETS as DATASETS
from .data.datasets import load_captions as load_captions
from .data.rows import undecoded as undecoded
from .metrics import METRICS as METRICS
from .metrics import caption_metrics as caption_metrics
from .model.attentions import ATTENTIONS as ATTENTIONS
from .model.captions import bad_endings as bad_endings
from .model.captions import build_tokenizer as build_tokenizer
from .model.configuration_captioner import CaptionerConfig as CaptionerConfig
from .model.decoders import DECODERS as DECODERS
from .model.encoder_model import CaptionerEncoderOutput as CaptionerEncoderOutput
from .model.encoders import ENCODERS as ENCODERS
from .model.guided_decoding import constrained_beam_search as constrained_beam_search
from .model.guided_decoding import diverse_beam_search as diverse_beam_search
from .model.image_processing_captioner import CaptionerImageProcessor as CaptionerImageProcessor
from .model.images import open_image as open_image
from .model.model_outputs import CaptionerOutput as CaptionerOutput
from .model.model_outputs import CaptionerScores as CaptionerScores
from .model.modeling_captioner import CaptionerModel as CaptionerModel
from .model.onnx_runner import OnnxCaptioner as OnnxCaptioner
from .model.pipeline_captioner import ImageCaptioningPipeline as ImageCaptioningPipeline
from .model.processing_captioner import CaptionerProcessor as CaptionerProcessor
from .pretrained import PHOTOGRAPHS as PHOTOGRAPHS
from .publishing.hub import export_folder as export_folder
from .publishing.hub import push as push

__version__: str
