"""Conversion of checkpoints of the PyTorch captioning tutorial, whose model is written anew here."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from hf_captioner import CaptionerModel, CaptionerProcessor
from hf_captioner.commands.convert import main
from hf_captioner.publishing.convert import convert, read_checkpoint, read_word_map

WORDS = ["a", "dog", "runs", "in", "the", "snow", "two", "children", "play", "t-shirt"]
# As in the tutorial, <pad> is 0, words follow from 1 on, and the other special tokens come last.
WORD_MAP = {word: i for i, word in enumerate(WORDS, start=1)}
WORD_MAP |= {"<unk>": 11, "<start>": 12, "<end>": 13, "<pad>": 0}
A, D, E, GRID = 7, 9, 8, 5  # sizes of attention, hidden state and embedding; rows of the grid


def zipped(name: str, data: bytes) -> bytes:
    """Return a compressed zip file with one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


class Encoder(nn.Module):
    """The tutorial's encoder: a ResNet without its last two children, pooled to `(B, GRID, GRID, C)`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.resnet = nn.Sequential(*list(getattr(torchvision.models, name)().children())[:-2])

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(self.resnet(pixels), GRID).movedim(1, 3)


class Attention(nn.Module):
    """The layers of the tutorial's attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoder_att, self.decoder_att = nn.Linear(channels, A), nn.Linear(D, A)
        self.full_att = nn.Linear(A, 1)


class Decoder(nn.Module):
    """The tutorial's decoder, which reads the words of captions one by one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = Attention(channels)
        self.embedding = nn.Embedding(len(WORD_MAP), E)
        self.decode_step = nn.LSTMCell(E + channels, D)
        self.init_h, self.init_c = nn.Linear(channels, D), nn.Linear(channels, D)
        self.f_beta = nn.Linear(D, channels)
        self.fc = nn.Linear(D, len(WORD_MAP))

    def forward(self, grid: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `(B, T, V)` and attention weights `(B, T, P)` for captions `(B, T)`."""
        cells = grid.flatten(1, 2)
        h, c = self.init_h(cells.mean(1)), self.init_c(cells.mean(1))
        logits, maps = [], []
        attention = self.attention
        for word in captions.unbind(1):
            hidden = (attention.encoder_att(cells) + attention.decoder_att(h)[:, None]).clamp(min=0)
            alpha = attention.full_att(hidden)[..., 0].softmax(1)
            context = self.f_beta(h).sigmoid() * (alpha[..., None] * cells).sum(1)
            h, c = self.decode_step(torch.cat([self.embedding(word), context], 1), (h, c))
            logits.append(self.fc(h))
            maps.append(alpha)
        return torch.stack(logits, 1), torch.stack(maps, 1)


def build(name: str = "resnet18", channels: int = 512) -> tuple[Encoder, Decoder]:
    """Build the tutorial's model with random weights."""
    torch.manual_seed(0)
    encoder, decoder = Encoder(name), Decoder(channels)
    with torch.no_grad():
        for _ in range(20):  # batch-norm statistics that keep the cells within a few units
            encoder(torch.randn(4, 3, 64, 64))
        for parameter in decoder.parameters():
            parameter.mul_(2)
    return encoder.eval(), decoder.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `checkpoint.pth`, `modules.pth` as the tutorial itself saves them, and `words.json`."""
    folder = tmp_path_factory.mktemp("tutorial")
    encoder, decoder = build()
    torch.save({"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}, folder / "checkpoint.pth")
    torch.save({"encoder": encoder, "decoder": decoder}, folder / "modules.pth")
    (folder / "words.json").write_text(json.dumps(WORD_MAP))
    return folder


def read_and_convert(checkpoint: Path, files: Path, name: str = "resnet18") -> tuple[CaptionerModel, Any]:
    """Convert a checkpoint with the word map of `files`."""
    return convert(read_checkpoint(checkpoint), read_word_map(files / "words.json"), encoder_name=name, grid_size=GRID)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "channels"), [("resnet18", 512), pytest.param("resnet101", 2048, marks=pytest.mark.slow)]
)
def test_logits_and_attention_weights_stay_the_same(name: str, channels: int, files: Path, tmp_path: Path) -> None:
    encoder, decoder = build(name, channels)
    # DataParallel prepends "module." to every name.
    weights = {f"module.{key}": tensor for key, tensor in decoder.state_dict().items()}
    torch.save({"encoder": encoder.state_dict(), "decoder": weights, "epoch": 3}, tmp_path / "checkpoint.pth")
    model, processor = read_and_convert(tmp_path / "checkpoint.pth", files, name)

    pixels = torch.randn(3, 3, 96, 64)
    captions = torch.tensor([[12, 1, 2, 3, 4, 5, 6], [12, 7, 8, 9, 13, 0, 0], [12, 11, 10, 10, 1, 2, 2]])
    words = sorted(WORD_MAP, key=WORD_MAP.__getitem__)
    new_ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids(words))
    # In single precision, convolutions differ in the last digits with the memory layout of the pixels.
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-3)):
        logits, maps = decoder.to(dtype)(encoder.to(dtype)(pixels.to(dtype)), captions)
        output = model.to(dtype)(
            pixel_values=pixels.to(dtype), decoder_input_ids=new_ids[captions], output_attentions=True
        )
        assert logits.std() > 0.1 and maps.std() > 1e-3
        assert torch.allclose(output.logits[..., new_ids], logits, rtol=0, atol=tolerance), dtype
        assert torch.allclose(output.cross_attentions[0][:, 0], maps, rtol=0, atol=tolerance), dtype


def test_the_command_saves_a_captioner(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(files / "checkpoint.pth"), str(files / "words.json"), str(tmp_path / "captioner")]
    main([*arguments, "--encoder-name", "resnet18"])
    assert "resnet18 and 14 words" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not an empty folder"):
        main(arguments)
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
    """An object that touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_code_in_a_checkpoint_is_run(files: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Command(tmp_path / "run")))
    torch.save({"encoder": {}, "decoder": Command(tmp_path / "run")}, tmp_path / "hidden.pth")
    for path in (files / "modules.pth", tmp_path / "evil.pth", tmp_path / "hidden.pth"):
        with pytest.raises(ValueError, match=r"more than weights.*state_dict\(\)"):
            read_checkpoint(path)
    assert not (tmp_path / "run").exists()


def test_the_command_in_the_error_extracts_the_state_dicts(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="python -c ") as error:
        read_checkpoint(files / "modules.pth")
    command = str(error.value).rpartition("python -c ")[2]
    tests = Path(__file__).resolve().parent
    # Unpickling the modules imports this file.
    program = f"cd '{tmp_path}' && PYTHONPATH='{tests}:{tests.parent}' '{sys.executable}' -c {command}"
    subprocess.run(["bash", "-c", program], check=True)
    expected = read_checkpoint(files / "checkpoint.pth")["decoder"]["fc.weight"]
    assert torch.equal(read_checkpoint(tmp_path / "state_dicts.pth")["decoder"]["fc.weight"], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("encoder"), "no state dict under 'encoder'"),
        (lambda parts: parts.update(decoder=[torch.ones(1)]), "no state dict under 'decoder'"),
        (lambda parts: parts["decoder"].pop("f_beta.bias"), r"not the tutorial's.*it lacks f_beta\.bias"),
        (lambda parts: parts["decoder"].update(extra=torch.ones(1)), "it has extra"),
        (lambda parts: parts["decoder"].update({"embedding.weight": torch.ones(3, E)}), "has 3 words and .* 14"),
        (lambda parts: parts["decoder"].update({"fc.weight": torch.ones(14, 3)}), "another size are output.weight"),
        (lambda parts: parts["encoder"].pop("resnet.0.weight"), r"encoder is not.*it lacks conv1\.weight"),
        (lambda parts: parts.update(encoder=Encoder("resnet34").state_dict()), "with resnet18: it has layer1.2"),
    ],
)
def test_unsuitable_checkpoints_are_refused(change: Any, message: str, files: Path, tmp_path: Path) -> None:
    parts = torch.load(files / "checkpoint.pth")
    change(parts)
    torch.save(parts, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=message):
        read_and_convert(tmp_path / "checkpoint.pth", files)


def test_a_checkpoint_of_another_resnet_is_refused(files: Path) -> None:
    with pytest.raises(ValueError, match=r"cells of 512 channels, but resnet50 has 2048.*--encoder_name"):
        read_and_convert(files / "checkpoint.pth", files, "resnet50")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "lacks <unk>"),
        ('{"a": 1, "b": 3}', "does not number its words"),
        ('{"a": 0, "<unk>": 1, "<end>": 2}', "lacks <pad>, <start>"),
    ],
)
def test_unsuitable_word_maps_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_word_map(tmp_path / "words.json")


def test_an_incomplete_checkpoint_is_refused(files: Path, tmp_path: Path) -> None:
    half = (files / "checkpoint.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(half[: len(half) // 2])
    with pytest.raises(ValueError, match="incomplete"):
        read_checkpoint(tmp_path / "half.pth")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "an empty file"),
        (b"hello", "a text file"),
        (b'{"a": 1}', "JSON"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (zipped("a.txt", b"x"), "another zip file"),
        (zipped("a/data.pkl", bytes(10**6)), "a compressed zip file"),
        (b'\x10\0\0\0\0\0\0\0{"a": 1}', "a safetensors file"),
        (bytes(range(256)), "not written by torch.save"),
        (bytes(999), "not written by torch.save"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_another_kind_are_named(data: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "file.pth").write_bytes(data)
    with pytest.raises(ValueError, match=kind):
        read_checkpoint(tmp_path / "file.pth")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_checkpoint(tmp_path)


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    torch.save({"encoder": {}, "decoder": {"a": torch.zeros(1).expand(10**6, 10**6)}}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="larger than the file"):
        read_checkpoint(tmp_path / "file.pth")
