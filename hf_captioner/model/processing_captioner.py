"""The processor of a captioner, which turns images into pixel values, captions into labels, and ids into captions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, TextKwargs

from .captions import build_tokenizer
from .folder_check import check_folder, one_line_errors
from .image_processing_captioner import CaptionerImageProcessor
from .images import ImageSource
from .objectives import IGNORED, words_before

# B: images, K: captions of an image, T: ids of a caption, <end> included, H: height, W: width

# Arguments of a tokenizer that are obeyed, and values of others that change nothing.
TEXT_ARGUMENTS = ("padding", "truncation", "max_length", "add_special_tokens", "pad_to_multiple_of")
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "return_tensors": (None, "pt", "np"),
    "return_attention_mask": (None, True),
    "padding_side": (None, "right"),
    "verbose": (None, True, False),
    "stride": (None, 0),
}
Captions = str | Sequence[str] | Sequence[Sequence[str]]


class CaptionerProcessor(ProcessorMixin):
    """Image processor and tokenizer of a captioner, which are saved to and loaded from one folder.

    Args:
        image_processor: Usually a `CaptionerImageProcessor`.
        tokenizer: Usually from `build_tokenizer`. It must end each caption with its `eos_token`.
    """

    text_kwargs = {"padding": True, "return_tensors": "pt"}  # type: ignore[assignment]  # noqa: RUF012 (transformers')
    images_kwargs = {"return_tensors": "pt"}  # type: ignore[assignment]  # noqa: RUF012 (transformers')

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
        **kwargs: Unpack[ProcessingKwargs],  # type: ignore[misc]
    ) -> BatchFeature:
        """Turn images into pixel values, and captions into ids and labels; or prepare images with words to begin with.

        `generate()` of what is returned for images with text begins captions with the text, as other models of the task
        image-text-to-text do.

        Args:
            images: One image or a list of them, each of any kind that the image processor reads.
            text: One caption for each image, or a list of captions for each image; the lists may differ in length.
            kwargs: Arguments of the tokenizer and of the image processor, also as `text_kwargs={...}` and
                `images_kwargs={...}`. Of the former there are:

                - `padding`: True or `"longest"`, the default, to pad captions to the longest, `"max_length"` to pad
                  them to `max_length`, False to refuse captions of different lengths; `pad_to_multiple_of`.
                - `truncation`: Whether to cut captions with more than `max_length` ids. `<end>` is kept.
                - `max_length`: Number of ids of a caption, `<end>` included.
                - `add_special_tokens`: Whether to end each caption with `<end>`, the default.
                - `return_tensors`: `"pt"`, the default, or `"np"`.

        Returns:
            `pixel_values` `(B, 3, H, W)` if images are given. `labels` if text is given: `(B, T)` for one caption for
            each image, `(B, K, T)` for lists of at most K captions. Labels are -100 after the end of a caption and for
            captions that an image lacks. For one caption for each image, also `input_ids` `(B, T)`, the same with
            `<pad>` in place of -100, and `attention_mask`, 1 where a word is; and with images also
            `decoder_input_ids` `(B, T)`, `<start>` and all ids but the last: what is read for these labels, and the
            beginning of captions for `generate()`.

        Raises:
            TypeError: There is an unknown argument.
            ValueError: Neither images nor text is given, they differ in number, a caption is not a string or has no
                words, `max_length` does not fit, or an argument is of a kind that captions have no use for.
        """
        if images is None and text is None:
            raise ValueError("Neither images nor text is given; give at least one.")
        self._refuse_unknown(kwargs)
        merged = self._merge_kwargs(self.valid_processor_kwargs, self.tokenizer.init_kwargs, **kwargs)
        features: dict[str, Any] = {}
        if images is not None:
            features.update(self.image_processor(images, **{**merged["images_kwargs"], "return_tensors": "pt"}))
        if text is not None:
            features["labels"] = self._labels(text, **_text_arguments(merged["text_kwargs"]))
        if len({len(values) for values in features.values()}) > 1:
            raise ValueError(
                f"There are {len(features['pixel_values'])} images, but text for {len(features['labels'])}; "
                "give one caption, or one list of captions, for each image."
            )
        if text is not None and features["labels"].ndim == 2:
            start, pad = self.tokenizer.bos_token_id, self.tokenizer.pad_token_id
            is_word = features["labels"] != IGNORED
            features["input_ids"] = features["labels"].masked_fill(~is_word, pad)
            features["attention_mask"] = is_word.long()
            if images is not None:
                features["decoder_input_ids"] = words_before(features["labels"], start, pad)
        kind = "text_kwargs" if text is not None else "images_kwargs"
        return BatchFeature(features, tensor_type=merged[kind].get("return_tensors"))

    def _refuse_unknown(self, kwargs: Mapping[str, Any]) -> None:
        """Raise a TypeError for arguments that transformers would ignore with a warning."""
        known = {"common_kwargs"}.union(
            *(kind.__annotations__ for kind in (ProcessingKwargs, TextKwargs, ImagesKwargs)),
            self.image_processor.valid_kwargs.__annotations__,
        )
        if unknown := sorted(kwargs.keys() - known):
            raise TypeError(f"A captioner's processor has no argument {unknown[0]!r}.")

    def _labels(
        self, text: Captions, padding: bool | str, pad_to_multiple_of: int | None = None, **arguments: Any
    ) -> torch.Tensor:
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

        num_special = self.tokenizer.num_special_tokens_to_add() if arguments.get("add_special_tokens", True) else 0
        max_length = arguments.get("max_length")
        if max_length is not None and max_length <= num_special:
            raise ValueError(f"max_length is {max_length}; give at least {num_special + 1}, for a word.")
        ids = self.tokenizer(captions, **arguments).input_ids
        for (name, _, _), caption, caption_ids in zip(positions, captions, ids, strict=True):
            if len(caption_ids) <= num_special:
                raise ValueError(f"{name} is {caption!r}, which has no words; leave it out or fix it.")

        num_captions = 1 + max(index for _, _, index in positions)
        length = _padded_length(ids, padding, max_length)
        length += -length % (pad_to_multiple_of or 1)
        labels = torch.full((len(rows), num_captions, length), IGNORED)
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
        return ["pixel_values", "labels", "input_ids", "attention_mask", "decoder_input_ids"]


def _text_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of a tokenizer that are used, or raise a ValueError for one that can't be obeyed."""
    arguments = {"truncation": False} | {name: value for name, value in given.items() if name in TEXT_ARGUMENTS}
    arguments["padding"] = {"longest": True, "do_not_pad": False}.get(arguments["padding"], arguments["padding"])
    for name, value in given.items():
        if name not in TEXT_ARGUMENTS and value not in WITHOUT_EFFECT.get(name, (None, False)):
            raise ValueError(
                f"{name} is {value!r}, but the processor of a captioner pads and cuts captions at their end."
            )
    return arguments


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
