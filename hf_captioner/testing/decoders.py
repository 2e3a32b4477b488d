"""Contract test for authors of decoders: `check_decoder` checks outputs, states, optional arguments and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line
from ..model.attentions import ATTENTIONS
from ..model.decoder_interface import (
    DecoderOutput,
    Memory,
    RecurrentCache,
    Siblings,
    State,
    check_fit,
    optional_arguments,
    run_decoder,
)
from ..model.decoders import DECODERS
from .captioner import check_captioner
from .rules import LENGTHS, A, B, C, D, E, K, P, T, V, noise, require, require_close, require_shape, seeded

# Attentions that the decoder is tried with, each with the settings `gate` and `deep_output`.
SETTINGS = (("additive", True, True), ("adaptive", False, False), ("hard", True, False))


@seeded
def check_decoder(part: Callable[..., nn.Module], **kwargs: Any) -> None:
    """Check that a decoder keeps the contract in `model/decoder_interface.py`.

    Attentions that ask for a sentinel, or sample, are among those that the decoder is tried with if it supports them,
    and each optional argument is tried that its `forward` names. `part` is the class or function that `DECODERS` would
    hold, and `kwargs` are its `decoder_kwargs`.

    Raises:
        AssertionError: The part breaks the rule that the message names.
    """
    ids, cells = torch.randint(0, V, (B * K, T)), noise(B, P, C)
    for name, gate, deep_output in SETTINGS:
        attention = ATTENTIONS.get(name)(query_size=D, memory_size=C, attention_size=A)
        sizes = {"vocab_size": V, "embedding_size": E, "hidden_size": D, "memory_size": C}
        dropouts = dict.fromkeys(("memory_dropout", "embedding_dropout", "output_dropout"), 0.0)
        decoder: Any = part(attention=attention, gate=gate, deep_output=deep_output, **sizes, **dropouts, **kwargs)
        try:
            check_fit(decoder, attention)
        except ValueError:
            continue
        decoder = decoder.double().eval()
        for module in ("embedding", "output", "attention"):
            require(isinstance(getattr(decoder, module, None), nn.Module), f"a decoder has the module {module}")
        with torch.no_grad():
            _check_reading(decoder, ids, cells)
            _check_search(decoder, ids, cells)
            _check_optional_arguments(decoder, ids, cells)
        _check_gradients(decoder, ids, cells)
        output = DecoderOutput(*decoder.train()(ids, decoder.prepare(cells)))
        if hasattr(attention, "reinforce_weight"):
            require_shape(output.log_probs, (B * K, T), "log_probs of an attention that samples are (N, T)")
    check_captioner(DECODERS, part, kwargs)


def _read(decoder: Any, ids: Tensor, memory: Memory, state: State | None = None) -> DecoderOutput:
    """Call a decoder with nothing but the three arguments that it must take."""
    return DecoderOutput(*decoder(ids, memory, state))


def _check_reading(decoder: Any, ids: Tensor, cells: Tensor) -> None:
    """Check what a decoder returns, that captions do not affect each other, and that a state can be carried on."""
    memory = decoder.prepare(cells)
    require(isinstance(memory, Memory), "prepare(cells) returns a Memory", type(memory))
    try:
        output = decoder(ids, memory, None)
    except TypeError as e:
        require(False, "forward takes (input_ids, memory, state) and needs nothing else", first_line(e))
    is_tuple = isinstance(output, tuple) and len(output) >= 3
    require(is_tuple, "forward returns (logits, weights, state) or a DecoderOutput", type(output))
    whole = DecoderOutput(*output)
    require_shape(whole.logits, (B * K, T, V), "logits are (N, T, V)")
    require_shape(whole.weights, (B * K, T, P), "weights are (N, T, P)")
    if whole.hidden is not None:
        require_shape(whole.hidden, (B * K, T, D), "hidden is (N, T, D)")
    is_state = isinstance(whole.state, tuple) and all(len(tensor) == B * K for tensor in whole.state)
    require(is_state, "the state is a tuple of tensors with the captions in front, (N, ...)")

    for n, length in enumerate(LENGTHS):
        alone = _read(decoder, ids[n : n + 1, :length], decoder.prepare(cells[n // K : n // K + 1]))
        for name in ("logits", "weights"):
            mine, together = getattr(alone, name)[0], getattr(whole, name)[n, :length]
            require_close(together, mine, f"{name}: captions do not see each other, nor words to come")

    state = None
    for t in range(T):
        step = _read(decoder, ids[:, t : t + 1], memory, state)
        state = step.state
        require_close(step.logits[:, 0], whole.logits[:, t], "a carried state gives what recomputation gives")
        require_close(step.weights[:, 0], whole.weights[:, t], "a carried state gives the weights of recomputation")


def _check_search(decoder: Any, ids: Tensor, cells: Tensor) -> None:
    """Check the operations of a beam search: captions continue other captions, and images are dropped."""
    parents = torch.tensor([1, 1, 2, 3, 5, 5])
    memory = decoder.prepare(cells)
    cache = RecurrentCache(memory, _read(decoder, ids[:, :3], memory).state, 3)
    cache.reorder_cache(parents)
    expected = _read(decoder, torch.cat([ids[parents, :3], ids[:, 3:4]], 1), memory)
    step = _read(decoder, ids[:, 3:4], memory, cache.state)
    require_close(step.logits[:, 0], expected.logits[:, 3], "states can be reordered")
    if "siblings" in optional_arguments(decoder):
        step = run_decoder(decoder, ids[:, 3:4], memory, cache.state, siblings=Siblings.of(parents))
        rule = "with siblings, captions that continue the same one are read as without"
        require_close(step.logits[:, 0], expected.logits[:, 3], rule)
        require_close(step.weights[:, 0], expected.weights[:, 3], rule)
    images = torch.tensor([2, 0])
    captions = (images.unsqueeze(1) * K + torch.arange(K)).flatten()
    cache.reorder_cache(captions)
    cache.keep_images(images)
    step = _read(decoder, ids[captions, 3:4], cache.memory, cache.state)
    require_close(step.logits[:, 0], expected.logits[captions, 3], "memory.take(images) is the memory of these images")


def _check_optional_arguments(decoder: Any, ids: Tensor, cells: Tensor) -> None:
    """Check the effects of the arguments `lengths` and `sampling`, if the decoder's `forward` has them."""
    memory, lengths = decoder.prepare(cells), torch.tensor(LENGTHS)
    accepted = optional_arguments(decoder)
    whole = _read(decoder, ids, memory)
    packed = run_decoder(decoder, ids, memory, lengths=lengths)
    for name in ("logits", "weights", "hidden"):
        expected, found = getattr(whole, name), getattr(packed, name)
        if expected is None:
            continue
        for n, length in enumerate(LENGTHS):
            rule = f"{name}: with lengths, captions are read as without"
            require_close(found[n, :length], expected[n, :length], rule)
            require(not found[n, length:].any(), f"with lengths, {name} are zero where a caption is over")
    if packed.packed is not None:
        logits, index = packed.packed
        require_close(logits, packed.logits.flatten(0, 1)[index], "packed logits are those at their index")
        is_word = torch.arange(T) < lengths.unsqueeze(1)
        require(index.sort().values.equal(is_word.flatten().nonzero()[:, 0]), "packed logits are those of all words")
    if "sampling" in accepted:
        # If every word but the first is drawn, the others of those that were given do not matter.
        drawn = []
        for words in (ids, torch.cat([ids[:, :1], ids[:, 1:].flip(1)], 1)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                drawn.append(run_decoder(decoder, words, memory, sampling=1.0).logits)
        require_close(drawn[0][:, 0], whole.logits[:, 0], "with sampling, the first word is read as it is given")
        require_close(drawn[0], drawn[1], "with sampling=1, all words but the first are drawn")


def _check_gradients(decoder: Any, ids: Tensor, cells: Tensor) -> None:
    """Compare the gradient of each parameter with a numerical one along a random direction."""
    lengths = torch.tensor(LENGTHS)
    is_word = torch.arange(T) < lengths.unsqueeze(1)

    def loss() -> Tensor:
        output = run_decoder(decoder, ids, decoder.prepare(cells), lengths=lengths)
        return output.logits[is_word].sin().sum() + output.weights[is_word].square().sum()

    decoder.zero_grad()
    loss().backward()
    for name, parameter in decoder.named_parameters():
        if not parameter.requires_grad:
            continue
        require(parameter.grad is not None, f"every parameter gets a gradient; {name} gets none")
        direction, epsilon = noise(*parameter.shape), 1e-6
        slope = (parameter.grad * direction).sum()
        with torch.no_grad():
            values = []
            for sign in (1, -2):
                parameter += sign * epsilon * direction
                values.append(loss())
            parameter += epsilon * direction
        expected = (values[0] - values[1]) / (2 * epsilon)
        require_close(slope, expected, f"the gradient of {name} is that of what forward computes", 1e-5)
