"""The configuration of a captioner: its architecture and its training loss."""

import math
import re
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .folder_check import REFUSED_ENTRIES, check_depth, check_folder, one_line_errors

# Largest values. They are far above what any captioner needs, and below what a machine can't build.
MAX_SIZES = {
    "attention_size": 2**16,
    "vocab_size": 2**22,
    "embedding_size": 2**16,
    "hidden_size": 2**16,
    "projection_size": 2**16,
}
MAX_NUMBER = 2**16  # of the arguments of parts: layers, heads, channels, ...
MAX_PIXELS = 1536  # of their arguments img_size, window_size and the like
# Arguments of encoders that say where weights come from. That is never stored: a captioner's own weights are, and
# those that a new one starts from are named by the caller of `CaptionerModel.from_encoder`.
WEIGHT_SOURCES = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "pretrained_strict"),
    *("pretrained_filter_fn", "checkpoint_path", "cache_dir"),
}


@strict
class CaptionerConfig(PreTrainedConfig):
    """Configuration of a `CaptionerModel`.

    Parts are stored by name and looked up in the registries `ENCODERS`, `ATTENTIONS` and `DECODERS`.

    Args:
        encoder_type: Name in `ENCODERS`. `"timm"` wraps any timm model whose features form a grid of cells.
        encoder_name: Architecture for that encoder; for `"timm"` the name of a timm model.
        encoder_kwargs: Further arguments of the encoder; for `"timm"` those of `timm.create_model`, such as
            `{"output_stride": 16}`.
        attention_type: Name in `ATTENTIONS`. `"additive"` is the attention of Show, Attend and Tell.
        attention_size: A, the width of the attention's hidden layer.
        attention_kwargs: Further arguments of the attention, such as `{"num_heads": 4}` for `"multi_head"`.
        decoder_type: Name in `DECODERS`. `"lstm"` is the decoder of Show, Attend and Tell.
        decoder_kwargs: Further arguments of the decoder, such as `{"num_layers": 2}`.
        packages: Installed packages that provide the parts of this model that are not built in, such as
            `{"attentions/sparse": "my-package"}`. If a part is missing on another machine, the error says which
            package to install. `CaptionerModel` keeps this field up to date.
        vocab_size: V, the number of words, special tokens included.
        embedding_size: E, the width of a word embedding.
        hidden_size: D, the width of the decoder's state.
        projection_size: Width to which a linear layer with ReLU projects image cells for the decoder; None to keep the
            encoder's.
        gate: Whether to scale the context by a scalar β that is computed from the state (Xu et al. 2015, sec. 4.2.1).
        deep_output: Whether to compute words from state, context and previous word (Xu et al. 2015, eq. 7) instead of
            the state alone.
        memory_dropout: Probability in [0, 1) of zeroing an element of an image cell.
        embedding_dropout: Probability in [0, 1) of zeroing an element of a word embedding.
        output_dropout: Probability in [0, 1) of zeroing an element before the last linear layer.
        label_smoothing: Probability in [0, 1) that the cross-entropy spreads evenly over the vocabulary.
        doubly_stochastic_weight: λ >= 0, the weight of the doubly stochastic term, which encourages the attention
            weights of every cell to sum to 1 over a caption (Xu et al. 2015, eq. 14). 0 switches it off.
        doubly_stochastic_reduction: Reduction of this term over cells, `"sum"` as in the paper, or `"mean"`, with which
            λ does not depend on the size of the grid. Either is then averaged over captions.
        initializer_range: Standard deviation of new word embeddings.
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
    projection_size: int | None = None
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
        """Check that sizes are positive and that the ids of special tokens are in the vocabulary."""
        for name, largest in MAX_SIZES.items():
            size = getattr(self, name)
            if size is None:
                continue
            if size < 1:
                raise ValueError(f"{name} is {size}, but must be at least 1.")
            if size > largest:
                raise ValueError(f"{name} is {size}, but must be at most {largest}.")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            token = getattr(self, name)
            if isinstance(token, int) and not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name} is {token}, but must be an id below vocab_size={self.vocab_size}. "
                    "Take the sizes and ids from the tokenizer."
                )
        if self.pad_token_id == 0:
            raise ValueError(
                "pad_token_id is 0, but must not be: transformers' beam search treats 0 as missing and "
                "pads with the end token. Build the tokenizer with <pad> at another id."
            )

    def validate_rates(self) -> None:
        """Check that probabilities are in [0, 1) and weights of loss terms are not negative."""
        for name in ("memory_dropout", "embedding_dropout", "output_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be in [0, 1).")
        for name in ("doubly_stochastic_weight", "initializer_range"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be finite, and must not be negative.")

    def validate_parts(self) -> None:
        """Check that the arguments of parts have sane sizes and name neither weights nor files."""
        if not self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder is False, but a captioner always has an encoder and a decoder.")
        names = self.architectures
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"architectures is {names!r:.60}, but must be a list of names of classes.")
        for name in ("encoder_kwargs", "attention_kwargs", "decoder_kwargs"):
            _check_arguments(name, getattr(self, name) or {})
        if sources := WEIGHT_SOURCES & (self.encoder_kwargs or {}).keys():
            raise ValueError(
                f"encoder_kwargs has {', '.join(sorted(sources))}. A configuration describes an architecture; where "
                "weights come from is an argument of from_encoder(encoder_weights=..., pretrained=...)."
            )
        if self.encoder_type.startswith("timm"):
            _check_no_path("encoder_name", self.encoder_name)
            _check_no_path("encoder_kwargs", self.encoder_kwargs or {})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from the entries of a `config.json`, as `from_pretrained` of transformers does.

        Raises:
            ValueError: An entry is wrong, or the folder that it was read from is, see `check_folder`.
        """
        source = kwargs.get("name_or_path") or "The configuration"
        if "name_or_path" in kwargs:  # set by transformers' Auto classes
            check_folder(Path(kwargs["name_or_path"]))
        if (model_type := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(f"{str(source)!r} holds no captioner, but a model of type {model_type!r:.60}.")
        for name, value in config_dict.items():
            # Such an entry makes transformers open something else, or replaces a method of the configuration.
            is_known = name in cls.__dataclass_fields__ or name in ("model_type", "name_or_path", "output_attentions")
            if value is not None and not is_known and (re.fullmatch(_REFUSED, name) or hasattr(cls, name)):
                raise ValueError(
                    f"{str(source)!r} has an entry {name!r:.60}, which a captioner's configuration must not."
                )
        with one_line_errors(source):
            try:
                return super().from_dict(config_dict, **kwargs)
            except StrictDataclassError as e:
                raise ValueError(f"The configuration is wrong: {e.__cause__ or e}") from e


_REFUSED = REFUSED_ENTRIES["config.json"]


def _check_arguments(name: str, value: Any) -> None:
    """Raise a ValueError if an argument of a part is no plain value, or a number that is too large for one."""
    check_depth(value, name)
    if isinstance(value, dict | list | tuple):
        if len(value) > MAX_NUMBER:
            raise ValueError(f"{name} has {len(value)} values.")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_arguments(f"{name}[{key!r}]", item)
    elif isinstance(value, int | float):
        limit = MAX_PIXELS if re.search(r"size'\](\[\d\])?$", name) else MAX_NUMBER
        if not abs(value) <= limit:
            raise ValueError(f"{name} is {value}, but a number must be finite and at most {limit}.")


def _check_no_path(name: str, value: Any) -> None:
    """Raise a ValueError if a value, or one in it, looks like a path, an address or a name on the Hub."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_no_path(f"{name}[{key!r}]", item)
    elif isinstance(value, str) and re.search(r"[/\\:]", value):
        raise ValueError(
            f"{name} is {value!r}, but must name an architecture of timm, such as 'resnet101': neither a file nor a "
            "model on the Hub. Weights are given to from_encoder(encoder_weights=..., pretrained=...)."
        )
