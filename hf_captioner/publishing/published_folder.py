"""The folder that is published for a captioner: weights, code, model card, recipe and captioned images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from ..data.datasets import load_captions
from ..data.rows import open_row, undecoded
from ..evaluation.results import Results
from ..model.images import ImageSource, open_image
from ..model.modeling_captioner import CaptionerModel
from ..model.pipeline_captioner import ImageCaptioningPipeline
from ..model.processing_captioner import CaptionerProcessor
from ..visualization.figures import attention_figure
from .folders import MODEL_FOLDER
from .model_card import RECIPE, CardDetails, Sample, model_card

# Modules that are published with all that they import, for users who do not have hf_captioner.
TRAVELLING = (
    *("configuration_captioner", "image_processing_captioner", "modeling_captioner", "processing_captioner"),
    *("guided_decoding", "pipeline_captioner"),
)
# Where transformers' Auto classes find these classes, by the file that says so.
AUTO_CLASSES = {
    "config.json": {
        "AutoConfig": "configuration_captioner.CaptionerConfig",
        "AutoModel": "modeling_captioner.CaptionerModel",
        "AutoModelForImageTextToText": "modeling_captioner.CaptionerModel",
    },
    "processor_config.json": {
        "AutoImageProcessor": "image_processing_captioner.CaptionerImageProcessor",
        "AutoProcessor": "processing_captioner.CaptionerProcessor",
    },
}
NUM_SAMPLES = 4
SAMPLE_SIZE = 640  # pixels of the longer edge, at most


def write_published_folder(
    folder: Path,
    model: CaptionerModel,
    processor: CaptionerProcessor,
    repo_id: str,
    results: Results | None,
    details: CardDetails,
    images: Sequence[ImageSource] | None,
) -> Path:
    """Write everything that is published for a captioner; see `hub.push` for the arguments."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    _add_code(folder)
    if details.recipe:
        (folder / RECIPE).write_text(details.recipe_yaml, encoding="utf-8")
    if images is None:
        images = _validation_images(details.image_source)
    card = model_card(repo_id, model.config, details, results, add_samples(folder, images))
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    return folder


def _add_code(folder: Path) -> None:
    """Copy the model's code to a folder, and name its classes in the JSON files for transformers' Auto classes."""
    for name in TRAVELLING:
        module = MODEL_FOLDER / f"{name}.py"
        for file in (module, *map(Path, get_relative_import_files(module))):
            shutil.copyfile(file, folder / file.name)
    for name, classes in AUTO_CLASSES.items():
        record = json.loads((folder / name).read_text(encoding="utf-8"))
        record["auto_map"] = classes
        if "image_processor" in record:
            record["image_processor"]["auto_map"] = classes
        (folder / name).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _validation_images(dataset: str | None) -> Sequence[ImageSource]:
    """Return a few images spread over the validation split of a data set; none without a data set."""
    if dataset is None:
        return []
    try:
        rows = undecoded(load_captions(dataset, "validation"))
    except (OSError, ValueError) as e:
        raise ValueError(
            f"The images for the model card can't be loaded from {dataset!r}: {e} Name other images, "
            "images=['a.jpg'], or none, images=[]."
        ) from e
    return [open_row(rows[index]) for index in range(0, len(rows), max(1, len(rows) // NUM_SAMPLES))][:NUM_SAMPLES]


def add_samples(folder: Path, images: Sequence[ImageSource], suffix: str = "png") -> list[Sample]:
    """Caption images with the model as saved in the folder, and add the images and their attention maps to it."""
    model, processor = CaptionerModel.from_pretrained(folder), CaptionerProcessor.from_pretrained(folder)
    captioner = ImageCaptioningPipeline(model=model, processor=processor, device="cpu")
    samples = []
    for number, source in enumerate(images, 1):
        (folder / "samples").mkdir(exist_ok=True)
        paths = f"samples/{number}.{suffix}", f"samples/{number}_attention.{suffix}"
        image = open_image(source)
        image.thumbnail((SAMPLE_SIZE, SAMPLE_SIZE))
        image.save(folder / paths[0])
        # The published, smaller image is captioned, so that whoever runs the card's example gets this caption.
        caption = captioner(image, return_attentions=True)[0]
        figure = attention_figure(image, caption["words"], caption["attentions"], caption["box"])
        figure.savefig(folder / paths[1])
        samples.append(Sample(*paths, caption["generated_text"]))
    return samples
