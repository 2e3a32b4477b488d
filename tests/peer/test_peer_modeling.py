"""transformers' common tests of models and of their configurations, on captioners."""

from __future__ import annotations

import copy
import unittest
from typing import Any

import torch
from tiny import IMAGE_SIZE, NUM_IMAGES, tiny_config, tiny_images, tiny_words
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

from hf_captioner import CaptionerConfig, CaptionerModel


class CaptionerTester:
    """Configurations and inputs, as the mixin asks for them."""

    batch_size, image_size, is_training = NUM_IMAGES, IMAGE_SIZE, True
    seq_length, hidden_size, num_hidden_layers, expected_num_hidden_layers = 5, 96, 1, 1
    encoder_seq_length = 4  # image cells

    def get_config(self) -> CaptionerConfig:
        return tiny_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[CaptionerConfig, dict[str, Any]]:
        config = self.get_config()
        return config, {"pixel_values": tiny_images(), "input_ids": tiny_words(config)}


class CaptionerModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (CaptionerModel,)
    is_encoder_decoder = True
    has_attentions = False  # a recurrent decoder has cross-attention alone, and its encoder may have none

    def setUp(self) -> None:
        self.model_tester = CaptionerTester()
        self.config_tester = ConfigTester(
            self, config_class=CaptionerConfig, has_text_modality=False, common_properties=["hidden_size", "vocab_size"]
        )

    @unittest.skip("encoder and decoder stand side by side; there is no base model below a head")
    def test_model_base_model_prefix(self) -> None: ...

    @unittest.skip("timm initialises the weights of the encoder, which this test leaves out for TimmWrapper, too")
    def test_can_init_all_missing_weights(self) -> None: ...

    @unittest.skip("a folder that lacks weights is refused unless ignore_mismatched_sizes is set")
    def test_model_weights_reload_no_missing_tied_weights(self) -> None: ...

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False) -> Any:
        inputs_dict = copy.deepcopy(inputs_dict)
        if return_labels:
            inputs_dict["labels"] = torch.full((NUM_IMAGES, 5), 4)
        return inputs_dict
