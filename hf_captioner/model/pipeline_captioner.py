"""The pipeline `image-captioning`: photographs in, captions out, with the attention that chose each word."""

# B: images, S: captions returned for an image, N = B·S: captions, T: words, P: image cells (rows x columns)

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, Subset
from transformers import Pipeline
from transformers.generation.utils import GenerateOutput

from .captions import caption_words
from .images import ImageSource, open_image

Result = dict[str, Any]


def caption_attentions(output: GenerateOutput, grid: tuple[int, int]) -> Tensor:
    """Attention maps of the captions that `generate()` returns, in the order of their words.

    Beam search reports the attention of whatever stood in each beam at each step. The words of the caption that won
    came from changing beams, so its maps are gathered along its path.

    Args:
        output: of `generate(return_dict_in_generate=True, output_attentions=True)`, by any way of decoding.
        grid: rows and columns of the image cells, from `encoder.part.grid_size`.

    Returns:
        `(N, T, rows, columns)`: a map for every id of `output.sequences` but the first, `<start>`. Each sums to 1,
        unless it is zero everywhere. Maps after the end of a caption mean nothing.
    """
    steps = [attentions[0].squeeze(1) for attentions in output.cross_attentions]  # beams' (N', words read, P)
    beams = getattr(output, "beam_indices", None)
    if beams is not None:
        # Where a caption is over, its beam is -1.
        steps = [step[beam] for step, beam in zip(steps, beams.clamp(min=0).T, strict=False)]
    weights = torch.cat(steps, dim=1).float()  # (N, T, P)
    # An attention that may also look away from the image (Lu et al. 2017, eq. 12) leaves the cells less than 1.
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return weights.unflatten(2, grid)


class ImageCaptioningPipeline(Pipeline):
    """Captions images: `pipeline("image-captioning", model=FOLDER)`, after `import hf_captioner`.

    Generation follows the model's `generation_config` but for what is given to the pipeline or to a call:
    `num_beams`, `num_return_sequences`, `max_new_tokens` and all other arguments of `generate()`, directly or as
    `generate_kwargs={...}`.

    A result is a list of `num_return_sequences` dicts with

    - `generated_text`: the caption.
    - with `return_scores` or `return_attentions`, `words`: list of its words. Pieces of BPE make up words as
      `captions.caption_words` says.
    - with `return_scores`, `word_scores`: for each word log p(word | words before, image), natural, by the model
      itself, before sampling temperature or suppressed words change it (NaN for words given as
      `decoder_input_ids`); and `score`: the mean of all ids, `<end>` included. This is what beam search ranks by at
      its default `length_penalty` of 1.
    - with `return_attentions`, `attentions`: array `(T, rows, columns)`, for each word where the model looked to
      choose it, on average over its pieces, summing to 1; and `box`: `(left, top, right, bottom)` of what these maps
      cover, in pixels of the upright image. It reaches out of the image where the encoder's cells look past their
      places in the grid (see `TimmEncoder.grid_box` and `CaptionerImageProcessor.visible_box`).
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A model given as an object may still be in training mode, where dropout would spoil captions unseen.
        self.model.eval()

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        """Caption one image or many.

        Args:
            images: an image (path, URL, bytes, PIL image or array: all that `open_image` reads), a list or other
                sequence of images (such as `dataset["image"]`), or a generator, torch data set or other iterable.
            kwargs: `batch_size`, `return_scores`, `return_attentions`, and arguments of `generate()`.

        Returns:
            A result (see the class) for an image, a list of them for a sequence, an iterator over them for the rest.

        Raises:
            FileNotFoundError: there is no such file.
            ConnectionError: an image can't be downloaded.
            ValueError: an image is broken, or an argument unknown to `generate()`.
            TypeError: what is given is no image.
        """
        if isinstance(images, Sequence) and not isinstance(images, str | bytes):
            # A data set of torch, because the base class knows no columns, and stumbles over an empty list.
            dataset = Subset(cast(Dataset[ImageSource], images), range(len(images)))
            return list(super().__call__(dataset, **kwargs))
        if isinstance(images, Iterable) and not hasattr(images, "__len__"):
            images = (image for image in images)
        return super().__call__(images, **kwargs)

    def _sanitize_parameters(
        self,
        generate_kwargs: dict[str, Any] | None = None,
        return_scores: bool | None = None,
        return_attentions: bool | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        generate_kwargs = generate_kwargs or {}
        if twice := generate_kwargs.keys() & kwargs.keys():
            raise ValueError(
                f"{', '.join(sorted(twice))} is given twice, in generate_kwargs and beside it; give it once."
            )
        wanted = {"return_scores": return_scores, "return_attentions": return_attentions}
        forward = {name: value for name, value in wanted.items() if value is not None}
        return {}, {**forward, **generate_kwargs, **kwargs}, {}

    def preprocess(self, image: ImageSource) -> dict[str, Tensor]:
        """Open an image and turn it into `pixel_values` `(1, 3, H, W)` and `image_size` `(1, 2)`, width and height."""
        opened = open_image(image)
        pixel_values = self.processor(images=opened)["pixel_values"]
        return {"pixel_values": pixel_values.to(self.dtype), "image_size": torch.tensor([opened.size])}

    def _forward(
        self,
        inputs: dict[str, Tensor],
        return_scores: bool = False,
        return_attentions: bool = False,
        **generate_kwargs: Any,
    ) -> dict[str, Tensor]:
        pixel_values = inputs["pixel_values"]
        output = self.model.generate(
            pixel_values=pixel_values,
            **self._prepare_generate_kwargs(
                generate_kwargs,
                return_dict_in_generate=True,
                output_logits=return_scores,
                output_attentions=return_attentions,
            ),
        )
        results = {"sequences": output.sequences[:, 1:]}  # (N, T), without <start>
        if return_scores:
            word_scores = self.model.compute_transition_scores(
                output.sequences, output.logits, getattr(output, "beam_indices", None), normalize_logits=True
            )
            num_given = results["sequences"].shape[1] - word_scores.shape[1]
            results["word_scores"] = functional.pad(word_scores, (num_given, 0), value=torch.nan)  # (N, T)
        if return_attentions:
            grid = self.model.encoder.part.grid_size(*pixel_values.shape[-2:])
            results["attentions"] = caption_attentions(output, grid)
        # The base class takes batches apart along the first dimension.
        num_images = len(pixel_values)
        results = {name: tensor.unflatten(0, (num_images, -1)) for name, tensor in results.items()}  # (B, S, T, …)
        return {**results, "image_size": inputs["image_size"]}

    def postprocess(self, outputs: dict[str, Tensor]) -> list[Result]:
        """The results of one image, from tensors `(1, S, T, …)`."""
        tensors = {name: tensor[0] for name, tensor in outputs.items()}
        image_size = tensors.pop("image_size").tolist()
        results = []
        for parts in zip(*tensors.values(), strict=True):
            result = self._describe(**dict(zip(tensors, parts, strict=True)))
            if "attentions" in result:
                result["box"] = self._grid_box(*image_size)
            results.append(result)
        return results

    def _grid_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Where the grid lies in an image of so many pixels."""
        processor, part = self.processor.image_processor, self.model.encoder.part
        if not hasattr(part, "grid_box"):
            return processor.visible_box(width, height)
        return processor.visible_box(width, height, part.grid_box(processor.size["height"], processor.size["width"]))

    def _describe(
        self, sequences: Tensor, word_scores: Tensor | None = None, attentions: Tensor | None = None
    ) -> Result:
        tokenizer = self.processor.tokenizer
        ids = sequences.tolist()  # (T,)
        result: Result = {"generated_text": self.processor.decode(ids)}
        words: list[tuple[str, list[int]]] = []
        if word_scores is not None or attentions is not None:
            words = caption_words(tokenizer, ids)
            result["words"] = [word for word, _ in words]
        if word_scores is not None:
            end = tokenizer.eos_token_id
            length = ids.index(end) + 1 if end in ids else len(ids)
            result["score"] = word_scores[:length].nanmean().item()
            result["word_scores"] = [word_scores[places].sum().item() for _, places in words]
        if attentions is not None:
            maps = [attentions[places].mean(0) for _, places in words]
            result["attentions"] = torch.stack(maps).numpy() if maps else attentions[:0].numpy()
        return result
