"""Caption image files and whole folders of them.

    python examples/caption.py outputs/shapes photo.jpg
    python examples/caption.py outputs/shapes holidays/ --batch_size 16 > captions.tsv
    python examples/caption.py outputs/shapes photo.jpg --attention attention/      # pictures of where it looked
    python examples/caption.py outputs/shapes holidays/ --attention attention/ --attention_format overlay gif html
    python examples/caption.py outputs/shapes holidays/ --num_captions 3 --json captions.json --skip_broken
    python examples/caption.py your-name/captioner photo.jpg --revision v1.0                # of the Hub

A line for each caption goes to standard output: the image, the caption and, with --attention, its pictures, with tabs
between them. Progress and complaints go to standard error. The web page is one for all images, `index.html`.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm
from transformers import pipeline

from ..cli import CommandParser, add_hub_arguments, hub_arguments, load_captioner, positive_int
from ..model.images import open_image
from ..visualization.figures import attention_figure
from ..visualization.overlay import attention_animation, attention_overlay
from ..visualization.page import page_figure, page_of_figures

# Pictures of where the model looked: the end of the file name, and what draws it from image, words, maps and box.
PICTURES: dict[str, tuple[str, Callable[..., bytes]]] = {
    "panels": (".png", lambda *caption: png(attention_figure(*caption).savefig)),
    "overlay": (".overlay.png", lambda *caption: png(attention_overlay(*caption).save)),
    "gif": (".gif", attention_animation),
}
PAGE, PAGE_FILE = "html", "index.html"

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def main(argv: Sequence[str]) -> None:
    """Open images one by one, caption them in batches, and write each caption as soon as it is there."""
    arguments = parse(argv)
    num_captions = arguments.num_captions
    if arguments.num_beams is not None and arguments.num_beams < num_captions:
        raise ValueError(f"{num_captions} captions need as many beams, but --num_beams is {arguments.num_beams}.")
    paths = list(find_images(arguments.images))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    gallery = arguments.attention and Gallery(arguments.attention, arguments.attention_format)
    captioner = build_captioner(arguments.folder, arguments.device, **hub_arguments(arguments))

    records: list[dict[str, Any]] = []
    opened: deque[tuple[str, Image.Image]] = deque()  # handed to the captioner, which answers in this order
    with tqdm(total=len(paths), unit="image", disable=None) as bar:
        for captions in captioner(
            open_images(paths, opened, bar, skip_broken=arguments.skip_broken),
            batch_size=arguments.batch_size,
            return_scores=True,
            return_attentions=gallery is not None,
            num_beams=arguments.num_beams or max(captioner.model.generation_config.num_beams or 1, num_captions),
            num_return_sequences=num_captions,
        ):
            path, image = opened.popleft()
            record: dict[str, Any] = {
                "image": path,
                "captions": [caption["generated_text"] for caption in captions],
                "scores": [caption["score"] for caption in captions],
            }
            lines = [[path, caption] for caption in record["captions"]]
            if gallery is not None:
                record["attention"] = gallery.draw(path, image, captions)
                lines[0] += [file for name, file in record["attention"].items() if name != PAGE]
            for line in lines:
                tqdm.write("\t".join(line), file=sys.stdout)
            records.append(record)
            bar.update()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    if not records:
        raise ValueError("No image could be read.")
    if gallery is not None:
        gallery.close()


def open_images(
    paths: Sequence[str], opened: deque[tuple[str, Image.Image]], bar: tqdm[Any], *, skip_broken: bool
) -> Iterator[Image.Image]:
    """Open images and note them down in `opened`.

    Raises:
        OSError, ValueError: one can't be read; with `skip_broken` it is reported and left out.
    """
    for path in paths:
        try:
            image = open_image(path)
        except (OSError, ValueError) as e:
            if not skip_broken:
                raise
            tqdm.write(f"Left out: {e}", file=sys.stderr)
            bar.update()
        else:
            opened.append((path, image))
            yield image


def find_images(names: Sequence[str]) -> Iterator[str]:
    """Files and addresses as they are; of folders the images, sorted, those of their folders included.

    Raises:
        FileNotFoundError: neither file nor folder.
        ValueError: a folder without images.
    """
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise ValueError(f"The folder {name!r} holds no images ({', '.join(sorted(SUFFIXES))}).")
            yield from map(str, found)
        elif path.is_file() or name.lower().startswith(("http://", "https://")):
            yield name
        else:
            raise FileNotFoundError(f"There is no image or folder {name!r}.")


def build_captioner(folder: str, device: str | None, **hub: str) -> Any:
    """The pipeline of a saved captioner; see `load_captioner`.

    Raises:
        ValueError: no captioner can be loaded, or there is no such device.
    """
    model, processor = load_captioner(folder, **hub)
    try:
        return pipeline("image-captioning", model=model, processor=processor, device=device)
    except (RuntimeError, AssertionError) as e:  # torch's ways to say so
        line = str(e).partition("\n")[0].rstrip(".")
        raise ValueError(f"The device {device!r} can't be used: {line}. Try --device cpu.") from e


class Gallery:
    """Draws where the model looked, a file a picture and a page for all.

    Args:
        folder: for the files; made if it is not there.
        formats: names among `PICTURES`, and `"html"`.
    """

    def __init__(self, folder: Path, formats: Sequence[str]) -> None:
        self.folder = folder
        self.pictures = {name: PICTURES[name] for name in formats if name in PICTURES}
        self.page = folder / PAGE_FILE if PAGE in formats else None
        self.figures: list[str] = []
        self.taken: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def draw(self, name: str, image: Image.Image, captions: Sequence[dict[str, Any]]) -> dict[str, str]:
        """Draw the best of the captions of an image, and put all of them on the page; the files by their formats."""
        best = captions[0]
        suffixes = [suffix for suffix, _ in self.pictures.values()]
        paths = dict(zip(self.pictures, self.free_paths(Path(name).stem, suffixes), strict=True))
        for (_, draw), path in zip(self.pictures.values(), paths.values(), strict=True):
            path.write_bytes(draw(image, best["words"], best["attentions"], best["box"]))
        if self.page is not None:
            self.figures.append(page_figure(image, captions, name))
            paths[PAGE] = self.page
        return {name: str(path) for name, path in paths.items()}

    def free_paths(self, stem: str, suffixes: Sequence[str]) -> list[Path]:
        """Names for pictures that no other image has: `stem.png`, or `stem-2.png` and so on."""
        stems = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        candidates = ([self.folder / f"{stem}{suffix}" for suffix in suffixes] for stem in stems)
        paths = next(paths for paths in candidates if self.taken.isdisjoint(paths))
        self.taken.update(paths)
        return paths

    def close(self) -> None:
        """Write the page."""
        if self.page is not None:
            self.page.write_text(page_of_figures(self.figures), encoding="utf-8")
            tqdm.write(f"Page of all images: {self.page}", file=sys.stderr)


def png(save: Callable[..., Any]) -> bytes:
    """What a figure's or picture's own way to save writes."""
    file = io.BytesIO()
    save(file, format="png")
    return file.getvalue()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = CommandParser(
        prog="hf-captioner caption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a saved captioner: an output folder of train.py, or an id on the Hub")
    add("images", metavar="IMAGE", nargs="+", help="an image file, a folder of images, or a URL")
    add("--num_beams", type=positive_int, metavar="N", help="beams (default: the model's own setting)")
    add("--num_captions", type=positive_int, metavar="N", default=1,
        help="captions for each image, the best first (default: %(default)s)")  # fmt: skip
    add("--batch_size", type=positive_int, metavar="N", default=8,
        help="images at once (default: %(default)s)")  # fmt: skip
    add("--attention", type=Path, metavar="DIR", help="draw where the model looked, for each image")
    add("--attention_format", nargs="+", choices=(*PICTURES, PAGE),
        help="how: a panel a word, one overlay of heat, an animated GIF, one web page for all images (default: panels)",
    )  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write captions and their scores to this file")
    add("--device", help="cpu, cuda, cuda:1, mps, … (default: the first accelerator there is)")
    add("--skip_broken", action="store_true", help="go on without unreadable images, naming each")
    add_hub_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.attention_format and arguments.attention is None:
        parser.error("--attention_format needs a folder to draw to; give one with --attention DIR")
    arguments.attention_format = arguments.attention_format or ["panels"]
    return arguments
