"""Rewards of sampled captions, and the objective that trains on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_captioner import CaptionerModel, CaptionerProcessor
from hf_captioner.metrics.scores import CiderD
from hf_captioner.model.modes import in_evaluation
from hf_captioner.model.objectives import cross_entropy, leave_one_out_mean, self_critical
from hf_captioner.training import rewards
from hf_captioner.training.rewards import END, CaptionReward, Rewards, sample_captions

CAPTIONS = [
    ["A dog runs on the beach.", "a brown dog is running"],
    ["two children play in the snow", "children are playing"],
    ["a man climbs a rock", "A climber on a rock wall."],
]


@pytest.fixture
def photos_cells(
    tiny_model: Callable[..., CaptionerModel], processor: CaptionerProcessor, photos: list
) -> torch.Tensor:
    """Return the cells of the photos."""
    with torch.no_grad():
        return tiny_model().encoder(processor(images=photos)["pixel_values"]).last_hidden_state


def test_a_reward_is_cider_d_with_end_as_a_word() -> None:
    reward = CaptionReward(CAPTIONS)
    tokens = [[(*caption.lower().rstrip(".").split(), END) for caption in row] for row in CAPTIONS]
    cider = CiderD(tokens)
    samples = [["a dog runs", "two dogs"], ["children play", "a rock"]]
    found = reward([0, 1], samples, torch.tensor([[True, True], [True, False]]))
    words = [[("a", "dog", "runs", END), ("two", "dogs", END)], [("children", "play", END), ("a", "rock")]]
    expected = [[cider.scores([w], [tokens[image]])[0] for w in words[image]] for image in (0, 1)]
    assert found.tolist() == [pytest.approx(row) for row in expected]
    assert found.max() > 0


def test_a_caption_without_an_end_gets_less() -> None:
    reward = CaptionReward(CAPTIONS)
    whole, broken = reward([2], [["a man climbs a rock", "a man climbs a rock"]], torch.tensor([[True, False]]))[0]
    assert whole > broken > 0


def test_rewards_are_mixed_by_weight() -> None:
    ended = torch.ones(1, 2, dtype=torch.bool)
    samples = [["a dog runs on a beach", "a dog"]]
    cider = CaptionReward(CAPTIONS)([0], samples, ended)
    bleu = CaptionReward(CAPTIONS, cider_weight=0.0, bleu_weight=1.0)([0], samples, ended)
    mixed = CaptionReward(CAPTIONS, cider_weight=2.0, bleu_weight=0.5)([0], samples, ended)
    assert 0 < bleu[0, 1] < bleu[0, 0] < 1
    assert torch.allclose(mixed, 2 * cider + 0.5 * bleu)


def test_baseline_is_the_mean_of_the_other_samples() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert leave_one_out_mean(rewards).tolist() == [[4.0, 3.5, 1.5], [1.5, 1.5, 0.0]]


def test_self_critical_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [5.0, 5.0]]])
    labels = torch.tensor([[0, 1], [1, -100]])
    loss = self_critical(logits, labels, torch.tensor([2.0, -1.0]))
    assert loss.item() == pytest.approx((2 * 2.0 - 1.0) * torch.tensor(2.0).log().item() / 3)


def test_expected_gradient_is_that_of_the_expected_reward() -> None:
    """The expectation is exact: over all captions of two words, by their probabilities."""
    torch.manual_seed(0)
    table = torch.randn(3, 3, dtype=torch.double, requires_grad=True)  # log p of a word after a word, word 0 first
    words = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # (9, 2)
    rewards = torch.randn(9, dtype=torch.double)
    logits = torch.stack([table[0].expand(9, 3), table[words[:, 0]]], 1)  # (9, 2, 3)
    log_probs = logits.log_softmax(2).gather(2, words.unsqueeze(2)).sum((1, 2))
    expected = torch.autograd.grad((log_probs.exp() * rewards).sum(), table, retain_graph=True)[0]
    weighted = 9 * log_probs.exp().detach() * (rewards - 0.7)  # any baseline
    found = torch.autograd.grad(self_critical(logits, words, weighted), table)[0]
    assert torch.allclose(found * 2, -expected, atol=1e-5)  # the mean is over 9 captions of 2 words


def test_samples_are_labels(
    tiny_model: Callable[..., CaptionerModel], processor: CaptionerProcessor, photos: list
) -> None:
    model = tiny_model(seed=2, scale=4).train()
    model.generation_config.update(no_repeat_ngram_size=1)
    torch.manual_seed(0)
    with in_evaluation(model):
        cells = model.encoder(processor(images=photos)["pixel_values"]).last_hidden_state
    labels = sample_captions(model, cells, 6, top_k=0, max_length=9)
    assert model.training and labels.shape[:2] == (5, 6) and labels.shape[2] <= 8
    for caption in labels.flatten(0, 1).tolist():
        words = [word for word in caption if word != -100]
        assert caption == words + [-100] * (len(caption) - len(words))
        assert 3 not in words[:-1] and (words[-1] == 3 or len(words) == labels.shape[2])
    assert len({tuple(caption) for caption in labels[0].tolist()}) > 1
    likeliest = sample_captions(model, cells, 2, top_k=1, max_length=9)
    assert torch.equal(likeliest[:, 0], likeliest[:, 1])


@pytest.mark.parametrize(("top_k", "interval"), [(1, 1), (2, 1), (0, 1), (2, 3)])
def test_samples_are_as_frequent_as_they_are_likely(
    tiny_model: Callable[..., CaptionerModel],
    photos_cells: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    top_k: int,
    interval: int,
) -> None:
    """Also when other captions of the image have left the batch before; likely by the plain forward pass."""
    monkeypatch.setitem(rewards.STEPS_BETWEEN_CHECKS, "cpu", interval)
    model, num_samples = tiny_model(seed=3, scale=5), 2000
    with torch.no_grad():
        model.decoder.output.bias[3] += 4  # <end>, so that captions differ in length
    model.generation_config.suppress_tokens = [0, 8]
    torch.manual_seed(0)
    labels = sample_captions(model, photos_cells, num_samples, top_k=top_k, max_length=8)
    for cells, row in zip(photos_cells, labels, strict=True):
        captions, counts = row.unique(dim=0, return_counts=True)
        with torch.no_grad():
            logits = model(cells=cells[None], labels=captions[None]).logits[0]
        logits[..., [0, 8]] = -torch.inf
        if top_k:
            logits[logits < logits.topk(top_k)[0][..., -1:]] = -torch.inf
        is_word = captions != -100
        words = logits.log_softmax(2).gather(2, captions.clamp(min=0).unsqueeze(2)).squeeze(2)
        probabilities = words.masked_fill(~is_word, 0).sum(1).exp()
        error = (probabilities * (1 - probabilities) / num_samples).sqrt()
        assert ((counts / num_samples - probabilities).abs() < 5 * error + 1e-3).all()
    assert top_k == 1 or len((labels != -100).sum(2).unique()) > 3


def test_rewarded_words_become_more_frequent(
    tiny_model: Callable[..., CaptionerModel], processor: CaptionerProcessor, photos: list
) -> None:
    model = tiny_model(seed=0)
    cells = model.encoder(processor(images=photos)["pixel_values"]).last_hidden_state.detach()
    optimizer = torch.optim.Adam(model.decoder.parameters(), lr=3e-3)
    torch.manual_seed(0)
    means = []
    for _ in range(40):
        labels = sample_captions(model, cells, 8, top_k=0, max_length=7)
        rewards = (labels == 7).sum(2).float()
        loss = self_critical(
            model(cells=cells, labels=labels).logits.flatten(0, 1),
            labels.flatten(0, 1),
            (rewards - leave_one_out_mean(rewards)).flatten(),
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(rewards.mean().item())
    assert sum(means[-5:]) / 5 > 5 * (sum(means[:5]) / 5 + 0.1)


def test_likelihood_of_reference_captions_is_added_by_weight(
    tiny_model: Callable[..., CaptionerModel], processor: CaptionerProcessor, photos: list
) -> None:
    """One pass over sampled and reference captions gives the sum of both losses."""
    model = tiny_model(seed=2, scale=2, output_dropout=0.0, label_smoothing=0.1)
    references = processor(text=[["a dog runs"], ["two small children jump over a bench"]])["labels"]  # (2, 1, T)
    batch = {
        "labels": references,
        "pixel_values": processor(images=photos[:2])["pixel_values"],
        "index": torch.arange(2),
    }
    settings = {"num_samples": 3, "top_k": 0, "max_length": 6}
    reward = CaptionReward(CAPTIONS[:2])
    torch.manual_seed(0)
    objective = Rewards(model, processor, reward, **settings, likelihood_weight=0.25)
    prepared = objective.prepare(batch, 0.0)
    prepared["rewards"] = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.5, 3.0]])
    prepared["advantages"] = torch.tensor([[-1.0, 0.5, 4.0], [-0.5, 1.0, 2.0]])
    sampled, inputs = prepared["labels"], {"pixel_values": batch["pixel_values"]}
    model.eval()
    rewarded = self_critical(
        model(**inputs, labels=sampled).logits.flatten(0, 1),
        sampled.flatten(0, 1),
        prepared["advantages"].flatten(),
        40,
    )
    likelihood = cross_entropy(
        model(**inputs, labels=references).logits.flatten(0, 1), references.flatten(0, 1), 0.1, 40
    )
    model.freeze_encoder()  # its batch norms would see only these images
    loss, metric = objective.loss(model, prepared, num_items_in_batch=40, num_captions=6)
    assert (
        torch.allclose(loss, rewarded + 0.25 * likelihood, atol=1e-5) and abs(likelihood) > 1 and abs(rewarded) > 0.01
    )
    assert metric.item() == pytest.approx(12.5 / 6)
    with pytest.raises(ValueError, match="reward_likelihood_weight is -1"):
        Rewards(model, processor, reward, **settings, likelihood_weight=-1)
    without = Rewards(model, processor, reward, **settings)
    loss, _ = without.loss(model, {name: prepared[name] for name in prepared if name != "reference_labels"}, 40, 6)
    assert torch.allclose(loss, rewarded, atol=1e-5)


@pytest.mark.parametrize("baseline", ["others", "greedy"])
def test_advantages_are_rewards_less_the_baseline(
    tiny_model: Callable[..., CaptionerModel], processor: CaptionerProcessor, photos: list, baseline: str
) -> None:
    model = tiny_model(seed=2, scale=2)
    reward = CaptionReward(CAPTIONS[:2])
    reward._reward = lambda caption, ended, references: len(caption) + 100.0 * ended  # differs between captions
    objective = Rewards(model, processor, reward, num_samples=3, top_k=0, max_length=6, baseline=baseline)
    pixel_values = processor(images=photos[:2])["pixel_values"]
    batch = {"labels": torch.zeros(2, 1, 1), "index": torch.arange(2), "pixel_values": pixel_values}
    torch.manual_seed(0)
    encoded: list[object] = []
    model.encoder.register_forward_hook(lambda *call: encoded.append(call))
    prepared = objective.prepare(batch, 0.0)
    assert len(encoded) == 1
    rewards = prepared["rewards"]
    assert len(rewards.unique()) > 3
    if baseline == "others":
        expected = torch.stack([rewards[:, [1, 2]], rewards[:, [0, 2]], rewards[:, [0, 1]]], 2).mean(1)
    else:
        model.eval()
        sequences = model.generate(pixel_values, do_sample=False, num_beams=1, max_length=6)
        ended = (sequences == model.config.eos_token_id).any(1)
        expected = reward([0, 1], [[text] for text in processor.batch_decode(sequences)], ended[:, None])
        assert expected.shape == (2, 1) and not torch.isin(expected, rewards).all()
    assert torch.allclose(prepared["advantages"], rewards - expected)


def test_impossible_settings_of_a_baseline_are_refused(
    tiny_model: Callable[..., CaptionerModel], processor: CaptionerProcessor
) -> None:
    for given, message in [
        ({"num_samples": 1}, "with reward_baseline 'others' it must be at least 2"),
        ({"num_samples": 0, "baseline": "greedy"}, "it must be at least 1"),
        ({"num_samples": 5, "baseline": "mean"}, "choose from others, greedy"),
    ]:
        with pytest.raises(ValueError, match=message):
            Rewards(tiny_model(), processor, CaptionReward(CAPTIONS), top_k=0, max_length=6, **given)


def test_gradients_of_rewards_are_computed_with_dropout(
    tiny_model: Callable[..., CaptionerModel], processor: CaptionerProcessor, photos: list
) -> None:
    model = tiny_model(seed=2, scale=2, output_dropout=0.5)
    model.freeze_encoder()
    objective = Rewards(model, processor, CaptionReward(CAPTIONS[:2]), num_samples=2, top_k=0, max_length=6)
    batch = {"labels": torch.zeros(2, 1, 1), "index": torch.arange(2)}
    batch |= {"pixel_values": processor(images=photos[:2])["pixel_values"]}
    prepared = {**objective.prepare(batch, 0.0), "advantages": torch.tensor([[-1.0, 1.0], [-3.0, 3.0]])}
    losses = {objective.loss(model, prepared, 8, 4)[0].item() for _ in range(3)}
    assert len(losses) == 3
