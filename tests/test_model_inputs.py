"""What a captioner is given: the right value for what makes sense, and one line that says what to do for the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Seq2SeqTrainer, Seq2SeqTrainingArguments, pipeline
from transformers.modeling_outputs import BaseModelOutput

from hf_captioner import CaptionCollator, CaptionerModel, CaptionerProcessor

TinyModel = Callable[..., CaptionerModel]
PAD, START, END = 1, 2, 3
WORDS = torch.tensor([[8, 5, 9, 6, END], [7, 6, END, -100, -100]])
READ = torch.tensor([[START, 8, 5, 9, 6], [START, 7, 6, PAD, PAD]])


def masked(*positions: tuple[int, int]) -> Tensor:
    """Return `WORDS` with some labels that do not count."""
    labels = WORDS.clone()
    labels[tuple(zip(*positions, strict=True))] = -100
    return labels


@pytest.fixture(scope="module")
def images(pixel_values: Tensor) -> Tensor:
    return pixel_values[:2]


@pytest.mark.parametrize(
    "labels",
    [WORDS, masked((0, 0), (0, 1)), masked((0, 2)), masked((0, 3), (0, 4)), masked((0, 0), (0, 3), (1, 0)),
     masked((1, 0), (1, 1), (1, 2))],
)  # fmt: skip
@pytest.mark.parametrize("form", ["one caption", "several captions"])
def test_labels_that_do_not_count_are_read_and_not_learned(
    tiny_model: TinyModel, images: Tensor, labels: Tensor, form: str
) -> None:
    model = tiny_model(scale=3, doubly_stochastic_weight=0.0)
    with torch.no_grad():
        log_probs = model(images, labels=WORDS).logits.log_softmax(-1).gather(2, WORDS.clamp(min=0).unsqueeze(2))
        given = [labels, READ]
        if form == "several captions":
            given = [torch.stack([part, part], 1) for part in given]
        loss = model(images, labels=given[0], decoder_input_ids=given[1]).loss
    assert loss.item() == pytest.approx(-log_probs.squeeze(2)[labels != -100].mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "read", "message"),
    [
        (masked((0, 0)), None, r"labels of caption 0 are \[-100, 5, .*Pad captions at their end; .* decoder_input_ids"),
        (WORDS.flip(1), None, r"labels of caption 1 are \[-100, -100, 3"),
        (masked((0, 0)), READ.masked_fill(READ == 8, PAD), "<pad> or <end> before the last word"),
        (WORDS, WORDS.clamp(min=PAD), "<pad> or <end> before the last word"),
        (WORDS, READ.flip(1), "<pad> or <end> before the last word"),
        (WORDS, READ[:, :3], "2 captions of 3 decoder_input_ids, but 2 of 5 labels"),
        (WORDS, READ.float(), r"decoder_input_ids are a tensor \(2, 5\) of torch.float32"),
        (WORDS, READ.tolist(), "decoder_input_ids are of type list"),
        (WORDS, READ + 1000, r"decoder_input_ids have the id \d+, but the vocabulary has the ids 0 to"),
        (WORDS.masked_fill(WORDS == 9, 1000), None, "labels have the id 1000, .* resize_token_embeddings"),
        (WORDS.masked_fill(WORDS == 9, -7), None, "labels have the id -7"),
        (torch.full((2, 4), -100), None, "All labels are -100"),
        (WORDS.float(), None, r"labels are a tensor \(2, 5\) of torch.float32"),
        (WORDS > 0, None, "of torch.bool"), (WORDS.tolist(), None, "labels are of type list"),
        (WORDS[0], None, r"a tensor \(5,\)"), (WORDS[:, :0], None, r"a tensor \(2, 0\)"),
        (WORDS[:1], None, "There are 2 images, but captions for 1"),
        (WORDS.repeat(2, 1), None, "There are 2 images, but captions for 4"),
    ],
)  # fmt: skip
def test_labels_that_have_no_right_loss_are_refused(
    tiny_model: TinyModel, images: Tensor, labels: Any, read: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model()(images, labels=labels, decoder_input_ids=read)


PROMPT = torch.tensor([[8, 5], [7, 6]])


def padded(start: list[int], end: list[int]) -> Tensor:
    return torch.cat([torch.tensor([start] * 2), PROMPT, torch.tensor([end] * 2)], 1).long()


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(("start", "end"), [([START], []), ([], [END]), ([PAD, PAD], [END]), ([START], [END, PAD])])
def test_prompts_of_tokenizers_are_continued(
    model: CaptionerModel, images: Tensor, start: list[int], end: list[int], num_beams: int
) -> None:
    settings = {"num_beams": num_beams, "max_length": 9}
    found = model.generate(images, decoder_input_ids=padded(start, end), **settings)
    assert torch.equal(found[:, :3], padded([START], [])) and END not in found[:, :4]
    assert torch.equal(found, model.generate(images, decoder_input_ids=padded([START], []), **settings))
    nothing = torch.tensor([[START, END]] * 2)
    assert torch.equal(
        model.generate(images, decoder_input_ids=nothing, **settings), model.generate(images, **settings)
    )


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[8, 5, END], [7, END, PAD]]), "prompts have 1 and 2 words"),
        (torch.tensor([[8, 5], [PAD, 7]]), "prompts have 1 and 2 words"),
        (torch.tensor([[8, END, 5]] * 2), r"prompt \[8, 3, 5\] has <end>"),
        (PROMPT[:1], "prompts for 1 images, but 2 images"), (PROMPT.float(), "torch.float32"),
        (PROMPT + 1000, "have the id 1005|have the id 1008"), (PROMPT.tolist(), "of type list"),
        (PROMPT[:, :0], r"a tensor \(2, 0\)"),
    ],
)  # fmt: skip
def test_prompts_without_a_meaning_are_refused(model: CaptionerModel, images: Tensor, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(images, decoder_input_ids=ids)


def test_captions_end_at_strings(model: CaptionerModel, processor: CaptionerProcessor, images: Tensor) -> None:
    def caption(**settings: Any) -> str:
        return processor.batch_decode(model.generate(images[:1], tokenizer=processor.tokenizer, **settings))[0]

    whole = caption(num_beams=1)
    stop = " ".join(whole.split()[1:3])
    assert caption(num_beams=1, stop_strings=[stop, "zebra"]) == whole[: whole.index(stop) + len(stop)]
    assert stop not in caption(num_beams=3, stop_strings=stop)[: -len(stop)]


def test_image_cells_are_taken_in_every_form(model: CaptionerModel, images: Tensor, cells: Tensor) -> None:
    expected = model.generate(images)
    for given in ({"cells": cells[:2]}, {"encoder_outputs": (cells[:2],)}, {"cells": cells[:2].double()},
                  {"encoder_outputs": BaseModelOutput(last_hidden_state=cells[:2])},
                  {"encoder_outputs": model.encoder(images)}):  # fmt: skip
        assert torch.equal(model.generate(**given), expected)
        assert model(**given, labels=WORDS).loss.item() == pytest.approx(model(images, labels=WORDS).loss.item())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x, c: {}, "No image is given"), (lambda x, c: {"pixel_values": x[0]}, r"a tensor \(3, 64, 64\)"),
        (lambda x, c: {"pixel_values": x.byte()}, "torch.uint8"),
        (lambda x, c: {"pixel_values": x[:0]}, "hold no image"), (lambda x, c: {"cells": c[0]}, r"a tensor \(16, "),
        (lambda x, c: {"cells": c[..., :5]}, "Image cells are"), (lambda x, c: {"cells": c[:0]}, "no image cells"),
        (lambda x, c: {"cells": c.long()}, "torch.int64"), (lambda x, c: {"cells": c.tolist()}, "of type list"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused(
    model: CaptionerModel, images: Tensor, cells: Tensor, given: Callable[..., dict[str, Any]], message: str
) -> None:
    for use in (model.generate, lambda **inputs: model(**inputs, labels=WORDS)):
        with pytest.raises(ValueError, match=message):
            use(**given(images, cells[:2]))


def test_images_with_values_that_are_no_numbers_are_named(model: CaptionerModel, images: Tensor) -> None:
    broken = images.clone()
    broken[1, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match=r"images \[1\] have infinite values or NaN"):
        model.generate(broken)


@pytest.mark.parametrize("parts", ["all", "encoder"])
def test_half_precision_takes_the_images_of_the_processor(
    tiny_model: TinyModel, images: Tensor, parts: str, tmp_path: Path
) -> None:
    model = tiny_model(seed=2, scale=8)
    (model if parts == "all" else model.encoder).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for each in (model, AutoModelForImageTextToText.from_pretrained(tmp_path)) if parts == "all" else (model,):
        assert each.encoder.dtype == torch.bfloat16 and each.generate(images).shape[0] == 2
        assert each(images, labels=WORDS).loss.isfinite()


@pytest.mark.parametrize("tied", [False, True])
def test_added_words_are_learned_and_kept(
    tiny_model: TinyModel, processor: CaptionerProcessor, images: Tensor, tmp_path: Path, tied: bool
) -> None:
    model = tiny_model(tie_word_embeddings=tied, embedding_size=32)
    tokenizer = type(processor.tokenizer).from_pretrained(_saved(processor, tmp_path / "tokenizer"))
    own = CaptionerProcessor(processor.image_processor, tokenizer)
    tokenizer.add_tokens(["corgi"])
    labels = own(text=["a corgi", "a corgi"])["labels"]
    assert labels[0, 1] == len(tokenizer) - 1 == model.config.vocab_size
    with torch.no_grad():
        before = model(images, decoder_input_ids=READ).logits
        model.resize_token_embeddings(len(tokenizer))
        after = model(images, decoder_input_ids=READ).logits
    assert torch.allclose(after[..., :-1], before, atol=1e-6) and model.config.vocab_size == len(tokenizer)
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(images, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(tmp_path)
    again = CaptionerModel.from_pretrained(tmp_path)
    assert again(images, labels=labels).loss.item() < losses[0] / 2
    assert tied or own.batch_decode(again.generate(images)) == ["a corgi", "a corgi"]
    assert (again.decoder.output.weight is again.decoder.embedding.weight) == tied
    again.set_input_embeddings(nn.Embedding(9, 32))
    again.set_output_embeddings(nn.Linear(32, 9))
    assert again.get_input_embeddings().num_embeddings == again.get_output_embeddings().out_features == 9


def _saved(processor: CaptionerProcessor, folder: Path) -> Path:
    processor.tokenizer.save_pretrained(folder)
    return folder


def test_several_captions_come_through_the_trainer_that_generates(
    model: CaptionerModel, processor: CaptionerProcessor, photos: list[Image.Image], tmp_path: Path
) -> None:
    captions = [["a man", "the woman in the snow", "two small children"], ["a black dog"], ["a man in a red shirt"]]
    rows = [{"image": photo, "captions": texts} for photo, texts in zip(photos, captions, strict=False)]
    quiet = {"remove_unused_columns": False, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, per_device_eval_batch_size=2, generation_num_beams=1, **quiet
    )
    # The trainer changes the generation config.
    trainer = Seq2SeqTrainer(copy.deepcopy(model), arguments, CaptionCollator(processor), eval_dataset=rows)
    result = trainer.predict(rows)
    assert result.label_ids.shape == (3, 3, 31) and result.predictions.shape == (3, 31)
    assert (result.label_ids[2, 0] != -100).sum() == 7 and (result.label_ids[2, 1:] == -100).all()
    with pytest.raises(ValueError, match=r"Rows have no captions and no image, but nothing\. Set remove_unused"):
        CaptionCollator(processor)([{}])


def test_the_pipeline_of_transformers_continues_texts(captioner_folder: Path, photos: list[Image.Image]) -> None:
    captioner = pipeline("image-text-to-text", model=captioner_folder)
    (one,) = captioner(images=photos[0], text="a black")
    both = captioner(images=photos[:2], text=["a black", "the woman"])
    assert one == both[0] and [each["generated_text"][:7] for each in both] == ["a black", "the wom"]


def test_lora_trains_and_merges(tiny_model: TinyModel, images: Tensor) -> None:
    peft = pytest.importorskip("peft")
    for target in ("all-linear", ["step_to_lstm", "key_to_score", "output"]):
        config = peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False)
        model = peft.get_peft_model(tiny_model(scale=3), config)
        model(images, labels=WORDS).loss.backward()
        trained = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
        assert len(trained) > 5 and all(grad is not None and grad.any() for grad in trained.values())
        logits = model.eval()(images, labels=WORDS).logits
        merged = model.merge_and_unload()
        assert torch.allclose(merged(images, labels=WORDS).logits, logits, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_layers_quantized_by_torch_are_used(tiny_model: TinyModel, images: Tensor) -> None:
    model = tiny_model(decoder_kwargs={"num_layers": 2}, attention_type="adaptive")
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    loss = quantized(images, labels=WORDS).loss.item()
    assert loss == pytest.approx(model(images, labels=WORDS).loss.item(), rel=0.05)
    assert quantized.generate(images).shape[0] == 2
