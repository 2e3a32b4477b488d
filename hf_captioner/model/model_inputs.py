"""Checks of what a captioner is given: images, image cells, labels, and words to read or to begin with."""

# B: images, K: captions of an image, N = B·K: captions, T: words, V: vocabulary, P: image cells, C: channels of a cell

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_captioner import CaptionerConfig
from .objectives import IGNORED, words_before


def check_pixel_values(pixel_values: Any) -> Tensor:
    """Return pixel values if they are real numbers `(B, 3, H, W)` of at least one image.

    Raises:
        ValueError: They are something else.
    """
    if isinstance(pixel_values, Tensor) and pixel_values.is_floating_point() and pixel_values.ndim == 4:
        if pixel_values.shape[0] > 0:
            return pixel_values
        raise ValueError("pixel_values hold no image; give at least one.")
    raise ValueError(f"pixel_values are {_described(pixel_values)}; give those of processor(images=...), (B, 3, H, W).")


def in_precision_of(module: nn.Module, values: Tensor) -> Tensor:
    """Return values in the precision of a module's first floating-point weight, or as they are if it has none."""
    precisions = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return values.to(next(precisions, values.dtype))


def check_images(pixel_values: Any) -> None:
    """Check pixel values that captions are generated for; a value that is no number would spoil them silently.

    Raises:
        ValueError: They have another form, or some are infinite or no numbers.
    """
    is_finite = check_pixel_values(pixel_values).isfinite().flatten(1).all(1)  # (B,)
    if not is_finite.all():
        broken = (~is_finite).nonzero().flatten().tolist()
        raise ValueError(f"pixel_values of the images {broken} have infinite values or NaN; mend or leave them out.")


def check_cells(cells: Any, channels: int) -> Tensor:
    """Return image cells if they are real numbers `(B, P, C)` of at least one image, with C = `channels`.

    Raises:
        ValueError: They are something else.
    """
    if isinstance(cells, Tensor) and cells.is_floating_point() and cells.ndim == 3 and cells.shape[2] == channels:
        if cells.shape[0] > 0 and cells.shape[1] > 0:
            return cells
        raise ValueError("There are no image cells; give those of at least one image.")
    raise ValueError(f"Image cells are {_described(cells)}; give those of the encoder, (B, P, {channels}).")


def check_labels(labels: Any) -> Tensor:
    """Return labels as `int64` if they are integers `(B, T)` or `(B, K, T)`.

    Raises:
        ValueError: They are something else.
    """
    if not (isinstance(labels, Tensor) and labels.ndim in (2, 3) and labels.numel() and _holds_ids(labels)):
        raise ValueError(
            f"labels are {_described(labels)}; give word ids, (B, T) or (B, K, T), of processor(text=...)."
        )
    return labels.long()


def check_ids(ids: Any, config: CaptionerConfig) -> None:
    """Check words to read, `(N, T)`.

    Raises:
        ValueError: They are no integers `(N, T)`, or some are no ids of the vocabulary.
    """
    if not (isinstance(ids, Tensor) and ids.ndim == 2 and ids.numel() and _holds_ids(ids)):
        raise ValueError(f"decoder_input_ids are {_described(ids)}; give word ids (N, T), such as of the tokenizer.")
    # A compiler and an exporter can't look at values.
    if not torch.compiler.is_compiling() and bool(((ids < 0) | (ids >= config.vocab_size)).any()):
        _refuse_ids("decoder_input_ids", ids, config)


@dataclass(frozen=True)
class CaptionInputs:
    """Captions as `CaptionerModel.forward` was given them, brought into the form that a decoder reads.

    Args:
        words: Words to read, `(N, T)`.
        shape: `(N,)`, or `(B, K)` if captions were given by image.
        targets: Label of each word, `(N, T)`, -100 where there is none; None if only words to read were given.
        lengths: Number of words of each caption up to the last label that counts, `(N,)`.
        are_given: Whether the words were given, and not made from the labels.
    """

    words: Tensor
    shape: tuple[int, ...]
    targets: Tensor | None = None
    lengths: Tensor | None = None
    are_given: bool = True

    def check(self, num_images: int, config: CaptionerConfig) -> None:
        """Check that captions belong to images, and labels and words to the vocabulary.

        Raises:
            ValueError: There is another number of images, an id is not in the vocabulary, or no label counts.
        """
        num_captioned = self.shape[0]
        if num_captioned % num_images if self.targets is None else num_captioned != num_images:
            raise ValueError(f"There are {num_images} images, but captions for {num_captioned}; give as many of both.")
        if self.targets is not None:
            assert self.lengths is not None
            check_words(self.targets, self.words if self.are_given else None, self.lengths, config)


def read_captions(
    labels: Any, decoder_input_ids: Any, input_ids: Any, config: CaptionerConfig, *, is_new: bool
) -> CaptionInputs:
    """Return the captions that the arguments of `CaptionerModel.forward` hold.

    Args:
        labels: See `forward`, as for the next two.
        decoder_input_ids: Words to read.
        input_ids: Captions as the processor gives them.
        config: Configuration of the captioner.
        is_new: Whether captions begin here. If not, the words were checked, or chosen by the model, before.

    Raises:
        ValueError: There are no captions, or they have a wrong form.
    """
    words, is_by_image = decoder_input_ids, isinstance(decoder_input_ids, Tensor) and decoder_input_ids.ndim == 3
    if is_by_image:
        words = words.flatten(0, 1)
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if labels is not None:
        labels = check_labels(labels)
        targets = labels.reshape(-1, labels.shape[-1])  # (N, T)
        if words is None:
            made = words_before(targets, start, pad)
            return CaptionInputs(made, labels.shape[:-1], targets, caption_lengths(targets), are_given=False)
        check_ids(words, config)
        if words.shape != targets.shape:
            raise ValueError(
                f"There are {len(words)} captions of {words.shape[1]} decoder_input_ids, but {len(targets)} of "
                f"{targets.shape[1]} labels; give one id, <start> or the word before, for each label."
            )
        return CaptionInputs(words, labels.shape[:-1], targets, caption_lengths(targets))
    if words is None and input_ids is not None:
        check_ids(input_ids, config)
        begins = torch.compiler.is_compiling() or bool((input_ids[:, 0] == start).all())
        words = input_ids if begins else words_before(input_ids, start, pad)
    if words is None:
        raise ValueError("Neither labels nor decoder_input_ids are given. Pass labels to train, or call generate().")
    if is_new:
        check_ids(words, config)
    return CaptionInputs(words, decoder_input_ids.shape[:2] if is_by_image else words.shape[:1])


def refuse_unknown(arguments: dict[str, Any]) -> None:
    """Raise a TypeError unless further arguments of `forward` are None, or attention masks."""
    for name, value in arguments.items():
        if value is not None and name not in ("attention_mask", "decoder_attention_mask"):
            raise TypeError(f"forward() of a captioner has no argument {name!r}; see its docstring for what it takes.")


def caption_lengths(labels: Tensor) -> Tensor:
    """Return the number of words up to the last label of each caption that counts, `(N, T) -> (N,)`."""
    positions = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return torch.where(labels != IGNORED, positions, 0).amax(1)


def check_words(labels: Tensor, given_ids: Tensor | None, lengths: Tensor, config: CaptionerConfig) -> None:
    """Check labels `(N, T)`, and the words that are read beside them if these are given.

    It makes an accelerator wait, so it is called when the program has to wait anyway.

    Args:
        labels: Labels, -100 where there is no word, or where the word does not count.
        given_ids: `decoder_input_ids`, `<start>` and all words but the last; None if they come from the labels.
        lengths: `caption_lengths` of the labels.
        config: Configuration of the captioner.

    Raises:
        ValueError: An id is not in the vocabulary, no label counts, or the words that are read are unknown.
    """
    counts = labels != IGNORED
    is_wrong = counts & ((labels < 0) | (labels >= config.vocab_size))
    if given_ids is None:
        is_unknown = counts.sum(1) != lengths  # a word was masked, and what it was is not said
    else:
        is_read = torch.arange(labels.shape[1], device=labels.device) < lengths.unsqueeze(1)
        ends = {config.pad_token_id, *_end_ids(config)} - {config.decoder_start_token_id}
        is_outside = (given_ids < 0) | (given_ids >= config.vocab_size)
        is_wrong = is_wrong | (is_read & is_outside)
        is_unknown = (is_read & torch.isin(given_ids, labels.new_tensor([*ends]))).any(1)
    if not bool(is_wrong.any() | is_unknown.any() | ~counts.any()):
        return
    _refuse_ids("labels", labels[counts], config)
    if not counts.any():
        raise ValueError("All labels are -100, so there is no word to learn; leave these images out.")
    row = int(is_unknown.nonzero()[0]) if is_unknown.any() else -1
    if given_ids is None:
        raise ValueError(
            f"The labels of caption {row} are {labels[row].tolist()}: -100 before a word, and what stood there is not "
            "known. Pad captions at their end; to leave words out of the loss, give decoder_input_ids, <start> and all "
            "words but the last, beside the labels."
        )
    _refuse_ids("decoder_input_ids", given_ids[is_read], config)
    raise ValueError(
        f"decoder_input_ids of caption {row} are {given_ids[row].tolist()}: <pad> or <end> before the last word. They "
        "must be <start> and all words but the last, padded at their end."
    )


def prompt_ids(ids: Any, num_images: int, start_ids: Tensor, config: CaptionerConfig) -> Tensor:
    """Return the words with which captions begin, `(B, T)`: `<start>` and those of a prompt, without its `<end>`.

    Args:
        ids: Ids of a prompt for each image, such as a tokenizer gives them: with or without `<start>` and `<end>`.
        num_images: Number of images, B.
        start_ids: Id of `<start>` of each image, `(B,)`, or for all images, `()`.
        config: Configuration of the captioner.

    Raises:
        ValueError: These are no ids, or not as many for each image.
    """
    check_ids(ids, config)
    if len(ids) != num_images:
        raise ValueError(f"There are prompts for {len(ids)} images, but {num_images} images; give one for each image.")
    starts = start_ids.expand(num_images).tolist()
    pad, ends = config.pad_token_id, {config.pad_token_id, *_end_ids(config)}
    prompts: list[list[int]] = []
    for start, row in zip(starts, ids.tolist(), strict=True):
        while row and row[0] == pad != start:
            del row[0]
        if row and row[0] == start:
            del row[0]
        while row and row[-1] in ends:
            del row[-1]
        if not ends.isdisjoint(row):
            raise ValueError(f"The prompt {row} has <end> or <pad> before its last word; give words to begin with.")
        prompts.append([start, *row])
    if len({len(prompt) for prompt in prompts}) > 1:
        numbers = sorted({len(prompt) - 1 for prompt in prompts})
        raise ValueError(
            f"The prompts have {' and '.join(map(str, numbers))} words; in one call of generate() all need as many. "
            "Caption images with shorter and longer prompts apart."
        )
    return torch.tensor(prompts, device=ids.device)


def _holds_ids(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _end_ids(config: CaptionerConfig) -> list[int]:
    ends = config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _refuse_ids(name: str, ids: Tensor, config: CaptionerConfig) -> None:
    """Raise a ValueError if ids are not all in the vocabulary."""
    wrong = ids[(ids < 0) | (ids >= config.vocab_size)]
    if len(wrong):
        raise ValueError(
            f"{name} have the id {wrong[0]}, but the vocabulary has the ids 0 to {config.vocab_size - 1}. Use the "
            "processor of this model; call resize_token_embeddings() for tokens added to it."
        )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return f"of type {type(value).__name__}"
