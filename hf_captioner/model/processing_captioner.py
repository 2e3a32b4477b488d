"""What a captioner takes and gives: photographs and captions in, pixels and labels out, ids back to words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from .captions import build_tokenizer
from .image_processing_captioner import CaptionerImageProcessor
from .images import ImageSource
from .objectives import IGNORED

# B: images, K: captions of an image, T: words of a caption with <end>, H: height, W: width

Captions = str | Sequence[str] | Sequence[Sequence[str]]


class CaptionerProcessor(ProcessorMixin):
    """The image processor and the tokenizer of a captioner, saved to and loaded from one folder.

    Args:
        image_processor: usually a `CaptionerImageProcessor`.
        tokenizer: usually from `build_tokenizer`; must close a caption with its `eos_token`.
    """

    def __init__(self, image_processor: CaptionerImageProcessor, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(image_processor, tokenizer)  # type: ignore[no-untyped-call]

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], data_config: Mapping[str, Any], *, min_count: int = 5
    ) -> CaptionerProcessor:
        """Build a processor for a training split and a timm encoder.

        Args:
            captions: captions of the training split only, for `build_tokenizer`.
            data_config: what `timm.data.resolve_model_data_config(model)` returns.
            min_count: how often a word must occur to get an id of its own.

        Raises:
            ValueError: see `build_tokenizer` and `CaptionerImageProcessor.from_data_config`.
        """
        image_processor = CaptionerImageProcessor.from_data_config(data_config)
        return cls(image_processor, build_tokenizer(captions, min_count=min_count))

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource] | None = None,
        text: Captions | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Turn images into pixel values and their captions, if given, into labels.

        Args:
            images: one image or a list of them, each anything that `open_image` reads.
            text: one caption an image, or a list of captions an image, not necessarily equally many.
            return_tensors: `"pt"` or `"np"`.

        Returns:
            `pixel_values` `(B, 3, H, W)` if there are images. `labels` if there is text: `(B, T)` for one
            caption an image, `(B, K, T)` for lists of at most K; -100 after the end of a caption and in the
            rows of the captions that an image does not have.

        Raises:
            ValueError: nothing is given, images and text differ in number, or a caption is not a string or
                has no words.
        """
        if images is None and text is None:
            raise ValueError("Neither images nor text is given; give at least one.")
        features: dict[str, Any] = {}
        if images is not None:
            features.update(self.image_processor(images))
        if text is not None:
            features["labels"] = self._labels(text)
        if len({len(values) for values in features.values()}) > 1:
            raise ValueError(
                f"There are {len(features['pixel_values'])} images, but text for {len(features['labels'])}; "
                "give one caption, or one list of captions, an image."
            )
        return BatchFeature(features, tensor_type=return_tensors)

    def _labels(self, text: Captions) -> torch.Tensor:
        rows = [text] if isinstance(text, str) else list(text)
        single = bool(rows) and isinstance(rows[0], str)
        places, captions = [], []
        for image, row in enumerate(rows):
            if not isinstance(row, str if single else list | tuple):
                raise ValueError(f"text[{image}] is {row!r}; give strings only, or lists of strings only.")
            for index, caption in enumerate([row] if single else row):
                name = f"text[{image}]" if single else f"text[{image}][{index}]"
                if not isinstance(caption, str):
                    raise ValueError(f"{name} is {caption!r}; a caption must be a string.")
                places.append((name, image, index))
                captions.append(caption)
        if not captions:
            raise ValueError("text has no captions; give at least one, or None for images alone.")

        ids = self.tokenizer(captions).input_ids
        num_captions = 1 + max(index for _, _, index in places)
        labels = torch.full((len(rows), num_captions, max(map(len, ids))), IGNORED)
        for (name, image, index), caption, caption_ids in zip(places, captions, ids, strict=True):
            if len(caption_ids) <= self.tokenizer.num_special_tokens_to_add():
                raise ValueError(f"{name} is {caption!r}, which has no words; leave it out or mend it.")
            labels[image, index, : len(caption_ids)] = torch.tensor(caption_ids)
        return labels[:, 0] if single else labels

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """Turn the ids of one caption, `(T,)`, into words joined by spaces, special tokens left out."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs))

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """Turn the ids of several captions, `(B, T)`, into captions; see `decode`."""
        return list(self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs))

    @property
    def model_input_names(self) -> list[str]:
        """Names of what `__call__` returns."""
        return ["pixel_values", "labels"]
