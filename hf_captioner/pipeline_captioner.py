"""The `image-captioning` pipeline: photographs in, captions out, with the attention that chose each word."""

from __future__ import annotations

from typing import Any

from transformers import Pipeline


class ImageCaptioningPipeline(Pipeline):
    """Captions of photographs."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True

    def _sanitize_parameters(self, generate_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        return {}, {"generate_kwargs": {**(generate_kwargs or {}), **kwargs}}, {}

    def preprocess(self, image: Any) -> Any:
        """Open an image."""
        return self.processor(images=image)

    def _forward(self, inputs: Any, generate_kwargs: dict[str, Any]) -> Any:
        return {"sequences": self.model.generate(**inputs, **generate_kwargs)}

    def postprocess(self, outputs: Any) -> list[dict[str, Any]]:
        """Words of a caption."""
        return [{"generated_text": text} for text in self.processor.batch_decode(outputs["sequences"])]
