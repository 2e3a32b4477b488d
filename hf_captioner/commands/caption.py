"""Caption image files, folders of images and URLs.

Each caption is printed as soon as it is decoded, in a line with the image, the caption and, with --attention, the files
of its pictures, separated by tabs. Everything else goes to standard error.

    hf-captioner caption outputs/shapes photo.jpg
    hf-captioner caption outputs/shapes holidays/ --skip_broken > captions.tsv
    hf-captioner caption outputs/shapes holidays/ --num_captions 3 --json captions.json
    hf-captioner caption outputs/shapes holidays/ --attention pictures/ --attention_format overlay html
    hf-captioner caption your-name/captioner photo.jpg --revision v1.0
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import pipeline

from ..cli import CommandParser, add_hub_arguments, hub_arguments, load_captioner, positive_int
from ..errors import first_line
from ..files import write_atomically
from ..model.image_sources import shown
from ..model.images import IMAGE_SUFFIXES, is_image_name, is_url, open_to_draw
from ..model.pipeline_captioner import ImageCaptioningPipeline
from ..visualization.figures import attention_figure
from ..visualization.overlay import attention_animation, attention_overlay
from ..visualization.page import PageFigure, page_figure, render_page

# Formats of pictures: the end of the file name, and the function that draws the file from image, words, maps and box.
PICTURES: dict[str, tuple[str, Callable[..., bytes]]] = {
    "panels": (".png", lambda *caption: save_png(attention_figure(*caption).savefig)),
    "overlay": (".overlay.png", lambda *caption: save_png(attention_overlay(*caption).save)),
    "gif": (".gif", attention_animation),
}
PAGE, PAGE_FILE = "html", "index.html"

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Caption images in batches, and print each caption as soon as it is decoded."""
    arguments = parse(argv)
    num_captions = arguments.num_captions
    if arguments.num_beams is not None and arguments.num_beams < num_captions:
        raise ValueError(
            f"--num_captions {num_captions} needs at least as many beams; raise --num_beams {arguments.num_beams}."
        )
    paths = list(find_images(arguments.images))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    gallery = arguments.attention and Gallery(arguments.attention, arguments.attention_format)
    captioner = build_captioner(arguments.captioner, arguments.device, **hub_arguments(arguments))

    records: list[dict[str, Any]] = []
    with tqdm(total=len(paths), unit="image", disable=None) as bar:
        readable = readable_images(paths, captioner, bar) if arguments.skip_broken else iter(paths)
        to_caption, captioned = itertools.tee(readable)
        results = captioner(
            to_caption,
            batch_size=arguments.batch_size,
            return_scores=True,
            return_attentions=gallery is not None,
            num_beams=arguments.num_beams or max(captioner.model.generation_config.num_beams or 1, num_captions),
            num_return_sequences=num_captions,
        )
        for path, captions in zip(captioned, results, strict=True):
            record: dict[str, Any] = {
                "image": path,
                "captions": [caption["generated_text"] for caption in captions],
                "scores": [caption["score"] for caption in captions],
            }
            lines = [[path, caption] for caption in record["captions"]]
            if gallery is not None:
                record["attention"] = gallery.draw(path, captions)
                lines[0] += [file for name, file in record["attention"].items() if name != PAGE]
            for line in lines:
                tqdm.write("\t".join(line), file=sys.stdout)
            sys.stdout.flush()
            records.append(record)
            bar.update()
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    if not records:
        raise ValueError("None of the images could be read.")
    if gallery is not None:
        gallery.close()


def find_images(names: Iterable[str]) -> Iterator[str]:
    """Yield files and URLs as they are given, and all images within folders, sorted by path.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A folder has no images.
    """
    for name in names:
        if is_url(name):
            yield name
        elif os.path.isdir(name):
            found = images_within(name)
            if not found:
                raise ValueError(f"The folder {name!r} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
            yield from found
        elif os.path.lexists(name):
            yield name
        else:
            raise FileNotFoundError(f"There is no image or folder {shown(name)}.")


def images_within(folder: str) -> list[str]:
    """Return the files in a folder and its sub-folders that are named as images, sorted; report unreadable folders."""

    def report(error: OSError) -> None:
        logger.warning(f"Left out: the folder {error.filename} can't be read: {error.strerror}")

    found = [Path(parent, name) for parent, _, names in os.walk(folder, onerror=report) for name in names]
    # Pipes and devices are not files, and would never end.
    return [str(file) for file in sorted(found) if is_image_name(file.name) and file.is_file()]


def readable_images(paths: Iterable[str], captioner: ImageCaptioningPipeline, bar: tqdm[Any]) -> Iterator[str]:
    """Yield the images that can be opened, and report the others.

    The captioner opens each image once more. Only --skip_broken costs this time: an error within the pipeline could
    not be caught image by image.
    """
    for path in paths:
        try:
            captioner.processor.image_processor.open(path)
        except (OSError, ValueError) as e:
            tqdm.write(f"Left out: {e}", file=sys.stderr)
            bar.update()
        else:
            yield path


def build_captioner(folder: str, device: str | None, **hub: str) -> ImageCaptioningPipeline:
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
        formats: Keys of `PICTURES`, which give one file for each image, and `"html"` for one page of all images.
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
            tqdm.write(f"Page of all images: {self.page}", file=sys.stderr)


def save_png(save: Callable[..., Any]) -> bytes:
    """Return the bytes of a PNG file, given a function that saves a figure or an image to a file."""
    file = io.BytesIO()
    save(file, format="png")
    return file.getvalue()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `hf-captioner caption`."""
    parser = CommandParser(
        prog="hf-captioner caption",
        usage="hf-captioner caption CAPTIONER IMAGE [IMAGE ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("captioner", metavar="CAPTIONER", help="folder of a trained captioner, or its id on the Hub")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file, folder of images, or URL")

    captions = parser.add_argument_group("captions")
    captions.add_argument("--num_captions", type=positive_int, metavar="N", default=1,
        help="captions for each image, the best first (default: %(default)s)")  # fmt: skip
    captions.add_argument("--num_beams", type=positive_int, metavar="N",
        help="beams of beam search (default: as saved with the captioner)")  # fmt: skip
    captions.add_argument("--json", type=Path, metavar="FILE", help="also write captions and their scores to this file")

    pictures = parser.add_argument_group("pictures of where the model looked")
    pictures.add_argument("--attention", type=Path, metavar="DIR", help="draw pictures of each image in this folder")
    pictures.add_argument("--attention_format", nargs="+", choices=(*PICTURES, PAGE),
        help="panels: a panel for each word (default); overlay: one heat map; gif: a heat map word by word; html: one "
        "page of all images")  # fmt: skip

    run = parser.add_argument_group("run")
    run.add_argument("--skip_broken", action="store_true", help="leave out images that can't be read, and name them")
    run.add_argument("--batch_size", type=positive_int, metavar="N", default=8,
        help="images captioned at the same time (default: %(default)s)")  # fmt: skip
    run.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: an accelerator if there is one)")
    add_hub_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.attention_format and arguments.attention is None:
        parser.error("--attention_format needs a folder for the pictures; name one with --attention DIR")
    arguments.attention_format = arguments.attention_format or ["panels"]
    return arguments
