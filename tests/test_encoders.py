from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_captioner import CaptionerModel
from hf_captioner.model.encoders import PooledTimmEncoder, TimmEncoder
from hf_captioner.testing import check_encoder

# Name, arguments, image size and grid of an architecture for each layout of features: (B, C, H, W), (B, H, W, C), and
# tokens with and without prefix tokens. The last one has blurred pooling.
ARCHITECTURES = [
    ("test_resnet", {}, (64, 96), (2, 3)),
    ("test_efficientnet", {}, (64, 64), (2, 2)),
    (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "window_size": 7, "embed_dim": 16, "num_heads": (1, 2, 4, 8)},
        (56, 56),
        (2, 2),
    ),
    ("test_vit", {"img_size": 64}, (64, 64), (4, 4)),
    ("vit_tiny_patch16_224", {"img_size": (32, 64), "depth": 1}, (32, 64), (2, 4)),
    ("resnetblur50", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}, (64, 64), (2, 2)),
]


@pytest.mark.parametrize(("name", "kwargs", "size", "grid"), ARCHITECTURES, ids=[row[0] for row in ARCHITECTURES])
def test_cells_form_the_grid(
    name: str, kwargs: dict[str, object], size: tuple[int, int], grid: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    encoder = TimmEncoder(name, **kwargs).eval()
    assert encoder.grid_size(*size) == grid
    with torch.no_grad():
        cells = encoder(torch.randn(2, 3, *size))
    assert cells.shape == (2, grid[0] * grid[1], encoder.hidden_size)


@pytest.mark.parametrize(("name", "kwargs", "size", "grid"), ARCHITECTURES, ids=[row[0] for row in ARCHITECTURES])
def test_keeps_its_contract(name: str, kwargs: dict[str, object], size: tuple[int, int], grid: tuple[int, int]) -> None:
    check_encoder(TimmEncoder, name, image_size=size, **kwargs)


def test_pooled_cells_form_the_same_grid_for_all_images() -> None:
    check_encoder(PooledTimmEncoder, "test_resnet", image_size=(64, 96), pooled_size=3)
    torch.manual_seed(0)
    encoder = PooledTimmEncoder("test_resnet", pooled_size=2, output_stride=16).eval()
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        fine = TimmEncoder.forward(encoder, pixel_values).view(2, 2, 2, 2, -1)  # 4 x 4 cells in 2 x 2 groups
        assert torch.allclose(encoder(pixel_values)[0], fine.mean((1, 3)).flatten(0, 1), atol=1e-6)
    assert encoder.grid_size(64, 64) == encoder.grid_size(96, 64) == (2, 2)
    with pytest.raises(ValueError, match="pooled_size is 0"):
        PooledTimmEncoder("test_resnet", pooled_size=0)


def test_refuses_unknown_names_arguments_and_image_sizes() -> None:
    with pytest.raises(ValueError, match=r"no model 'resnet1001'.*Similar"):
        TimmEncoder("resnet1001")
    with pytest.raises(ValueError, match="encoder_kwargs"):
        TimmEncoder("test_resnet", colour="red")
    with pytest.raises(ValueError, match="can't take images"):
        TimmEncoder("test_vit", img_size=64).grid_size(50, 50)


def test_encoder_weights_are_loaded_once_and_come_back(encoder_weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = CaptionerModel.from_encoder(
        "mobilenetv2_100",
        encoder_weights=encoder_weights,
        encoder_kwargs={"pad_type": "same"},
        data_config={"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        vocab_size=20,
        hidden_size=8,
    )
    stored = load_file(encoder_weights)["conv_stem.weight"]
    assert torch.equal(model.encoder.part.body.conv_stem.weight, stored.float())
    assert model.data_config["mean"] == (0.5, 0.5, 0.5)
    model.save_pretrained(tmp_path)
    assert "safetensors" not in (tmp_path / "config.json").read_text()  # no path of this machine
    reloaded = CaptionerModel.from_pretrained(tmp_path)
    assert torch.equal(reloaded.encoder.part.body.conv_stem.weight, stored.float())


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "expected"),
    [
        # Five convolutions of odd width with stride 2 look 0.5 + 1 + 2 + 4 + 8 pixels up and to the left.
        ("resnet18", {}, (224, 160), -15.5),
        # Patches, and pooling of pairs of pixels, leave every cell looking at its own part of the image.
        ("convnext_atto", {}, (224, 224), 0),
        ("vit_tiny_patch16_224", {"depth": 2}, (224, 224), 0),
        ("test_vit", {"img_size": 64}, (64, 64), 0),
    ],
)
def test_grid_lies_where_its_cells_look(
    name: str, kwargs: dict[str, object], size: tuple[int, int], expected: float
) -> None:
    torch.manual_seed(0)
    encoder = TimmEncoder(name, **kwargs)
    with torch.inference_mode():
        left, top, right, bottom = encoder.grid_box(*size)
    assert [left, top] == pytest.approx([expected] * 2, abs=1)
    assert (right - left, bottom - top) == pytest.approx((size[1], size[0]))
    assert encoder.training and all(parameter.grad is None for parameter in encoder.parameters())


def test_changed_pixels_change_the_cells_whose_boxes_hold_them() -> None:
    """On average, the change in the cells has its centre of mass at the changed pixels, wherever in a cell these are."""
    torch.manual_seed(0)
    encoder = TimmEncoder("resnet18", channels=(8, 16, 32, 64), zero_init_last=False).eval()
    height, width = 256, 320
    rows, columns = encoder.grid_size(height, width)
    left, top, *_ = encoder.grid_box(height, width)
    noise = torch.randn(4, 3, height, width)
    errors = []
    with torch.no_grad():
        before = encoder(noise)
        for x, y in [(100, 104), (108, 136), (116, 112), (124, 128), (132, 120)]:
            changed = noise.clone()
            changed[..., y - 4 : y + 4, x - 4 : x + 4] = torch.randn(4, 3, 8, 8)
            change = (encoder(changed) - before).square().sum((0, 2)).view(rows, columns)
            change /= change.sum()
            down = top + float(change.sum(1) @ (torch.arange(rows) + 0.5)) * height / rows
            across = left + float(change.sum(0) @ (torch.arange(columns) + 0.5)) * width / columns
            errors.append((across - x, down - y))
    assert torch.tensor(errors).mean(0).abs().max() < 3  # without grid_box, it is 15
