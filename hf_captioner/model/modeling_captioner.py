"""The captioner: an encoder, an attention and a decoder behind the interface of a transformers model."""

# B: images, K: captions of an image, N = B·K: captions (or beams), T: words, V: vocabulary
# P: image cells, C: channels of a cell, D: decoder state

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers import initialization as init

from .attentions import ATTENTIONS
from .configuration_captioner import CaptionerConfig
from .decoder_interface import Memory, RecurrentCache, check_fit, run_decoder
from .decoders import DECODERS
from .decoding import beam_search, can_drop_images
from .encoder_model import CaptionerEncoder, SharedCells
from .encoders import ENCODERS
from .folder_check import check_folder, check_generation, one_line_errors
from .generation import CaptionerGenerationMixin
from .loss import captioning_loss
from .model_inputs import (
    caption_lengths,
    check_cells,
    check_labels,
    check_words,
    in_precision_of,
    read_captions,
    refuse_unknown,
)
from .model_outputs import CaptionerOutput, CaptionerScores
from .objectives import log_likelihood, words_before
from .parts import build_part
from .weights_check import check_encoder_weights, check_finite, check_weights, limited_parameters

SCORED_AT_ONCE = 2**26  # maximum number of logits that `CaptionerModel.score` holds at a time


class CaptionerModel(PreTrainedModel, CaptionerGenerationMixin):
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
    _tied_weights_keys = {"decoder.output.weight": "decoder.embedding.weight"}  # noqa: RUF012 (transformers')

    def __init__(self, config: CaptionerConfig, encoder: CaptionerEncoder | None = None) -> None:
        super().__init__(config)
        self.encoder = CaptionerEncoder(config) if encoder is None else encoder
        channels = int(self.encoder.part.hidden_size)
        self.projection = None if config.projection_size is None else nn.Linear(channels, config.projection_size)
        memory_size = config.projection_size or channels
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
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a captioner from a folder or the Hub, as `PreTrainedModel.from_pretrained` does, safely.

        The folder alone is read. Its weights must be those that its configuration asks for, in safetensors files.

        Raises:
            ValueError: The folder is damaged, or asks for more than a captioner needs; see `check_folder`.
            OSError: There is no such folder, or no model in it.
        """
        if torch.get_default_device().type == "meta":  # for which transformers has an error of its own
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        kwargs.setdefault("use_safetensors", True)
        with ExitStack() as stack:
            if pretrained_model_name_or_path is not None:
                check_folder(folder)
                stack.enter_context(one_line_errors(pretrained_model_name_or_path))
                if not kwargs.get("ignore_mismatched_sizes"):
                    stack.enter_context(limited_parameters(folder))
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            check_finite(model, pretrained_model_name_or_path)
            check_generation(model.generation_config.to_dict(), model.config.vocab_size)
        return loaded

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, **kwargs: Any
    ) -> Any:
        # Called with the model still on the meta device: nothing has taken memory yet.
        if checkpoint_files and str(checkpoint_files[0]).endswith(".safetensors"):
            check_weights(model, checkpoint_files, lenient=load_config.ignore_mismatched_sizes)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs)

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
        if pretrained and encoder_weights is not None:
            check_encoder_weights(model.encoder, encoder_weights)
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

    def decoder_parameters(self) -> list[nn.Parameter]:
        """Return all parameters but the encoder's: those of the decoder and, before it, of the projection."""
        projection = [] if self.projection is None else self.projection.parameters()
        return [*projection, *self.decoder.parameters()]

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embedding."""
        return self.decoder.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding."""
        self.decoder.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the last linear layer, which computes logits."""
        return self.decoder.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the last linear layer."""
        self.decoder.output = new_embeddings

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
        encoder_outputs: Any = None,
        cells: Tensor | None = None,
        stage_inputs: Tensor | None = None,
        from_stage: int = 0,
        cache: RecurrentCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_captions: int | None = None,
        sampling: float = 0.0,
        input_ids: Tensor | None = None,
        **others: Any,
    ) -> CaptionerOutput | tuple[Any, ...]:
        """Compute the loss of captions, or the logits of words that follow the given ones.

        Args:
            pixel_values: Images `(B, 3, H, W)`, from the processor.
            labels: Words and `<end>` of each caption, without `<start>`: `(B, T)`, or `(B, K, T)` for K captions of
                each image. -100 follows the end of a caption. With `decoder_input_ids`, any label may be -100, and its
                word is read but does not count.
            decoder_input_ids: `(N, T)` or `(B, K, T)`, words to read, beginning with `<start>`. Captions of the same
                image are next to each other. Beside labels they have the labels' shape, and are all words but the last;
                by default they are made from the labels.
            encoder_outputs: Output of the encoder, in place of `pixel_values`; also a tuple or another model's output
                whose first field holds image cells `(B, P, C)`.
            cells: Image cells `(B, P, C)` computed earlier, in place of `pixel_values`.
            stage_inputs: What enters the encoder's stage `from_stage`, `(B, …)`, computed earlier, in place of
                `pixel_values`; see `encoders.TimmEncoder.input_of_stage`.
            from_stage: Stage of the encoder that reads `stage_inputs`.
            cache: State after the words read so far, from the previous output.
            use_cache: Whether to return this state; None means yes.
            output_attentions: Whether to return `cross_attentions`; None for what the configuration says. With labels
                they are always returned.
            output_hidden_states: Whether to return `decoder_hidden_states` and `encoder_hidden_states`, likewise.
            return_dict: False for a tuple instead of a `CaptionerOutput`, likewise.
            num_items_in_batch: Number of words, with `<end>`, in the whole batch of which these labels are a part, as
                in gradient accumulation. The losses of all parts then add up to the loss of the whole batch.
                transformers' Trainer passes it.
            num_captions: Number of captions in that batch, by which the doubly stochastic term is divided. If only
                `num_items_in_batch` is given, it is estimated from the words for each caption here: the terms of the
                parts are then averaged with their numbers of words as weights, which equals the term of the whole
                batch if captions of all parts are equally long on average.
            sampling: Probability in [0, 1] of reading a word that the decoder draws from its own prediction instead
                of the one from the labels (scheduled sampling, Bengio et al. 2015).
            input_ids: Captions `(N, T)` as the processor gives them, in place of `decoder_input_ids`: what is read is
                made from them as from labels, unless they begin with `<start>`.
            others: Attention masks, which nothing depends on, since padding follows a caption; and arguments of other
                models that are None, as transformers and PEFT pass them.

        Raises:
            TypeError: There is an unknown argument.
            ValueError: There is no image, neither labels nor words to read, or something of a wrong form.
        """
        refuse_unknown(others)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        captions = read_captions(labels, decoder_input_ids, input_ids, self.config, is_new=cache is None)
        encoded = None
        if cache is None:
            encoded = self.image_cells(pixel_values, encoder_outputs, cells, stage_inputs, from_stage)
            cache = RecurrentCache(self.prepare_memory(encoded))
        captions.check(len(cache.memory.cells), self.config)
        output = run_decoder(
            self.decoder,
            captions.words,
            cache.memory,
            cache.state,
            lengths=captions.lengths,
            siblings=cache.siblings,
            sampling=sampling,
            keep_gradients=bool(output_hidden_states) and torch.is_grad_enabled(),
        )

        result = CaptionerOutput(logits=output.logits.unflatten(0, captions.shape))  # (N, T, V) or (B, K, T, V)
        targets = captions.targets
        if targets is not None:
            result.loss = captioning_loss(output, targets, self.decoder, self.config, num_items_in_batch, num_captions)
            result.cross_attentions = (output.weights.unflatten(0, (captions.shape[0], -1)),)  # (B, K, T, P)
        else:
            if use_cache is not False:
                length = cache.length + captions.words.shape[1]
                result.cache = RecurrentCache(cache.memory, output.state, length)
            if output_attentions:
                result.cross_attentions = (output.weights.unsqueeze(1),)  # (N, 1, T, P)
        if output_hidden_states:
            if output.hidden is not None:
                # Only what the logits were computed from has a gradient, so it is not reshaped in vain.
                is_several = targets is not None and len(captions.shape) > 1
                hidden = output.hidden.unflatten(0, captions.shape) if is_several else output.hidden
                result.decoder_hidden_states = (hidden,)  # (N, T, D) or (B, K, T, D)
            result.encoder_hidden_states = None if encoded is None else (encoded,)
        return result.to_tuple() if return_dict is False else result

    def image_cells(
        self,
        pixel_values: Tensor | None = None,
        encoder_outputs: Any = None,
        cells: Tensor | None = None,
        stage_inputs: Tensor | None = None,
        from_stage: int = 0,
    ) -> Tensor:
        """Return the image cells `(B, P, C)` from whichever input of `forward` is given, in the decoder's precision.

        Raises:
            ValueError: None of them is given, or it has a wrong form.
        """
        if stage_inputs is not None:
            cells = self.encoder.forward_from(stage_inputs, from_stage).last_hidden_state
        elif cells is None and encoder_outputs is None:
            if pixel_values is None:
                raise ValueError("No image is given. Pass pixel_values from the processor, or cells computed earlier.")
            cells = self.encoder(pixel_values).last_hidden_state
        else:
            if cells is None:
                is_tuple = isinstance(encoder_outputs, tuple | list)
                cells = encoder_outputs[0] if is_tuple else getattr(encoder_outputs, "last_hidden_state", None)
            cells = check_cells(cells.cells if isinstance(cells, SharedCells) else cells, self.encoder.part.hidden_size)
        if torch.is_autocast_enabled(cells.device.type):
            return cells
        return in_precision_of(self.decoder, cells)

    def prepare_memory(self, cells: Tensor) -> Memory:
        """Return what the decoder reads of image cells `(B, P, C)`, which are projected if the configuration says so.

        The projection and its ReLU are those of ImageCaptioning.pytorch (`att_embed`).
        """
        memory: Memory = self.decoder.prepare(cells if self.projection is None else torch.relu(self.projection(cells)))
        return memory

    @torch.no_grad()
    def score(
        self,
        pixel_values: Tensor | None = None,
        captions: Tensor | None = None,
        encoder_outputs: Any = None,
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
        cells = self.image_cells(pixel_values, encoder_outputs, cells)
        num_images = len(cells)
        if captions is None or captions.ndim not in (2, 3) or (captions.ndim == 3 and len(captions) != num_images):
            given = None if captions is None else tuple(captions.shape)
            raise ValueError(
                f"captions have shape {given}; give labels (K, T), scored for every image, or ({num_images}, K, T), "
                "from processor(text=...)."
            )
        captions = check_labels(captions)
        targets = captions.flatten(0, -2)
        check_words(targets, None, caption_lengths(targets), self.config)
        if captions.ndim == 2:
            captions = captions.expand(num_images, -1, -1)
        memory = self.prepare_memory(cells)
        chunk = max(1, SCORED_AT_ONCE // (num_images * captions.shape[2] * self.config.vocab_size))
        word_scores = []
        for labels in captions.split(chunk, 1):
            targets = labels.flatten(0, 1)  # (N, T)
            lengths = caption_lengths(targets)
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
        return words_before(labels, self.config.decoder_start_token_id, self.config.pad_token_id)

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
