"""Training that goes on from a captioner: its architecture, weights and words, and the words of new captions."""

# V: vocabulary

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerFast

from ..cli import load_captioner
from ..files import parse_fields
from ..model.captions import is_of_words, widened_tokenizer
from ..model.modeling_captioner import CaptionerModel
from ..model.processing_captioner import CaptionerProcessor
from ..pretrained import captioner_path
from .recipe import DecodingOptions, ModelOptions, Recipe

logger = logging.getLogger(__name__)

NOISE = 0.1  # of new words, relative to the standard deviation of the known words
DROPOUTS = ("memory_dropout", "embedding_dropout", "output_dropout")  # may differ from the captioner's


def with_options_of_captioner(recipe: Recipe) -> Recipe:
    """Return a recipe with the model and the decoding of the captioner that it goes on from, or else as it is.

    Options of decoding and dropout that the recipe gives stay as they are.

    Raises:
        ValueError: The recipe gives an option of the model that the captioner contradicts, its output folder is the
            captioner's, or no captioner can be loaded.
        FileNotFoundError: The folder holds no captioner.
    """
    name = recipe.model.from_captioner
    if name is None:
        return recipe
    if Path(captioner_path(name)).resolve() == Path(recipe.run.output_dir).resolve():
        raise ValueError(
            f"The output folder {recipe.run.output_dir!r} is that of the captioner to go on from, which the best model "
            "would replace. Name another --output_dir."
        )
    model, processor = load_captioner(name)
    known = _model_options(model, processor.tokenizer)
    given = {field: value for field, value in recipe.as_fields().items() if field in recipe.given}
    different = [
        f"{field} is {given[field]!r} and the captioner's {value!r}"
        for field, value in known.items()
        if field in given and field not in DROPOUTS and _plain(given[field], field) != _plain(value, field)
    ]
    if different:
        raise ValueError(
            f"The options contradict the captioner {name!r}: {'; '.join(different)}. Leave them out: what goes on from "
            "a captioner has its architecture, its preprocessing and its kind of words."
        )
    values = recipe.as_fields() | known | _decoding_options(model) | given
    return replace(Recipe.from_fields(**values), given=recipe.given)


def _model_options(model: CaptionerModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the options of a recipe that describe a captioner; its weights count as those of a pretrained encoder."""
    names = [field.name for field in fields(ModelOptions) if hasattr(model.config, field.name)]
    values = {name: getattr(model.config, name) for name in names}
    arguments = {name: value or {} for name, value in values.items() if name.endswith("_kwargs")}
    texts = {name: yaml.safe_dump(value, default_flow_style=True).strip() for name, value in arguments.items()}
    nothing = {"data_config": "{}", "encoder_weights": None, "word_vectors": None}
    return values | texts | nothing | {"pretrained": True, "tokenizer": "words" if is_of_words(tokenizer) else "bpe"}


def _decoding_options(model: CaptionerModel) -> dict[str, Any]:
    """Return the options of decoding that are saved with a captioner."""
    saved = {field.name: getattr(model.generation_config, field.name, None) for field in fields(DecodingOptions)}
    values = {name: value for name, value in saved.items() if value is not None and name != "num_beams"}
    return values | {"suppress_bad_endings": bool(model.generation_config.bad_words_ids)}


def _plain(value: Any, field: str) -> Any:
    """Return the value of a field for a comparison; those of YAML text are parsed."""
    return parse_fields(value) if field.endswith("_kwargs") or field == "data_config" else value


def continued_captioner(recipe: Recipe, captions: Sequence[Sequence[str]]) -> tuple[CaptionerModel, CaptionerProcessor]:
    """Load the captioner that a recipe goes on from, in single precision, and add the words of new captions.

    Args:
        recipe: Recipe that `with_options_of_captioner` returned.
        captions: Captions of each training image.
    """
    assert recipe.model.from_captioner is not None
    source, processor = load_captioner(recipe.model.from_captioner)
    config, tokenizer = copy.deepcopy(source.config), processor.tokenizer
    num_known = len(tokenizer)
    if is_of_words(tokenizer):
        texts = (caption for row in captions for caption in row)
        options = recipe.data
        tokenizer = widened_tokenizer(tokenizer, texts, min_count=options.min_count, vocab_size=options.vocab_size)
        processor.tokenizer = tokenizer
        words = f"{num_known} words and {len(tokenizer) - num_known} new ones"
    else:
        words = f"its {num_known} pieces, of which every new word is composed"
    logger.info(f"Going on from {recipe.model.from_captioner}, with {words}.")

    set_seed(recipe.run.seed)
    values = recipe.as_fields()
    training = ("label_smoothing", "doubly_stochastic_weight", "doubly_stochastic_reduction")
    config.update({name: values[name] for name in (*DROPOUTS, *training)})
    config.dtype = torch.float32
    # They name code in the repository that the captioner was loaded from.
    for part in (config, processor, processor.image_processor):
        part.__dict__.pop("auto_map", None)
    model = CaptionerModel(config, source.encoder.float())
    model.load_state_dict(source.state_dict())
    add_words(model, num_known, len(tokenizer))
    model.generation_config = source.generation_config
    return model, processor


@torch.no_grad()
def add_words(model: CaptionerModel, num_known: int, num_words: int) -> None:
    """Widen the vocabulary of a model, whose known words keep their weights.

    New words start near the mean of the known ones. The mean of their logits is far below the logit of a likely word,
    so that new words are improbable until they are trained.

    Args:
        model: Captioner with at least `num_known` words.
        num_known: Number of words that its tokenizer had.
        num_words: Number of words that its tokenizer has now.
    """
    if num_words == num_known:
        return
    model.resize_token_embeddings(max(num_words, model.config.vocab_size), mean_resizing=False)
    embedding: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    weights = [embedding.weight] if embedding.weight is output.weight else [embedding.weight, output.weight]
    for weight in weights:
        deviation, mean = torch.std_mean(weight[:num_known], 0)
        weight[num_known:] = mean + NOISE * deviation * torch.randn_like(weight[num_known:])
    if output.bias is not None:
        output.bias[num_known:] = output.bias[:num_known].mean()


def captioner_digest(model: CaptionerModel, processor: CaptionerProcessor) -> str:
    """Return a digest of a captioner that training is about to start from: of its words, and its weights but theirs."""
    digest = hashlib.blake2b(str(sorted(processor.tokenizer.get_vocab().items())).encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.shape[:1] != (model.config.vocab_size,):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
