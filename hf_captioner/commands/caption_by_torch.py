"""Captioning by torch, for what onnxruntime can't do here, and pictures of where the model looked.

Importing this module imports torch, transformers and matplotlib, so `hf-captioner caption` does it only when needed.
"""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import pipeline

from ..cli import load_captioner
from ..errors import first_line
from ..files import write_atomically
from ..model.images import open_to_draw
from ..model.pipeline_captioner import ImageCaptioningPipeline
from ..visualization.figures import attention_figure
from ..visualization.overlay import attention_animation, attention_overlay
from ..visualization.page import PageFigure, page_figure, render_page

PAGE, PAGE_FILE = "html", "index.html"
# Formats of pictures: the end of the file name, and the function that draws the file from image, words, maps and box.
PICTURES: dict[str, tuple[str, Callable[..., bytes]]] = {
    "panels": (".png", lambda *caption: save_png(attention_figure(*caption).savefig)),
    "overlay": (".overlay.png", lambda *caption: save_png(attention_overlay(*caption).save)),
    "gif": (".gif", attention_animation),
}


def build_pipeline(folder: str, device: str | None, **hub: str) -> ImageCaptioningPipeline:
    """Return the pipeline of a saved captioner; see `load_captioner`.

    Raises:
        ValueError: The captioner can't be loaded, or there is no such device.
    """
    model, processor = load_captioner(folder, **hub)
    try:
        return pipeline("image-captioning", model=model, processor=processor, device=device)
    except (RuntimeError, AssertionError) as e:  # which of them torch raises depends on the device
        raise ValueError(f"The device {device!r} can't be used: {first_line(e)} Try --device cpu.") from e


class Gallery:
    """A folder of pictures that show where the model looked.

    Args:
        folder: Folder for the pictures, which is made if necessary.
        formats: Keys of `PICTURES`, which give one file for each image, and `PAGE` for one page of all images.
    """

    def __init__(self, folder: Path, formats: Sequence[str]) -> None:
        self.folder = folder
        self.pictures = {name: PICTURES[name] for name in formats if name in PICTURES}
        self.page = folder / PAGE_FILE if PAGE in formats else None
        self.figures: list[PageFigure] = []
        self.used: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def draw(self, path: str, captions: Sequence[dict[str, Any]]) -> dict[str, str]:
        """Draw where the model looked for the first caption of an image, and put all its captions on the web page.

        Args:
            path: Path or URL of the image.
            captions: Captions as the pipeline returns them with `return_attentions`, the best first.

        Returns:
            Paths of the pictures and of the page; keys are formats, such as `overlay` and `html`.
        """
        image, best = open_to_draw(path), captions[0]
        suffixes = [suffix for suffix, _ in self.pictures.values()]
        files = dict(zip(self.pictures, self.unused_files(Path(path).stem, suffixes), strict=True))
        for name, file in files.items():
            _, draw = self.pictures[name]
            write_atomically(file, draw(image, best["words"], best["attentions"], best["box"]))
        if self.page is not None:
            self.figures.append(page_figure(image, captions, path))
            files[PAGE] = self.page
        return {name: str(file) for name, file in files.items()}

    def unused_files(self, stem: str, suffixes: Sequence[str]) -> list[Path]:
        """Return a file name for each suffix that no earlier image uses: `stem.png`, or else `stem-2.png` and so on."""
        stems = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        candidates = ([self.folder / f"{stem}{suffix}" for suffix in suffixes] for stem in stems)
        files = next(files for files in candidates if self.used.isdisjoint(files))
        self.used.update(files)
        return files

    def close(self) -> None:
        """Write the web page of all images and report its path, if the page is among the formats."""
        if self.page is not None:
            write_atomically(self.page, render_page(self.figures))
            print(f"Page of all images: {self.page}", file=sys.stderr)


def save_png(save: Callable[..., Any]) -> bytes:
    """Return the bytes of a PNG file, given a function that saves a figure or an image to a file."""
    file = io.BytesIO()
    save(file, format="png")
    return file.getvalue()
