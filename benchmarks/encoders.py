"""Try one architecture of every family of timm as an encoder, and write the results to docs/encoders.md.

    python benchmarks/encoders.py                  # all families, with random weights: six minutes on one core
    python benchmarks/encoders.py resnet nasnet    # some, printed and not written

A family is a module of timm. A captioner with a small architecture of the family encodes two images, is saved, reloaded
and compared, and captions the images. tests/test_families.py compares the table with new results.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from timm.models import is_model_in_modules
from tqdm.auto import tqdm

from hf_captioner import CaptionerModel
from hf_captioner.cli import run_command

TABLE = Path(__file__).resolve().parents[1] / "docs" / "encoders.md"

# A small architecture of each family whose first by name is large or unusual.
SMALL = {
    "byoanet": "botnet26t_256",
    "byobnet": "mobileone_s0",
    "cait": "cait_xxs24_224",
    "coat": "coat_lite_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "csatv2": "csatv2",
    "cspnet": "cspdarknet53",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deit": "deit_tiny_distilled_patch16_224",
    "dla": "dla46_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_rmlp_pico_rw_256",
    "metaformer": "poolformer_s12",
    "mlp_mixer": "resmlp_12_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nfnet_l0",
    "pit": "pit_ti_224",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "res2net": "res2net50_48w_2s",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xcit": "xcit_nano_12_p16_224",
}

# Families whose smallest architecture has hundreds of millions of parameters, in layers that are all alike.
SHALLOW = {
    family: {"depth": 2} for family in ("beit", "deepseek_vit", "gemma4_vit", "qwen3_vit", "vision_transformer_sam")
}

TINY = {"hidden_size": 16, "attention_size": 16, "embedding_size": 16, "vocab_size": 12}


@dataclass(frozen=True)
class Result:
    """A row of the table, for one family."""

    family: str
    architecture: str
    image: str
    grid: str
    channels: str
    result: str


def smallest(family: str) -> str:
    """Return the name of the architecture to try for a family."""
    names = [name for name in timm.list_models() if is_model_in_modules(name, [family])]
    assert family not in SMALL or SMALL[family] in names, f"{SMALL[family]} is no {family}"
    return SMALL.get(family, names[0])


@torch.no_grad()
def try_family(family: str) -> Result:
    """Build, save and reload a captioner with an encoder of the family; encode and caption images with it.

    Raises:
        AssertionError: The encoder was not refused, and does not work.
    """
    name, kwargs = smallest(family), SHALLOW.get(family)
    torch.manual_seed(0)
    try:
        model = CaptionerModel.from_encoder(name, pretrained=False, encoder_kwargs=kwargs, **TINY).eval()
    except ValueError as e:
        assert name in str(e), e
        return Result(family, name, "", "", "", f"refused: {e}")
    height, width = model.data_config["input_size"][1:]
    rows, columns = model.encoder.part.grid_size(height, width)
    channels = model.encoder.part.hidden_size
    pixel_values = torch.randn(2, 3, height, width)
    cells = model.encoder(pixel_values).last_hidden_state
    assert cells.shape == (2, rows * columns, channels), cells.shape
    assert cells.isfinite().all(), "cells are not finite"
    assert not torch.equal(cells[0], cells[1]), "cells are the same for other images"
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reloaded = CaptionerModel.from_pretrained(folder).eval()
    again = reloaded.encoder(pixel_values).last_hidden_state  # before buffers are compared, as some are made here
    assert torch.allclose(again, cells, rtol=1e-3, atol=1e-3 * float(cells.std())), "other cells after reloading"
    for mine, theirs in ((model.state_dict(), reloaded.state_dict()), map(_buffers, (model, reloaded))):
        assert mine.keys() == theirs.keys(), "other tensors after reloading"
        assert not (lost := [key for key in mine if not torch.equal(mine[key], theirs[key])]), f"not reloaded: {lost}"
    model.generation_config = reloaded.generation_config = model.default_generation_config()
    captions = reloaded.generate(pixel_values, max_length=6)
    assert captions.shape[0] == 2 and captions.shape[1] > 1, "no captions"
    return Result(family, name, f"{height} × {width}", f"{rows} × {columns}", str(channels), "works")


def _buffers(model: CaptionerModel) -> dict[str, torch.Tensor]:
    """Return all buffers, those among them that are not saved."""
    return dict(model.named_buffers())


def main(argv: Sequence[str]) -> int:
    """Try families and write the table; return 1 if any is broken, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="modules of timm (default: all, and the table is written)")
    arguments = parser.parse_args(argv)
    results = []
    for family in tqdm(arguments.families or timm.list_modules(), unit="family", disable=None):
        try:
            results.append(try_family(family))
        except Exception as e:
            results.append(Result(family, smallest(family), "", "", "", f"BROKEN: {e!r}"))
        print(results[-1], flush=True)
        gc.collect()
    if not arguments.families:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(page(results), encoding="utf-8")
    return int(any(result.result.startswith("BROKEN") for result in results))


def page(results: Sequence[Result]) -> str:
    """Return docs/encoders.md with these results."""
    num_good = sum(result.result == "works" for result in results)
    num_families = f"{len(results)} families, which are the modules of timm {timm.__version__}"
    lines = [
        "# Encoders",
        "",
        "The encoder `timm` takes every model of timm whose last features form a grid. The table shows what",
        "`python benchmarks/encoders.py` found for one architecture, with random weights, of each of the",
        f"{num_families}. {num_good} of them work; the others are refused with the reason.",
        "",
        "An architecture works if its cells have the grid and the number of channels that the encoder names, and if a",
        f"saved and reloaded captioner is equal to the bit and captions images. {', '.join(SHALLOW)} were cut to",
        "two layers.",
        "",
        "| family | architecture | image | grid | channels | result |",
        "|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(" ".join(cell.split()) for cell in astuple(result)) + " |" for result in results]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
