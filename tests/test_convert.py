"""Checkpoints of the PyTorch captioning tutorial, written anew here from what its modules compute."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from hf_captioner import CaptionerModel, CaptionerProcessor
from hf_captioner.publishing.convert import convert, main, read_checkpoint, read_word_map

WORDS = ["a", "dog", "runs", "in", "the", "snow", "two", "children", "play", "t-shirt"]
# Their ids begin at 1; the special words have the last ones, and 0.
WORD_MAP = {word: i for i, word in enumerate(WORDS, start=1)}
WORD_MAP |= {"<unk>": 11, "<start>": 12, "<end>": 13, "<pad>": 0}
A, D, E, GRID = 7, 9, 8, 5


class Encoder(nn.Module):
    """A ResNet without its last two children, pooled to a square grid with the channels last."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.resnet = nn.Sequential(*list(getattr(torchvision.models, name)().children())[:-2])

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(self.resnet(pixels), GRID).movedim(1, 3)


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoder_att, self.decoder_att = nn.Linear(channels, A), nn.Linear(D, A)
        self.full_att = nn.Linear(A, 1)


class Decoder(nn.Module):
    """Reads captions `(B, T)` of images `(B, P, C)`, one word after the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = Attention(channels)
        self.embedding = nn.Embedding(len(WORD_MAP), E)
        self.decode_step = nn.LSTMCell(E + channels, D)
        self.init_h, self.init_c = nn.Linear(channels, D), nn.Linear(channels, D)
        self.f_beta = nn.Linear(D, channels)
        self.fc = nn.Linear(D, len(WORD_MAP))

    def forward(self, grid: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        cells = grid.flatten(1, 2)
        h, c = self.init_h(cells.mean(1)), self.init_c(cells.mean(1))
        logits, maps = [], []
        for word in captions.unbind(1):
            look = self.attention
            hidden = (look.encoder_att(cells) + look.decoder_att(h)[:, None]).clamp(min=0)
            alpha = look.full_att(hidden)[..., 0].softmax(1)
            context = self.f_beta(h).sigmoid() * (alpha[..., None] * cells).sum(1)
            h, c = self.decode_step(torch.cat([self.embedding(word), context], 1), (h, c))
            logits.append(self.fc(h))
            maps.append(alpha)
        return torch.stack(logits, 1), torch.stack(maps, 1)


def build(name: str = "resnet18", channels: int = 512) -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    encoder, decoder = Encoder(name), Decoder(channels)
    with torch.no_grad():
        for _ in range(20):  # statistics that keep the cells within a few units
            encoder(torch.randn(4, 3, 64, 64))
        for parameter in decoder.parameters():
            parameter.mul_(2)
    return encoder.eval(), decoder.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `checkpoint.pth` and `words.json`."""
    folder = tmp_path_factory.mktemp("tutorial")
    encoder, decoder = build()
    torch.save({"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}, folder / "checkpoint.pth")
    (folder / "words.json").write_text(json.dumps(WORD_MAP))
    return folder


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "channels"), [("resnet18", 512), pytest.param("resnet101", 2048, marks=pytest.mark.slow)]
)
def test_logits_and_maps_are_the_same(name: str, channels: int, tmp_path: Path) -> None:
    encoder, decoder = build(name, channels)
    # As several devices leave it, with names of their own.
    weights = {f"module.{key}": tensor for key, tensor in decoder.state_dict().items()}
    torch.save({"encoder": encoder.state_dict(), "decoder": weights, "epoch": 3}, tmp_path / "checkpoint.pth")
    (tmp_path / "words.json").write_text(json.dumps(WORD_MAP))
    folder = tmp_path / "captioner"
    paths = [str(tmp_path / "checkpoint.pth"), str(tmp_path / "words.json"), str(folder)]
    main([*paths, "--encoder-name", name, "--grid-size", str(GRID)])
    model = CaptionerModel.from_pretrained(folder).eval()
    tokenizer = CaptionerProcessor.from_pretrained(folder).tokenizer

    pixels = torch.randn(3, 3, 96, 64)
    captions = torch.tensor([[12, 1, 2, 3, 4, 5, 6], [12, 7, 8, 9, 13, 0, 0], [12, 11, 10, 10, 1, 2, 2]])
    names = {index: word for word, index in WORD_MAP.items()}
    new_id = torch.tensor([tokenizer.convert_tokens_to_ids(names[index]) for index in range(len(names))])
    # In single precision, convolutions differ in the last digits with the order of the pixels in memory.
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-3)):
        logits, maps = decoder.to(dtype)(encoder.to(dtype)(pixels.to(dtype)), captions)
        output = model.to(dtype)(
            pixel_values=pixels.to(dtype), decoder_input_ids=new_id[captions], output_attentions=True
        )
        assert logits.std() > 0.1 and maps.std() > 1e-3
        assert torch.allclose(output.logits[..., new_id], logits, rtol=0, atol=tolerance), dtype
        assert torch.allclose(output.cross_attentions[0][:, 0], maps, rtol=0, atol=tolerance), dtype


def test_converted_captioner_captions(files: Path, tmp_path: Path) -> None:
    paths = [files / "checkpoint.pth", files / "words.json", tmp_path / "captioner"]
    program = [sys.executable, "-m", "hf_captioner.publishing.convert", *map(str, paths), "--encoder-name", "resnet18"]
    result = subprocess.run(program, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "resnet18 and 14 words" in result.stdout
    model = CaptionerModel.from_pretrained(tmp_path / "captioner").eval()
    processor = CaptionerProcessor.from_pretrained(tmp_path / "captioner")
    inputs = processor(images=Image.new("RGB", (300, 200), "red"), text="A dog in the T-shirt, barking.")
    assert inputs["pixel_values"].shape == (1, 3, 256, 256)
    assert processor.decode(inputs["labels"][0]) == "a dog in the t-shirt"
    assert processor.tokenizer.convert_ids_to_tokens(inputs["labels"][0].tolist())[-2:] == ["<unk>", "<end>"]
    (caption,) = processor.batch_decode(model.generate(inputs["pixel_values"]))
    assert set(caption.split()) <= set(WORDS)
    assert model.encoder.part.grid_size(256, 256) == (14, 14)


class Command:
    """What reading a pickle carelessly would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_run(files: Path, tmp_path: Path) -> None:
    encoder, decoder = build()
    torch.save({"encoder": encoder, "decoder": decoder}, tmp_path / "modules.pth")  # as the tutorial does
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Command(tmp_path / "run")))
    torch.save({"encoder": {}, "decoder": Command(tmp_path / "run")}, tmp_path / "hidden.pth")
    for name in ("modules.pth", "evil.pth", "hidden.pth"):
        with pytest.raises(ValueError, match=r"more than weights.*state_dict\(\)"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "run").exists()


def test_state_dicts_are_taken_out_as_the_error_says(tmp_path: Path) -> None:
    encoder, decoder = build()
    torch.save({"encoder": encoder, "decoder": decoder}, tmp_path / "modules.pth")
    with pytest.raises(ValueError, match="python -c ") as error:
        read_checkpoint(tmp_path / "modules.pth")
    command = str(error.value).rpartition("python -c ")[2]
    tests = Path(__file__).resolve().parent
    program = f"cd '{tmp_path}' && PYTHONPATH='{tests}:{tests.parent}' '{sys.executable}' -c {command}"
    # Pickles name a module by where it was imported from, which is this file.
    subprocess.run(["bash", "-c", program], check=True)
    parts = read_checkpoint(tmp_path / "state_dicts.pth")
    assert torch.equal(parts["decoder"]["fc.weight"], decoder.fc.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("encoder"), "no state dict under 'encoder'"),
        (lambda parts: parts.update(decoder=[torch.ones(1)]), "no state dict under 'decoder'"),
        (lambda parts: parts["decoder"].pop("f_beta.bias"), r"not the tutorial's.*it lacks f_beta\.bias"),
        (lambda parts: parts["decoder"].update(extra=torch.ones(1)), "it has extra"),
        (lambda parts: parts["decoder"].update({"embedding.weight": torch.ones(3, E)}), "knows 3 words and .* 14"),
        (lambda parts: parts["decoder"].update({"fc.weight": torch.ones(14, 3)}), "another size are output.weight"),
        (lambda parts: parts["encoder"].pop("resnet.0.weight"), r"encoder is not.*it lacks conv1\.weight"),
        (lambda parts: parts.update(encoder=Encoder("resnet34").state_dict()), "with resnet18: it has layer1.2"),
    ],
)
def test_other_checkpoints_are_refused(change: Any, message: str, files: Path, tmp_path: Path) -> None:
    parts = torch.load(files / "checkpoint.pth")
    change(parts)
    torch.save(parts, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=message):
        convert(
            read_checkpoint(tmp_path / "checkpoint.pth"), read_word_map(files / "words.json"), encoder_name="resnet18"
        )


def test_other_resnet_is_named(files: Path) -> None:
    with pytest.raises(ValueError, match=r"cells of 512 channels, but those of resnet50 have 2048.*--encoder-name"):
        convert(read_checkpoint(files / "checkpoint.pth"), read_word_map(files / "words.json"), encoder_name="resnet50")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "has no <unk>"),
        ('{"a": 1, "b": 3}', "an id of its own"),
        ('{"a": 0, "<unk>": 1, "<end>": 2}', "has no <pad>, <start>"),
    ],
)
def test_other_word_maps_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_word_map(tmp_path / "words.json")


def test_files_that_are_not_there_or_not_whole(files: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="No word map at"):
        read_word_map(tmp_path / "none.json")
    half = (files / "checkpoint.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(half[: len(half) // 2])
    with pytest.raises(ValueError, match="not a whole one"):
        read_checkpoint(tmp_path / "half.pth")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model").touch()
    with pytest.raises(ValueError, match="exists already"):
        main([str(files / "checkpoint.pth"), str(files / "words.json"), str(tmp_path / "full")])
