"""Everything that decides the architecture of a captioner and the loss it is trained with."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class CaptionerConfig(PreTrainedConfig):
    """Configuration of a `CaptionerModel`.

    Parts are stored by name and looked up in the registries `ENCODERS`, `ATTENTIONS` and `DECODERS`.

    Args:
        encoder_type: name in `ENCODERS`; `"timm"` wraps any timm model that gives a grid of cells.
        encoder_name: architecture for that encoder, for `"timm"` a timm name.
        encoder_kwargs: further arguments of the encoder, for `"timm"` those of `timm.create_model`
            (`{"output_stride": 16}`).
        attention_type: name in `ATTENTIONS`; `"additive"` is Show, Attend and Tell's.
        attention_size: A, width of the attention's hidden layer.
        attention_kwargs: further arguments of the attention, for `"multi_head"` such as `{"num_heads": 4}`.
        decoder_type: name in `DECODERS`; `"lstm"` is Show, Attend and Tell's.
        decoder_kwargs: further arguments of the decoder, such as `{"num_layers": 2}`.
        packages: the installed packages that provide parts of this model that are not built in, such as
            `{"attentions/sparse": "my-package"}`, to say what to install where they are missing. The model keeps
            it up to date.
        vocab_size: V, number of words, special tokens included.
        embedding_size: E, width of a word embedding.
        hidden_size: D, width of the decoder's state.
        gate: scale the context by a scalar β computed from the state (Xu et al. 2015, sec. 4.2.1).
        deep_output: compute words from state, context and previous word (Xu et al. 2015, eq. 7) rather than
            from the state alone.
        memory_dropout: probability in [0, 1) of zeroing an element of an image cell.
        embedding_dropout: probability in [0, 1) of zeroing an element of a word embedding.
        output_dropout: probability in [0, 1) of zeroing an element before the last linear layer.
        label_smoothing: probability in [0, 1) spread evenly over the vocabulary in the cross-entropy.
        doubly_stochastic_weight: λ >= 0 of the term that asks every cell to be attended to once in a caption
            (Xu et al. 2015, eq. 14). 0 switches it off.
        doubly_stochastic_reduction: `"sum"` over cells as the paper has it, or `"mean"`; both are then averaged
            over captions. `"mean"` keeps λ independent of the grid's size.
        initializer_range: standard deviation of a new word embedding.
    """

    model_type = "hf_captioner"
    keys_to_ignore_at_inference = ["cache"]

    encoder_type: str = "timm"
    encoder_name: str = "resnet101"
    encoder_kwargs: dict[str, Any] | None = None
    attention_type: str = "additive"
    attention_size: int = 512
    attention_kwargs: dict[str, Any] | None = None
    decoder_type: str = "lstm"
    decoder_kwargs: dict[str, Any] | None = None
    packages: dict[str, str] | None = None
    vocab_size: int = 10000
    embedding_size: int = 512
    hidden_size: int = 512
    gate: bool = True
    deep_output: bool = False
    memory_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    output_dropout: float | int = 0.5
    label_smoothing: float | int = 0.0
    doubly_stochastic_weight: float | int = 1.0
    doubly_stochastic_reduction: Literal["mean", "sum"] = "mean"
    initializer_range: float | int = 0.1
    pad_token_id: int = 1
    bos_token_id: int = 2
    eos_token_id: int | list[int] | None = 3
    decoder_start_token_id: int = 2
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = False

    def validate_sizes(self) -> None:
        """Every size is positive and every special token is a word."""
        for name in ("attention_size", "vocab_size", "embedding_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            token = getattr(self, name)
            if isinstance(token, int) and not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name} is {token}, but must be an id below vocab_size={self.vocab_size}. "
                    "Take the sizes and ids from the tokenizer."
                )
        if self.pad_token_id == 0:
            raise ValueError(
                "pad_token_id is 0, but must not be: transformers' beam search takes 0 for 'none given' and "
                "pads with the end token. Build the tokenizer with <pad> at another id."
            )

    def validate_rates(self) -> None:
        """Probabilities lie in [0, 1) and weights are not negative."""
        for name in ("memory_dropout", "embedding_dropout", "output_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be in [0, 1).")
        for name in ("doubly_stochastic_weight", "initializer_range"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative.")
