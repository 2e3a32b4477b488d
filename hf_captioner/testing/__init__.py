"""Contract tests for authors of parts: encoders, attentions, decoders, data sets and metrics.

    from hf_captioner.testing import check_attention

    def test_my_attention():
        check_attention(MyAttention, num_heads=4)

A check builds the part as the model does, small and with random weights, and raises an AssertionError that says which
rule of the contract the part breaks. It takes the part itself, be it a class or a function, and the arguments that a
user would give it. The contracts are described at the top of `model/encoders.py`, `model/attentions.py`,
`model/decoder_interface.py`, `data/datasets.py` and `metrics/__init__.py`.
"""

from .attentions import check_attention
from .datasets import check_dataset
from .decoders import check_decoder
from .encoders import check_encoder
from .metrics import check_metric

__all__ = ["check_attention", "check_dataset", "check_decoder", "check_encoder", "check_metric"]
