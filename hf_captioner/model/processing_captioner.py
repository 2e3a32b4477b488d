"""The processor of a captioner, which turns images into pixel values, captions into labels, and ids into captions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from .captions import build_tokenizer
from .folder_check import check_folder, one_line_errors
from .image_processing_captioner import CaptionerImageProcessor
from .images import ImageSource
from .objectives import IGNORED, words_before

# B: images, K: captions of an image, T: ids of a caption, <end> included, H: height, W: width

Captions = str | Sequence[str] | Sequence[Sequence[str]]


class CaptionerProcessor(ProcessorMixin):
    """Image processor and tokenizer of a captioner, which are saved to and loaded from one folder.

    Args:
        image_processor: Usually a `CaptionerImageProcessor`.
        tokenizer: Usually from `build_tokenizer`. It must end each caption with its `eos_token`.
    """

    def __init__(self, image_processor: CaptionerImageProcessor, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(image_processor, tokenizer)  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a processor from a folder or the Hub, as `ProcessorMixin.from_pretrained` does, safely.

        Raises:
            ValueError: The folder is damaged, or names what a captioner doesn't need; see `check_folder`.
            OSError: There is no such folder, or no processor in it.
        """
        check_folder(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        with one_line_errors(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], data_config: Mapping[str, Any], *, min_count: int = 5
    ) -> CaptionerProcessor:
        """Build a processor from captions of the training split only and from `resolve_model_data_config` of timm.

        A word gets an id of its own if it occurs at least `min_count` times.

        Raises:
            ValueError: See `build_tokenizer` and `CaptionerImageProcessor.from_data_config`.
        """
        image_processor = CaptionerImageProcessor.from_data_config(data_config)
        return cls(image_processor, build_tokenizer(captions, min_count=min_count))

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource] | None = None,
        text: Captions | None = None,
        *,
        padding: bool | str = True,
        truncation: bool | str = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Turn images into pixel values, and captions into labels; or prepare images with words to begin with.

        `generate()` of what is returned for images with text begins captions with the text, as other models of the task
        image-text-to-text do.

        Args:
            images: One image or a list of them, each of any kind that `open_image` reads.
            text: One caption for each image, or a list of captions for each image; the lists may differ in length.
            padding: True or `"longest"` to pad labels to the longest caption with -100, `"max_length"` to pad them to
                `max_length`, False to refuse captions of different lengths.
            truncation: Whether to cut captions with more than `max_length` ids. `<end>` is kept.
            max_length: Number of ids of a caption for `truncation` and `padding="max_length"`, `<end>` included.
            add_special_tokens: Whether to end each caption with `<end>`.
            return_tensors: `"pt"` or `"np"`.

        Returns:
            `pixel_values` `(B, 3, H, W)` if images are given. `labels` if text is given: `(B, T)` for one caption for
            each image, `(B, K, T)` for lists of at most K captions. Labels are -100 after the end of a caption and for
            captions that an image lacks. With both, and one caption for each image, also `decoder_input_ids` `(B, T)`,
            `<start>` and all ids but the last: what is read for these labels, and the beginning of captions for
            `generate()`.

        Raises:
            ValueError: Neither images nor text is given, they differ in number, a caption is not a string or has no
                words, or `max_length` does not fit.
        """
        if images is None and text is None:
            raise ValueError("Neither images nor text is given; give at least one.")
        features: dict[str, Any] = {}
        if images is not None:
            features.update(self.image_processor(images))
        if text is not None:
            arguments = {"truncation": truncation, "max_length": max_length, "add_special_tokens": add_special_tokens}
            features["labels"] = self._labels(text, padding, **arguments)
        if len({len(values) for values in features.values()}) > 1:
            raise ValueError(
                f"There are {len(features['pixel_values'])} images, but text for {len(features['labels'])}; "
                "give one caption, or one list of captions, for each image."
            )
        if len(features) == 2 and features["labels"].ndim == 2:
            start, pad = self.tokenizer.bos_token_id, self.tokenizer.pad_token_id
            features["decoder_input_ids"] = words_before(features["labels"], start, pad)
        return BatchFeature(features, tensor_type=return_tensors)

    def _labels(self, text: Captions, padding: bool | str, **arguments: Any) -> torch.Tensor:
        """Return the labels of captions, see `__call__`; `arguments` are passed to the tokenizer."""
        rows = [text] if isinstance(text, str) else list(text)
        is_single = bool(rows) and isinstance(rows[0], str)
        positions, captions = [], []
        for image, row in enumerate(rows):
            if not isinstance(row, str if is_single else list | tuple):
                raise ValueError(f"text[{image}] is {row!r}; give strings only, or lists of strings only.")
            for index, caption in enumerate([row] if is_single else row):
                name = f"text[{image}]" if is_single else f"text[{image}][{index}]"
                if not isinstance(caption, str):
                    raise ValueError(f"{name} is {caption!r}; a caption must be a string.")
                positions.append((name, image, index))
                captions.append(caption)
        if not captions:
            raise ValueError("text has no captions; give at least one, or None for images alone.")

        num_special = self.tokenizer.num_special_tokens_to_add() if arguments["add_special_tokens"] else 0
        max_length = arguments["max_length"]
        if max_length is not None and max_length <= num_special:
            raise ValueError(f"max_length is {max_length}; give at least {num_special + 1}, for a word.")
        ids = self.tokenizer(captions, **arguments).input_ids
        for (name, _, _), caption, caption_ids in zip(positions, captions, ids, strict=True):
            if len(caption_ids) <= num_special:
                raise ValueError(f"{name} is {caption!r}, which has no words; leave it out or fix it.")

        num_captions = 1 + max(index for _, _, index in positions)
        labels = torch.full((len(rows), num_captions, _padded_length(ids, padding, max_length)), IGNORED)
        for (_, image, index), caption_ids in zip(positions, ids, strict=True):
            labels[image, index, : len(caption_ids)] = torch.tensor(caption_ids)
        return labels[:, 0] if is_single else labels

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """Turn the ids of one caption, `(T,)`, into text, by default without special tokens."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs))

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """Turn the ids of several captions, `(N, T)`, into text; see `decode`."""
        return list(self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs))

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call returns."""
        return ["pixel_values", "labels", "decoder_input_ids"]


def _padded_length(ids: Sequence[Sequence[int]], padding: bool | str, max_length: int | None) -> int:
    """Return the length T to which labels are padded; raise a ValueError if `padding` and `max_length` forbid it."""
    longest = max(map(len, ids))
    if padding == "max_length":
        if max_length is None or max_length < longest:
            raise ValueError(
                f"padding is 'max_length', and max_length is {max_length}, but a caption has {longest} ids; give "
                "a larger max_length, or truncation=True."
            )
        return max_length
    if padding not in (True, False, "longest"):
        raise ValueError(f"padding is {padding!r}; choose from True, 'longest', 'max_length' and False.")
    if not padding and longest > min(map(len, ids)):
        raise ValueError("The captions differ in length and padding is False; use padding=True.")
    return longest
