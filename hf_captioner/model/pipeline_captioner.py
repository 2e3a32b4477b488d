"""The pipeline `image-captioning`, which captions images and returns the attention map of each word."""

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
from .images import ImageSource

Result = dict[str, Any]


def caption_attentions(output: GenerateOutput, grid: tuple[int, int]) -> Tensor:
    """Return the attention maps of the captions that `generate()` returned, word by word.

    In beam search, `output.cross_attentions` holds the attention of each beam at each step, and a caption may change
    beams from step to step. Its maps are gathered along the beams it came from.

    Args:
        output: Output of `generate(return_dict_in_generate=True, output_attentions=True)` with any decoding method.
        grid: Rows and columns of the grid of image cells, from `encoder.part.grid_size`.

    Returns:
        `(N, T, rows, columns)`, one map for each id in `output.sequences` except the first, `<start>`. Each map sums
        to 1, unless it is zero everywhere. Maps after the end of a caption have no meaning.
    """
    steps = [attentions[0].squeeze(1) for attentions in output.cross_attentions]  # (N or running beams, words read, P)
    beams = getattr(output, "beam_indices", None)
    if beams is not None:
        # The beam index is -1 after the end of a caption.
        steps = [step[beam] for step, beam in zip(steps, beams.clamp(min=0).T, strict=False)]
    weights = torch.cat(steps, dim=1).float()  # (N, T, P)
    # With a sentinel (Lu et al. 2017, eq. 12), which is not among the cells, their weights sum to less than 1.
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return weights.unflatten(2, grid)


class ImageCaptioningPipeline(Pipeline):
    """Pipeline that captions images: `pipeline("image-captioning", model=FOLDER)`, after `import hf_captioner`.

    Generation follows the model's `generation_config`. Arguments of `generate()` such as `num_beams`,
    `num_return_sequences` and `max_new_tokens` take precedence, whether given to the pipeline or to a call, directly
    or as `generate_kwargs={...}`.

    The result for an image is a list of `num_return_sequences` dicts with these keys:

    - `generated_text`: The caption.
    - `words`, with `return_scores` or `return_attentions`: List of the caption's words. Pieces of BPE are joined to
      words by `captions.caption_words`.
    - `word_scores`, with `return_scores`: For each word, log p(word | previous words, image), natural logarithm, as
      the model predicts it, without sampling temperature or suppressed words. NaN for words that were given as
      `decoder_input_ids`.
    - `score`, with `return_scores`: Mean log-probability of all ids including `<end>`, by which beam search ranks
      captions at its default `length_penalty` of 1.
    - `attentions`, with `return_attentions`: Array `(T, rows, columns)`, the attention map with which each word was
      predicted, averaged over the word's pieces. Each map sums to 1.
    - `box`, with `return_attentions`: `(left, top, right, bottom)` of the area that the maps cover, in pixels of the
      upright image. It exceeds the image where the encoder's cells see beyond it (see `TimmEncoder.grid_box` and
      `CaptionerImageProcessor.visible_box`).
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A model passed as an object may be in training mode, in which dropout would spoil the captions silently.
        self.model.eval()

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        """Caption one image or many.

        Args:
            images: An image of any kind that `open_image` reads (path, URL, bytes, open file, PIL image or array), a
                list or other sequence of images such as `dataset["image"]`, or a generator, torch data set or other
                iterable.
            kwargs: `batch_size`, `return_scores`, `return_attentions`, and arguments of `generate()`.

        Returns:
            A result (see the class) for one image, a list of results for a sequence, an iterator over results for any
            other iterable.

        Raises:
            FileNotFoundError: There is no such file.
            ConnectionError: An image can't be downloaded.
            ValueError: An image is broken, or `generate()` does not know an argument.
            TypeError: An object is not an image.
        """
        # Python also takes bytes for a sequence of numbers, and an open file for an iterable of lines.
        if isinstance(images, str | bytes | bytearray | memoryview) or hasattr(images, "read"):
            return super().__call__(images, **kwargs)
        if isinstance(images, Sequence):
            # As a torch data set, because the base class does not accept columns of data sets and empty lists.
            dataset = Subset(cast(Dataset[ImageSource], images), range(len(images)))
            return list(super().__call__(dataset, **kwargs))
        if isinstance(images, Iterable) and not hasattr(images, "__len__"):
            images = (image for image in images)  # the base class streams generators only
        return super().__call__(images, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save model and processor to a folder, which `pipeline("image-captioning", model=FOLDER)` then loads.

        That of transformers would also copy this file and name it in the configuration, as code that a loader must
        trust. `hf-captioner push` publishes a captioner with its code.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

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
                f"{', '.join(sorted(twice))} is given twice, in generate_kwargs and outside of it; give it once."
            )
        wanted = {"return_scores": return_scores, "return_attentions": return_attentions}
        forward = {name: value for name, value in wanted.items() if value is not None}
        return {}, {**forward, **generate_kwargs, **kwargs}, {}

    def preprocess(self, image: ImageSource) -> dict[str, Tensor]:
        """Return `pixel_values` `(1, 3, H, W)` of an image and its `image_size` `(1, 2)`, width and height."""
        pixel_values, sizes = self.processor.image_processor.read([image])
        return {"pixel_values": pixel_values.to(self.dtype), "image_size": torch.tensor(sizes)}

    def _forward(
        self,
        inputs: dict[str, Tensor],
        return_scores: bool = False,
        return_attentions: bool = False,
        **generate_kwargs: Any,
    ) -> dict[str, Tensor]:
        pixel_values = inputs["pixel_values"]
        outputs = {"output_logits": return_scores, "output_attentions": return_attentions}
        settings = self._prepare_generate_kwargs(generate_kwargs, return_dict_in_generate=True, **outputs)
        output = self.model.generate(pixel_values=pixel_values, **settings)
        results = {"sequences": output.sequences[:, 1:]}  # (N, T), without <start>
        if return_scores:
            word_scores = self.model.compute_transition_scores(
                output.sequences, output.logits, getattr(output, "beam_indices", None), normalize_logits=True
            )
            # Words given as decoder_input_ids have no scores.
            num_given = results["sequences"].shape[1] - word_scores.shape[1]
            results["word_scores"] = functional.pad(word_scores, (num_given, 0), value=torch.nan)  # (N, T)
        if return_attentions:
            grid = self.model.encoder.part.grid_size(*pixel_values.shape[-2:])
            results["attentions"] = caption_attentions(output, grid)
        # The base class splits batches along the first dimension.
        num_images = len(pixel_values)
        results = {name: tensor.unflatten(0, (num_images, -1)) for name, tensor in results.items()}  # (B, S, T, …)
        return {**results, "image_size": inputs["image_size"]}

    def postprocess(self, outputs: dict[str, Tensor]) -> list[Result]:
        """Return the results for one image from tensors `(1, S, T, …)`."""
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
        """Return the box that the grid of cells covers in an image of this width and height."""
        processor, encoder = self.processor.image_processor, self.model.encoder.part
        size = processor.size["height"], processor.size["width"]
        return processor.visible_box(width, height, encoder.grid_box(*size) if hasattr(encoder, "grid_box") else None)

    def _describe(
        self, sequences: Tensor, word_scores: Tensor | None = None, attentions: Tensor | None = None
    ) -> Result:
        """Return the result for one caption, without `box`, from its ids, word scores and attention maps."""
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
            result["word_scores"] = [word_scores[positions].sum().item() for _, positions in words]
        if attentions is not None:
            maps = [attentions[positions].mean(0) for _, positions in words]
            result["attentions"] = torch.stack(maps).numpy() if maps else attentions[:0].numpy()
        return result
