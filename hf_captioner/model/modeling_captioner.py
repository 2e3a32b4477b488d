"""The captioner: an encoder, an attention and a decoder behind the interface of a transformers model."""

# B: images, K: captions of an image, N = B·K: captions (or beams), T: words, V: vocabulary
# P: image cells, C: channels of a cell, D: decoder state

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers import initialization as init
from transformers.utils import ModelOutput

from .attentions import ATTENTIONS
from .configuration_captioner import CaptionerConfig
from .decoder_interface import RecurrentCache, check_fit, run_decoder
from .decoders import DECODERS
from .decoding import beam_search, can_drop_images
from .encoder_model import CaptionerEncoder, CaptionerEncoderOutput
from .encoders import ENCODERS
from .loss import captioning_loss
from .objectives import IGNORED, log_likelihood
from .parts import build_part

SCORED_AT_ONCE = 2**26  # maximum number of logits that `CaptionerModel.score` holds at a time


@dataclass
class CaptionerOutput(ModelOutput):
    """Output of a `CaptionerModel`.

    Args:
        loss: Scalar, if labels are given.
        logits: `(B, T, V)`, or `(B, K, T, V)` for labels `(B, K, T)`; zero after the end of a caption.
        cache: State after the last word, if no labels are given and `use_cache` is not False.
        cross_attentions: One tensor `(B, K, T, P)`, the attention weights with which each word was predicted.
        decoder_hidden_states: One tensor of decoder states, shaped like `logits` with D in place of V. None if the
            decoder does not return them.
        decoder_attentions: Always None, because a recurrent decoder has no self-attention.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: RecurrentCache | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None


@dataclass
class CaptionerScores(ModelOutput):
    """Log-probabilities (natural logarithm) of captions.

    Args:
        scores: `(B, K)`, log p(caption | image), the sum over the caption's words and `<end>`.
        word_scores: `(B, K, T)`, log p(word | previous words, image); 0 after the end of a caption.
    """

    scores: Tensor | None = None
    word_scores: Tensor | None = None


class CaptionerModel(PreTrainedModel, GenerationMixin):
    """Image captioner after Show, Attend and Tell (Xu et al. 2015) on any registered encoder.

    `from_encoder` makes a new captioner with trained encoder weights. `from_pretrained` loads a saved one, and never
    downloads encoder weights. A frozen encoder (no parameter requires a gradient) stays in evaluation mode, so that
    the running statistics of its batch norms never change.

    Args:
        config: Configuration of the captioner. Its field `packages` is brought up to date.
        encoder: Encoder to use, built with the same configuration; None for a new one with random weights.

    Raises:
        ValueError: A part cannot be found, does not take its arguments, or does not fit the others.
    """

    config: CaptionerConfig
    config_class = CaptionerConfig
    base_model_prefix = "captioner"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = True  # transformers' Trainer then passes num_items_in_batch
    _is_stateful = True
    _tied_weights_keys = {"decoder.output.weight": "decoder.embedding.weight"}  # noqa: RUF012 (transformers')

    def __init__(self, config: CaptionerConfig, encoder: CaptionerEncoder | None = None) -> None:
        super().__init__(config)
        self.encoder = CaptionerEncoder(config) if encoder is None else encoder
        memory_size = int(self.encoder.part.hidden_size)
        attention = build_part(
            ATTENTIONS,
            config.attention_type,
            config.packages,
            config.attention_kwargs,
            query_size=config.hidden_size,
            memory_size=memory_size,
            attention_size=config.attention_size,
        )
        self.decoder = build_part(
            DECODERS,
            config.decoder_type,
            config.packages,
            config.decoder_kwargs,
            vocab_size=config.vocab_size,
            embedding_size=config.embedding_size,
            hidden_size=config.hidden_size,
            memory_size=memory_size,
            attention=attention,
            gate=config.gate,
            deep_output=config.deep_output,
            memory_dropout=config.memory_dropout,
            embedding_dropout=config.embedding_dropout,
            output_dropout=config.output_dropout,
        )
        check_fit(self.decoder, attention)
        if config.tie_word_embeddings and self.decoder.embedding.weight.shape != self.decoder.output.weight.shape:
            raise ValueError(
                f"tie_word_embeddings needs word embeddings as wide as the input of the last layer: embedding_size is "
                f"{self.decoder.embedding.weight.shape[1]}, and the last layer reads "
                f"{self.decoder.output.weight.shape[1]} numbers. Set embedding_size to hidden_size, or deep_output."
            )
        config.packages = _providing_packages(config)
        self.post_init()

    @classmethod
    def from_encoder(
        cls,
        encoder_name: str = "resnet101",
        *,
        pretrained: bool = True,
        encoder_weights: str | Path | None = None,
        data_config: dict[str, Any] | None = None,
        **config_kwargs: Any,
    ) -> CaptionerModel:
        """Build a new captioner, with encoder weights from timm and random weights elsewhere.

        Args:
            encoder_name: timm name such as `"resnet101"` or `"swin_tiny_patch4_window7_224"`.
            pretrained: Whether to load the encoder's weights, from the Hub or from `encoder_weights`.
            encoder_weights: Path of a safetensors file with the encoder's weights.
            data_config: Preprocessing that these weights expect, where it differs from timm's default for the
                encoder, such as `{"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}`.
            config_kwargs: Fields of `CaptionerConfig`.

        Raises:
            ValueError: The encoder is unknown or gives no grid of image cells, or a field has a wrong value.
            FileNotFoundError: There is no such weights file.
        """
        config = CaptionerConfig(encoder_name=encoder_name, **config_kwargs)
        overlay = {key: tuple(v) if isinstance(v, list) else v for key, v in (data_config or {}).items()}
        if encoder_weights is not None:
            if not Path(encoder_weights).is_file():
                raise FileNotFoundError(
                    f"No encoder weights at {str(encoder_weights)!r}. Give the path of a safetensors file."
                )
            overlay["file"] = str(encoder_weights)
        # An encoder of another package need not know these arguments where neither is used.
        kwargs = {"pretrained": pretrained, "pretrained_cfg_overlay": overlay} if pretrained or overlay else {}
        model = cls(config, CaptionerEncoder(config, **kwargs))
        if overlay and not pretrained:
            # Random weights of such an encoder are drawn after those of the decoder, as in version 0.1.0, so that a
            # seed gives the same captioner.
            model.encoder = CaptionerEncoder(config, **kwargs)
        height, width = model.data_config["input_size"][1:]
        model.encoder.part.grid_size(height, width)  # raises if the encoder gives no grid
        return model

    @property
    def data_config(self) -> dict[str, Any]:
        """Preprocessing that the encoder expects, as timm describes it; an image processor is built from it."""
        return dict(self.encoder.part.data_config)

    def freeze_encoder(self) -> None:
        """Stop training the encoder and put it into evaluation mode, in which it stays."""
        self.encoder.freeze()

    def unfreeze_encoder(self, *, from_stage: int = 0, freeze_batch_norm: bool = True) -> None:
        """Train the encoder, or only its last stages; see `CaptionerEncoder.unfreeze`."""
        self.encoder.unfreeze(from_stage=from_stage, freeze_batch_norm=freeze_batch_norm)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the last linear layer if its weights are tied to the word embedding, else None."""
        return self.decoder.output if self.config.tie_word_embeddings else None

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embedding."""
        return self.decoder.embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        else:
            super()._init_weights(module)
        # An attention that samples cells has a baseline for REINFORCE.
        if isinstance(baseline := getattr(module, "baseline", None), Tensor):
            init.zeros_(baseline)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: CaptionerEncoderOutput | None = None,
        cells: Tensor | None = None,
        cache: RecurrentCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_captions: int | None = None,
        sampling: float = 0.0,
    ) -> CaptionerOutput | tuple[Any, ...]:
        """Compute the loss of captions, or the logits of words that follow the given ones.

        Args:
            pixel_values: Images `(B, 3, H, W)`, from the processor.
            labels: Words and `<end>` of each caption, without `<start>`: `(B, T)`, or `(B, K, T)` for K captions of
                each image. -100 is ignored and may only follow a caption.
            decoder_input_ids: `(N, T)`, words to read, beginning with `<start>`; made from the labels if these are
                given. Captions of the same image are next to each other.
            encoder_outputs: Output of the encoder, in place of `pixel_values`.
            cells: Image cells `(B, P, C)` computed earlier, in place of `pixel_values`.
            cache: State after the words read so far, from the previous output.
            use_cache: Whether to return this state; None means yes.
            output_attentions: Whether to return `cross_attentions`. With labels they are always returned.
            output_hidden_states: Whether to return `decoder_hidden_states`.
            return_dict: False for a tuple instead of a `CaptionerOutput`.
            num_items_in_batch: Number of words, with `<end>`, in the whole batch of which these labels are a part, as
                in gradient accumulation. The losses of all parts then add up to the loss of the whole batch.
                transformers' Trainer passes it.
            num_captions: Number of captions in that batch, by which the doubly stochastic term is divided. If only
                `num_items_in_batch` is given, it is estimated from the words for each caption here: the terms of the
                parts are then averaged with their numbers of words as weights, which equals the term of the whole
                batch if captions of all parts are equally long on average.
            sampling: Probability in [0, 1] of reading a word that the decoder draws from its own prediction instead
                of the one from the labels (scheduled sampling, Bengio et al. 2015).

        Raises:
            ValueError: There is no image, or neither labels nor words to read.
        """
        lengths = None
        if labels is not None:
            targets = labels.reshape(-1, labels.shape[-1])  # (N, T)
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(targets)
            lengths = (targets != IGNORED).sum(1)
        elif decoder_input_ids is None:
            raise ValueError(
                "Neither labels nor decoder_input_ids are given. Pass labels to train, or call generate()."
            )

        if cache is None:
            cache = RecurrentCache(self.decoder.prepare(self._cells(pixel_values, encoder_outputs, cells)))
        output = run_decoder(
            self.decoder,
            decoder_input_ids,
            cache.memory,
            cache.state,
            lengths=lengths,
            siblings=cache.siblings,
            sampling=sampling,
        )

        result = CaptionerOutput(logits=output.logits)
        if labels is not None:
            result.loss = captioning_loss(output, targets, self.decoder, self.config, num_items_in_batch, num_captions)
            result.logits = output.logits.unflatten(0, labels.shape[:-1])  # (B, T, V) or (B, K, T, V)
            result.cross_attentions = (output.weights.unflatten(0, (len(labels), -1)),)  # (B, K, T, P)
        else:
            if use_cache is not False:
                length = cache.length + decoder_input_ids.shape[1]
                result.cache = RecurrentCache(cache.memory, output.state, length)
            if output_attentions:
                result.cross_attentions = (output.weights.unsqueeze(1),)  # (N, 1, T, P)
        if output_hidden_states and output.hidden is not None:
            captions = labels.shape[:-1] if labels is not None else output.hidden.shape[:1]
            result.decoder_hidden_states = (output.hidden.unflatten(0, captions),)  # (B, T, D) or (B, K, T, D)
        return result.to_tuple() if return_dict is False else result

    def _cells(
        self, pixel_values: Tensor | None, encoder_outputs: CaptionerEncoderOutput | None, cells: Tensor | None
    ) -> Tensor:
        """Return the image cells `(B, P, C)` from whichever of the three inputs is given.

        Raises:
            ValueError: None of them is given.
        """
        if cells is not None:
            return cells
        if encoder_outputs is not None:
            return encoder_outputs.last_hidden_state
        if pixel_values is None:
            raise ValueError("No image is given. Pass pixel_values from the processor, or cells computed earlier.")
        return self.encoder(pixel_values).last_hidden_state

    @torch.no_grad()
    def score(
        self,
        pixel_values: Tensor | None = None,
        captions: Tensor | None = None,
        encoder_outputs: CaptionerEncoderOutput | None = None,
        cells: Tensor | None = None,
    ) -> CaptionerScores:
        """Compute the log-probabilities of given captions, to rank captions of an image or images for a caption.

            captions = processor(text=["a dog runs", "two people on a bench"])["labels"]
            model.score(**processor(images=images), captions=captions).scores  # (images, captions)

        To compare captions of different lengths, divide by the number of words, `(captions != -100).sum(-1)`.

        Args:
            pixel_values: Images `(B, 3, H, W)`, from the processor.
            captions: Labels `(K, T)` of captions that are scored for every image, or `(B, K, T)` of K captions for
                each image.
            encoder_outputs: Output of the encoder, in place of `pixel_values`.
            cells: Image cells `(B, P, C)`, in place of `pixel_values`.

        Raises:
            ValueError: There is no image, there are no captions, or their number of images differs.
        """
        cells = self._cells(pixel_values, encoder_outputs, cells)
        num_images = len(cells)
        if captions is None or captions.ndim not in (2, 3) or (captions.ndim == 3 and len(captions) != num_images):
            given = None if captions is None else tuple(captions.shape)
            raise ValueError(
                f"captions have shape {given}; give labels (K, T), scored for every image, or ({num_images}, K, T), "
                "from processor(text=...)."
            )
        if captions.ndim == 2:
            captions = captions.expand(num_images, -1, -1)
        memory = self.decoder.prepare(cells)
        chunk = max(1, SCORED_AT_ONCE // (num_images * captions.shape[2] * self.config.vocab_size))
        word_scores = []
        for labels in captions.split(chunk, 1):
            targets = labels.flatten(0, 1)  # (N, T)
            lengths = (targets != IGNORED).sum(1)
            input_ids = self.prepare_decoder_input_ids_from_labels(targets)
            output = run_decoder(self.decoder, input_ids, memory, lengths=lengths)
            word_scores.append(log_likelihood(output.logits, targets).view(labels.shape))
        scores = torch.cat(word_scores, 1)  # (B, K, T)
        return CaptionerScores(scores=scores.sum(2), word_scores=scores)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return the word that is read before each label: `<start>`, then all labels but the last.

        Args:
            labels: `(N, T)`.

        Returns:
            `(N, T)`, with the id of `<pad>` after the end of a caption.
        """
        words = labels.masked_fill(labels == IGNORED, self.config.pad_token_id)
        start = torch.full_like(words[:, :1], self.config.decoder_start_token_id)
        return torch.cat([start, words[:, :-1]], dim=1)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: RecurrentCache | None = None,
        encoder_outputs: CaptionerEncoderOutput | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for one step of `generate()`.

        The words to read are those that have not been read yet: a given prefix, or the word chosen last.
        """
        num_read = 0 if cache is None else cache.get_seq_length()
        forwarded = ("use_cache", "output_attentions", "output_hidden_states")
        return {
            "decoder_input_ids": input_ids[:, num_read:],
            "cache": cache,
            "encoder_outputs": encoder_outputs,
            **{name: kwargs[name] for name in forwarded if name in kwargs},
        }

    def _beam_search(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """Search without work on images whose captions are finished, where that equals transformers' beam search."""
        settings = (logits_processor, stopping_criteria, generation_config)
        if can_drop_images(*settings, kwargs):
            return beam_search(self, input_ids, *settings, encoder_outputs=kwargs["encoder_outputs"])
        return super()._beam_search(input_ids, *settings, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The cache is a RecurrentCache, made by the first step, not keys and values of transformer layers.
        return False

    def default_generation_config(self, *, unknown_token_id: int | None = None) -> GenerationConfig:
        """Return generation settings for a new captioner: five beams, at most 30 words, never `<unk>`."""
        config = self.config
        return GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            decoder_start_token_id=config.decoder_start_token_id,
            suppress_tokens=None if unknown_token_id is None else [unknown_token_id],
            num_beams=5,
            max_length=31,
        )


def _providing_packages(config: CaptionerConfig) -> dict[str, str] | None:
    """Return the value of `CaptionerConfig.packages`: the installed package of each part that is not built in."""
    parts = {
        f"{registry.kind}/{name}": registry.package(name)
        for registry, name in (
            (ENCODERS, config.encoder_type),
            (ATTENTIONS, config.attention_type),
            (DECODERS, config.decoder_type),
        )
    }
    return {part: package for part, package in parts.items() if package is not None} or None
