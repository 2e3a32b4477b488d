"""The captioner: an encoder, an attention and a decoder behind the interface of a transformers model."""

# B: images, K: captions of an image, N = B·K: captions (or beams), T: words, V: vocabulary
# P: image cells, C: channels of a cell

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers import initialization as init
from transformers.utils import ModelOutput

from .attentions import ATTENTIONS
from .configuration_captioner import CaptionerConfig
from .decoders import DECODERS, DecoderOutput, RecurrentCache
from .decoding import beam_search, can_drop_images
from .encoders import ENCODERS
from .objectives import (
    IGNORED,
    attention_entropy,
    cross_entropy,
    doubly_stochastic,
    log_likelihood,
    moving_average,
    reinforce,
)
from .registry import Registry

SCORED_AT_ONCE = 2**26  # elements of logits that score() holds at a time


@dataclass
class CaptionerOutput(ModelOutput):
    """What a `CaptionerModel` returns.

    Args:
        loss: scalar, if labels are given.
        logits: `(B, T, V)`, or `(B, K, T, V)` for labels `(B, K, T)`; zero after a caption's end.
        cache: state after the last word, if no labels are given and `use_cache` is not False.
        cross_attentions: one tensor `(B, K, T, P)`, the attention that chose each word.
        decoder_hidden_states: one tensor of states, shaped like `logits` with D in place of V.
        decoder_attentions: always None; a recurrent decoder has no self-attention.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: RecurrentCache | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None


@dataclass
class CaptionerScores(ModelOutput):
    """How likely captions are.

    Args:
        scores: `(B, K)`, log p(caption | image), natural: the sum over its words, `<end>` included.
        word_scores: `(B, K, T)`, log p(word | words before, image); 0 where a caption is over.
    """

    scores: Tensor | None = None
    word_scores: Tensor | None = None


class SharedCells:
    """Image cells `(B, P, C)` that all beams of an image share.

    `generate()` repeats every tensor of an encoder's output for each beam. This is no tensor, so it stays single.
    """

    def __init__(self, cells: Tensor) -> None:
        self.cells = cells


@dataclass
class CaptionerEncoderOutput(ModelOutput):
    """What the encoder returns: image cells, held where `generate()` does not copy them.

    Cells computed earlier go back in as `generate(encoder_outputs=CaptionerEncoderOutput.of(cells))`.
    """

    shared: SharedCells | None = None

    @classmethod
    def of(cls, cells: Tensor) -> CaptionerEncoderOutput:
        """Wrap cells `(B, P, C)`."""
        return cls(shared=SharedCells(cells))

    @property
    def last_hidden_state(self) -> Tensor:
        """The cells, `(B, P, C)`, under the name that transformers looks for."""
        assert self.shared is not None
        return self.shared.cells


class CaptionerEncoder(PreTrainedModel):
    """The encoder part as a transformers model, so that it keeps its own weights when a captioner is initialised."""

    config: CaptionerConfig
    config_class = CaptionerConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: CaptionerConfig, **kwargs: Any) -> None:
        super().__init__(config)
        build = _find(ENCODERS, config.encoder_type, config)
        self.part: Any = build(config.encoder_name, **(config.encoder_kwargs or {}), **kwargs)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The part initialises itself when it is built. Only what no checkpoint holds must be made again after
        # from_pretrained, which builds models without memory.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]

    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CaptionerEncoderOutput:
        """`(B, 3, H, W)` to cells `(B, P, C)`; the other arguments are what `generate()` sends to any encoder."""
        return CaptionerEncoderOutput.of(self.part(pixel_values))


def _find(registry: Registry, name: str, config: CaptionerConfig) -> Any:
    """A part by name; the configuration notes the package that provides it, or is asked which one did."""
    key, known = f"{registry.kind}/{name}", config.packages or {}
    part, package = registry.get(name, known.get(key)), registry.package(name)
    packages = {other: known[other] for other in known if not other.startswith(f"{registry.kind}/")}
    config.packages = (packages | {key: package} if package else packages) or None
    return part


def _build(registry: Registry, name: str, kwargs: dict[str, Any] | None, config: CaptionerConfig, **sizes: Any) -> Any:
    """A part from its sizes and from what the user gives besides, which must be among its other arguments."""
    part, kwargs = _find(registry, name, config), kwargs or {}
    parameters = inspect.signature(part).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [parameter for parameter in parameters if parameter not in sizes]
    if unknown := kwargs.keys() & sizes.keys() if takes_any else kwargs.keys() - known:
        raise ValueError(
            f"{name!r} of the {registry.kind} does not take {', '.join(map(repr, sorted(unknown)))} as "
            f"{registry.kind.removesuffix('s')}_kwargs, but {', '.join(known) or 'nothing'}."
        )
    return part(**sizes, **kwargs)


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


class CaptionerModel(PreTrainedModel, GenerationMixin):
    """Image captioner after Show, Attend and Tell (Xu et al. 2015) on any registered encoder.

    A new captioner with trained encoder weights comes from `from_encoder`; a saved one from `from_pretrained`,
    which never downloads encoder weights. A frozen encoder (no parameter requires a gradient) stays in evaluation
    mode, so its batch statistics never move.
    """

    config: CaptionerConfig
    config_class = CaptionerConfig
    base_model_prefix = "captioner"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _is_stateful = True
    _tied_weights_keys = {"decoder.output.weight": "decoder.embedding.weight"}  # noqa: RUF012 (transformers')

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__(config)
        self.encoder = CaptionerEncoder(config)
        memory_size = int(self.encoder.part.hidden_size)
        attention = _build(
            ATTENTIONS,
            config.attention_type,
            config.attention_kwargs,
            config,
            query_size=config.hidden_size,
            memory_size=memory_size,
            attention_size=config.attention_size,
        )
        self.decoder = _build(
            DECODERS,
            config.decoder_type,
            config.decoder_kwargs,
            config,
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
        if config.tie_word_embeddings and self.decoder.embedding.weight.shape != self.decoder.output.weight.shape:
            raise ValueError(
                f"tie_word_embeddings needs words as wide as what they are computed from: embedding_size is "
                f"{self.decoder.embedding.weight.shape[1]}, and the last layer reads "
                f"{self.decoder.output.weight.shape[1]}. Set embedding_size to hidden_size, or deep_output."
            )
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
        """A new captioner: encoder weights from timm, everything else random.

        Args:
            encoder_name: timm name such as `"resnet101"` or `"swin_tiny_patch4_window7_224"`.
            pretrained: load the encoder's weights, from the Hub or from `encoder_weights`.
            encoder_weights: safetensors file with the encoder's weights.
            data_config: what these weights want of pixels where it differs from timm's own account, such as
                `{"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}`.
            config_kwargs: fields of `CaptionerConfig`.

        Raises:
            ValueError: an unknown encoder, one that gives no grid, or a bad field.
            FileNotFoundError: no such weights file.
        """
        config = CaptionerConfig(encoder_name=encoder_name, **config_kwargs)
        model = cls(config)
        overlay = {key: tuple(v) if isinstance(v, list) else v for key, v in (data_config or {}).items()}
        if encoder_weights is not None:
            if not Path(encoder_weights).is_file():
                raise FileNotFoundError(
                    f"No encoder weights at {str(encoder_weights)!r}. Give the path of a safetensors file."
                )
            overlay["file"] = str(encoder_weights)
        if pretrained or overlay:
            model.encoder = CaptionerEncoder(config, pretrained=pretrained, pretrained_cfg_overlay=overlay)
        height, width = model.data_config["input_size"][1:]
        model.encoder.part.grid_size(height, width)  # refuses an encoder without a grid
        return model

    @property
    def data_config(self) -> dict[str, Any]:
        """Timm's account of the pixels the encoder wants; a processor is built from it."""
        return dict(self.encoder.part.data_config)

    def freeze_encoder(self) -> None:
        """Stop training the encoder and put it, for good, into evaluation mode."""
        self.encoder.requires_grad_(False).eval()

    def unfreeze_encoder(self, *, from_stage: int = 0, freeze_batch_norm: bool = True) -> None:
        """Train the encoder, or the part of it nearest to the decoder.

        Args:
            from_stage: the first of its stages that is trained; 0 is the stem.
            freeze_batch_norm: keep the statistics, scales and shifts of batch norms as they are: those of a few
                images are a poor replacement for ImageNet's.

        Raises:
            ValueError: it has no such stage, or no stages.
        """
        # What is trained as a whole needs no stages.
        stages = self.encoder.part.stages() if from_stage else [[*self.encoder.parameters()]]
        self.encoder.requires_grad_(False)
        if not 0 <= from_stage < len(stages):
            raise ValueError(
                f"encoder_from_stage is {from_stage}; {self.config.encoder_name!r} has the stages 0 (the stem) to "
                f"{len(stages) - 1}."
            )
        for parameter in (parameter for stage in stages[from_stage:] for parameter in stage):
            parameter.requires_grad_(True)
        if freeze_batch_norm:
            for norm in _batch_norms(self.encoder):
                norm.requires_grad_(False)

    def train(self, mode: bool = True) -> CaptionerModel:
        """Training or evaluation mode; a frozen encoder stays in evaluation mode, and so do frozen batch norms."""
        super().train(mode)
        modules: list[nn.Module] = [self.encoder, *_batch_norms(self.encoder)]
        for module in modules:
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self

    def get_output_embeddings(self) -> nn.Module | None:
        """The layer that scores words, where its weights are the embedding's."""
        return self.decoder.output if self.config.tie_word_embeddings else None

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
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
        if isinstance(baseline := getattr(module, "baseline", None), Tensor):  # of an attention that samples
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
        num_items_in_batch: int | None = None,
        num_captions: int | None = None,
        sampling: float = 0.0,
    ) -> CaptionerOutput | tuple[Any, ...]:
        """Score captions, or one more word of captions under way.

        Args:
            pixel_values: `(B, 3, H, W)`, from the processor.
            labels: `(B, T)` or `(B, K, T)` for K captions an image; words and `<end>`, without `<start>`;
                -100 is ignored and may only follow a caption.
            decoder_input_ids: `(N, T)`, words to read, beginning with `<start>`; made from labels if these are
                given. The captions of an image stand next to each other.
            encoder_outputs: as the encoder returns them, in place of `pixel_values`.
            cells: `(B, P, C)`, image cells computed earlier, in place of `pixel_values`.
            cache: state after the words before.
            use_cache: return that state.
            output_attentions: return `cross_attentions`. With labels they are always returned.
            output_hidden_states: return `decoder_hidden_states`.
            return_dict: False for a tuple.
            num_items_in_batch: of a larger batch that this is a part of; the losses of its parts add up to its loss.
            num_captions: of that batch.
            sampling: probability with which a word is read that the model draws, not that of the labels (scheduled
                sampling, Bengio et al. 2015).

        Raises:
            ValueError: no image, or neither labels nor words to read.
        """
        lengths = None
        if labels is not None:
            words = labels.reshape(-1, labels.shape[-1])  # (N, T)
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(words)
            lengths = (words != IGNORED).sum(1)
        elif decoder_input_ids is None:
            raise ValueError(
                "Neither labels nor decoder_input_ids are given. Pass labels to train, or call generate()."
            )

        past = 0
        known: dict[str, Any] = {}  # what decoders of other packages may not know of
        if cache is not None:
            memory, state, past = cache.memory, cache.state, cache.length
            if getattr(self.decoder, "uses_siblings", False):
                known["siblings"] = cache.siblings
        else:
            memory, state = self.decoder.prepare(self._cells(pixel_values, encoder_outputs, cells)), None
        if sampling:
            known["sampling"] = sampling
        output = self.decoder(decoder_input_ids, memory, state, lengths, **known)

        result = CaptionerOutput(logits=output.logits)
        if labels is not None:
            result.loss = self._loss(output, words, num_items_in_batch, num_captions)
            result.logits = output.logits.unflatten(0, labels.shape[:-1])  # (B, T, V) or (B, K, T, V)
            result.cross_attentions = (output.weights.unflatten(0, (len(labels), -1)),)  # (B, K, T, P)
        else:
            if use_cache is not False:
                length = past + decoder_input_ids.shape[1]
                result.cache = RecurrentCache(memory, output.state, length)
            if output_attentions:
                result.cross_attentions = (output.weights.unsqueeze(1),)  # (N, 1, T, P)
        if output_hidden_states:
            captions = labels.shape[:-1] if labels is not None else output.hidden.shape[:1]
            result.decoder_hidden_states = (output.hidden.unflatten(0, captions),)  # as logits
        return result.to_tuple() if return_dict is False else result

    def _cells(
        self, pixel_values: Tensor | None, encoder_outputs: CaptionerEncoderOutput | None, cells: Tensor | None
    ) -> Tensor:
        if cells is not None:
            return cells
        if encoder_outputs is not None:
            return encoder_outputs.last_hidden_state
        if pixel_values is None:
            raise ValueError("No image is given. Pass pixel_values from the processor, or cells computed earlier.")
        return self.encoder(pixel_values).last_hidden_state

    def _loss(
        self, output: DecoderOutput, words: Tensor, num_items_in_batch: int | None, num_captions: int | None
    ) -> Tensor:
        config = self.config
        logits, labels = output.logits, words
        if output.read is not None:  # then padding costs nothing here either
            logits, labels = output.read[0].unsqueeze(0), words.flatten()[output.read[1]].unsqueeze(0)
        loss = cross_entropy(logits, labels, config.label_smoothing, num_items_in_batch)
        if config.doubly_stochastic_weight:
            term = doubly_stochastic(output.weights, words, config.doubly_stochastic_reduction, num_captions)
            loss = loss + config.doubly_stochastic_weight * term
        if output.log_probs is not None:
            attention = self.decoder.attention
            scores = log_likelihood(output.logits.detach(), words)
            term = reinforce(scores, output.log_probs, words, attention.baseline, num_items_in_batch)
            loss = loss + attention.reinforce_weight * term
            loss = loss - attention.entropy_weight * attention_entropy(output.weights, words, num_items_in_batch)
            attention.baseline.copy_(moving_average(attention.baseline, scores, words))
        return loss

    @torch.no_grad()
    def score(
        self,
        pixel_values: Tensor | None = None,
        captions: Tensor | None = None,
        encoder_outputs: CaptionerEncoderOutput | None = None,
        cells: Tensor | None = None,
    ) -> CaptionerScores:
        """How likely given captions are, to rank the captions of an image or the images of a caption.

            captions = processor(text=["a dog runs", "two people on a bench"])["labels"]
            model.score(**processor(images=images), captions=captions).scores  # (images, captions)

        Divide by the number of words, `(captions != -100).sum(-1)`, to compare captions of different lengths.

        Args:
            pixel_values: `(B, 3, H, W)`, from the processor.
            captions: labels `(K, T)`, each scored for every image, or `(B, K, T)`, K captions of each image's own.
            encoder_outputs: as the encoder returns them, in place of `pixel_values`.
            cells: `(B, P, C)`, in place of `pixel_values`.

        Raises:
            ValueError: no image, no captions, or captions of another number of images.
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
            words = labels.flatten(0, 1)  # (N, T)
            lengths = (words != IGNORED).sum(1)
            output = self.decoder(self.prepare_decoder_input_ids_from_labels(words), memory, None, lengths)
            word_scores.append(log_likelihood(output.logits, words).view(labels.shape))
        scores = torch.cat(word_scores, 1)  # (B, K, T)
        return CaptionerScores(scores=scores.sum(2), word_scores=scores)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The word read before each label: `<start>`, then the labels but the last. `(N, T) -> (N, T)`."""
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
        """Inputs of one step of `generate()`: the words not read yet, be they a prefix or the last word chosen."""
        past = 0 if cache is None else cache.get_seq_length()
        wanted = ("use_cache", "output_attentions", "output_hidden_states")
        return {
            "decoder_input_ids": input_ids[:, past:],
            "cache": cache,
            "encoder_outputs": encoder_outputs,
            **{name: kwargs[name] for name in wanted if name in kwargs},
        }

    def _beam_search(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """Beam search without work on images whose captions are finished, where that equals transformers' own."""
        settings = (logits_processor, stopping_criteria, generation_config)
        if can_drop_images(*settings, kwargs):
            return beam_search(self, input_ids, *settings, encoder_outputs=kwargs["encoder_outputs"])
        return super()._beam_search(input_ids, *settings, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The state is a RecurrentCache that the first step makes, not keys and values of transformer layers.
        return False

    def default_generation_config(self, *, unknown_token_id: int | None = None) -> GenerationConfig:
        """Generation settings of a new captioner: five beams, at most 30 words, never `<unk>`."""
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
