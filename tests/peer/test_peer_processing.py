"""transformers' common tests of processors and image processors, on those of captioners."""

from __future__ import annotations

import unittest
from typing import Any

from tiny import CAPTIONS, IMAGE_SIZE
from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from transformers_tests.test_processing_common import ProcessorTesterMixin

from hf_captioner import CaptionerImageProcessor, CaptionerProcessor, build_tokenizer


class CaptionerImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent: Any, **kwargs: Any) -> None:
        kwargs.setdefault("size", {"height": 18, "width": 24})
        kwargs.setdefault("image_mean", [0.5, 0.4, 0.3])
        kwargs.setdefault("image_std", [0.5, 0.5, 0.5])
        super().__init__(parent, max_resolution=80, **kwargs)

    def _get_image_processing_classes(self) -> dict[str, Any]:
        return {"torchvision": CaptionerImageProcessor}


class CaptionerImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = CaptionerImageProcessingTester

    @unittest.skip("a captioner takes RGB: images with four channels are made RGB or refused")
    def test_call_numpy_4_channels(self) -> None: ...


class CaptionerProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = CaptionerProcessor

    @classmethod
    def _setup_image_processor(cls) -> CaptionerImageProcessor:
        return CaptionerImageProcessor({"height": IMAGE_SIZE, "width": IMAGE_SIZE})

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return build_tokenizer(CAPTIONS, min_count=1)

    @unittest.skip("captions are decoded without special tokens unless these are asked for")
    def test_tokenizer_decode_defaults(self) -> None: ...

    @unittest.skip("every caption is of an image: a batch in which some texts have none is refused")
    def test_processor_text_has_no_visual(self) -> None: ...
