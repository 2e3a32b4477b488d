"""Making of the captioner that comes with the package, from the output folder of a finished training.

Run it in a checkout, with onnx and onnxscript installed, and commit `hf_captioner/pretrained/photographs`:
`python -m hf_captioner.publishing.bundle outputs/flickr8k_efficientnet_lite2 --image assets/dog.jpg`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file, save_file

from .. import pretrained
from ..evaluation.results import RESULTS, find_results, read_results
from ..files import read_json
from ..model.modeling_captioner import CaptionerModel
from ..model.processing_captioner import CaptionerProcessor
from .export import export_onnx
from .model_card import RECIPE, BundleDetails, card_details, dataset_id, model_card
from .published_folder import add_samples

LARGEST_SIZE = 40_000_000  # bytes of the whole folder: everybody who installs the package downloads it

LICENSE = "cc-by-nc-4.0"
TERMS = """\
What that means for you: the encoder started from the ImageNet weights of EfficientNet-Lite2 by the TensorFlow TPU
authors (Apache 2.0). The captioner was then trained on Flickr8k (Hodosh, Young and Hockenmaier 2013), whose
captions are licensed under CC BY 3.0, and whose photographs may be used for non-commercial research and education
only. So use this captioner for research, for teaching and for yourself, and name Flickr8k where you publish
something made with it. For a product or a service, train a captioner on photographs whose licence allows that. The
code of hf_captioner is licensed under Apache 2.0, and this package contains none of Flickr8k's photographs."""
LIMITS = """\
The captioner is meant for trying out captioning with attention, for teaching, as a baseline, and as a start for
training on photographs of your own. It knows what Flickr8k is full of: people, children and dogs outdoors, sports,
water and snow. It describes everything else in the same words, so that most animals become dogs. It often errs in
counts, colours, and what people do, and it can't read. It is no substitute for a large vision-language model, and
not good enough to describe the world to people who can't see it."""


def write_bundle(
    source: str | Path,
    folder: str | Path,
    *,
    results: str | Path | None = None,
    int8_results: str | Path | None = None,
    images: Sequence[str | Path] = (),
) -> Path:
    """Write a trained captioner as it comes with the package, in place of what is in the folder.

    Weights are stored in half precision, except for vectors, and loaded in single precision. `onnx/` holds the same
    captioner in 8 bits, for onnxruntime.

    Args:
        source: Output folder of a training, or another folder with a captioner, a recipe and scores.
        folder: Folder to write.
        results: Scores for the card (default: those in the source).
        int8_results: Scores of the captions that `onnx/` writes for the same images.
        images: Photographs that may be published, to be shown in the card with the captioner's attention.

    Raises:
        ValueError: The source has no scores or names no data set, or the folder would be too large.
    """
    results = results or find_results(source)
    if results is None:
        raise ValueError(f"There are no scores in {str(source)!r}. Name a results.json with --results.")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary, folder.name)
        model = CaptionerModel.from_pretrained(source, dtype="float32")
        processor = CaptionerProcessor.from_pretrained(source)
        details = card_details(model.config, license=LICENSE, recipe=Path(source, RECIPE), limits=LIMITS)
        model.save_pretrained(new)
        processor.save_pretrained(new)
        _halve(new / "model.safetensors")
        (new / RECIPE).write_text(details.recipe_yaml, encoding="utf-8")
        record = _without_paths(read_json(results, "The file of results"))
        (new / RESULTS).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

        export_onnx(CaptionerModel.from_pretrained(new), processor, new / "onnx", int8=True, beside=True)

        bundle = BundleDetails(TERMS, None if int8_results is None else read_results(int8_results))
        samples = add_samples(new, images, "jpg")
        card = model_card(pretrained.NAME, model.config, details, read_results(new / RESULTS), samples, bundle)
        (new / "README.md").write_text(str(card), encoding="utf-8")
        _check_size(new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    return folder


def _halve(path: Path) -> None:
    """Store the matrices of a safetensors file in half precision; vectors are small, and some have a large range."""
    weights = {name: w.half() if w.is_floating_point() and w.ndim > 1 else w for name, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes files that nobody else may read


def _without_paths(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of results that names no path on this machine."""
    protocol = record["protocol"]
    names = {"system": pretrained.NAME, "dataset": dataset_id(protocol["dataset"])}
    return record | {"protocol": protocol | names}


def _check_size(folder: Path) -> None:
    """Raise a ValueError that lists the largest files of a folder which is too large to come with the package."""
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    if (total := sum(sizes.values())) > LARGEST_SIZE:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:4]
        listed = ", ".join(f"{name} {sizes[name] / 1e6:.1f}" for name in largest)
        raise ValueError(
            f"The captioner would take {total / 1e6:.1f} MB of the package; {LARGEST_SIZE / 1e6:.0f} are allowed "
            f"(MB: {listed}). Train one with a smaller embedding_size, hidden_size or vocabulary."
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Write the captioner that comes with this checkout of the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="output folder of a training")
    parser.add_argument("--output_dir", type=Path, default=pretrained.PHOTOGRAPHS, help="default: %(default)s")
    parser.add_argument("--results", type=Path, help="scores for the card (default: those in the source)")
    parser.add_argument("--int8_results", type=Path, help="scores of the captions of its ONNX export in 8 bits")
    parser.add_argument(
        "--image", nargs="*", default=[], help="photographs to show in the card; the README shows the first"
    )
    arguments = parser.parse_args(argv)
    folder = write_bundle(
        arguments.source,
        arguments.output_dir,
        results=arguments.results,
        int8_results=arguments.int8_results,
        images=arguments.image,
    )
    print(f"Written: {folder}")


if __name__ == "__main__":
    main()
