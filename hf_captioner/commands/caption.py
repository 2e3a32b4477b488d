"""Caption image files, folders of images and URLs.

Each caption is printed as soon as it is decoded, in a line with the image, the caption and, with --attention, the files
of its pictures, separated by tabs. Everything else goes to standard error.

    hf-captioner caption photo.jpg
    hf-captioner caption holidays/ --skip_broken > captions.tsv
    hf-captioner caption outputs/shapes holidays/ --num_captions 3 --json captions.json
    hf-captioner caption outputs/shapes holidays/ --attention pictures/ --attention_format overlay html
    hf-captioner caption your-name/captioner photo.jpg --revision v1.0
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from ..cli import HUB_ID, CommandParser, add_hub_arguments, hub_arguments, positive_int
from ..interruption import ending_at_ctrl_c
from ..model.image_sources import shown
from ..model.images import IMAGE_SUFFIXES, is_image_name, is_url
from ..model.onnx_runner import OnnxCaptioner
from ..pretrained import NAME, captioner_path
from ..publishing.exported import find_export

# torch, transformers, matplotlib and tqdm take longer to import than an image to caption. Import them where needed.
if TYPE_CHECKING:
    from .caption_by_torch import Gallery

FORMATS = ("panels", "overlay", "gif", "html")  # of attention pictures

logger = logging.getLogger(__name__)


class Captioner(NamedTuple):
    """A captioner, whichever library runs it."""

    num_beams: int  # as saved with it
    open: Callable[[str], object]  # opens an image as it does itself
    captions: Callable[..., Iterable[list[dict[str, Any]]]]  # from images and options, the captions of each image


def main(argv: Sequence[str]) -> None:
    """Caption images in batches, and print each caption as soon as it is decoded."""
    arguments = parse(argv)
    num_captions = arguments.num_captions
    if arguments.num_beams is not None and arguments.num_beams < num_captions:
        raise ValueError(
            f"--num_captions {num_captions} needs at least as many beams; raise --num_beams {arguments.num_beams}."
        )
    name, images = split_names(arguments.names, arguments.subfolder)
    paths = list(find_images(images))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    captioner, gallery = build_captioner(name, arguments)

    records: list[dict[str, Any]] = []
    with Progress(len(paths)) as progress:
        readable = readable_images(paths, captioner, progress) if arguments.skip_broken else iter(paths)
        to_caption, captioned = itertools.tee(readable)
        results = captioner.captions(
            to_caption,
            batch_size=arguments.batch_size,
            return_scores=True,
            return_attentions=gallery is not None,
            num_beams=arguments.num_beams or max(captioner.num_beams, num_captions),
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
                lines[0] += [file for name, file in record["attention"].items() if name != "html"]
            for line in lines:
                progress.write("\t".join(line), sys.stdout)
            records.append(record)
            progress.advance()
    if arguments.json is not None:
        from ..files import write_atomically

        write_atomically(arguments.json, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    if not records:
        raise ValueError("None of the images could be read.")
    if gallery is not None:
        gallery.close()


def split_names(names: Sequence[str], subfolder: str | None) -> tuple[str, Sequence[str]]:
    """Return the captioner and the images that the names of a command line stand for.

    The first name is the captioner's if it is that of a folder with a captioner, of the captioner in the package, or,
    where there is no such file, if it has the form of an id on the Hub. Without one, the package's captioner is used.

    Raises:
        ValueError: There are no images.
    """
    first, *others = names
    folder = Path(first, subfolder or "")
    is_on_hub = HUB_ID.fullmatch(first) is not None and not os.path.lexists(first) and not is_image_name(first)
    if not (first == NAME or is_on_hub or any((folder / name).is_file() for name in ("config.json", "captioner.json"))):
        return NAME, names
    if others:
        return first, others
    if is_on_hub:
        raise FileNotFoundError(f"There is no image or folder {first!r}. If it is a captioner, name images after it.")
    advice = f" A folder of images is named './{NAME}'." if first == NAME and os.path.lexists(first) else ""
    raise ValueError(f"{first!r} is a captioner: name images, folders or URLs after it.{advice}")


def build_captioner(name: str, arguments: argparse.Namespace) -> tuple[Captioner, Gallery | None]:
    """Return a captioner, run by onnxruntime if it has been exported and by torch else, and where it draws pictures.

    Raises:
        ValueError: The captioner can't be loaded, or there is no such device, or an export would need torch.
    """
    folder = Path(captioner_path(name), arguments.subfolder or "")
    exported = find_export(folder)
    if exported is not None and arguments.attention is None and arguments.device in (None, "cpu"):
        with ending_at_ctrl_c():
            runner = OnnxCaptioner(exported)
        return Captioner(runner.settings.num_beams, runner.pixels.open, runner.stream), None
    if exported == folder:
        raise ValueError(
            f"{str(folder)!r} is an exported captioner, which draws no pictures and runs on the CPU. Name the one that "
            "it was made from, or leave out --attention and --device."
        )
    with ending_at_ctrl_c():
        from . import caption_by_torch as by_torch
    gallery = arguments.attention and by_torch.Gallery(arguments.attention, arguments.attention_format)
    captioner = by_torch.build_pipeline(name, arguments.device, **hub_arguments(arguments))
    num_beams = captioner.model.generation_config.num_beams or 1
    return Captioner(num_beams, captioner.processor.image_processor.open, captioner), gallery


class Progress:
    """A context manager that shows a bar of the images that are done, if somebody watches and there are several."""

    def __init__(self, num_images: int) -> None:
        self.bar: Any = None
        if num_images > 1 and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=num_images, unit="image")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def write(self, line: str, file: TextIO) -> None:
        """Write a line at once, above the bar."""
        if self.bar is None:
            print(line, file=file, flush=True)
        else:
            self.bar.write(line, file=file)
            file.flush()

    def advance(self) -> None:
        """Count an image that is done."""
        if self.bar is not None:
            self.bar.update()


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
                raise ValueError(
                    f"The folder {name!r} holds no images ({', '.join(IMAGE_SUFFIXES)}), and no captioner: it has no "
                    "config.json."
                )
            yield from found
        elif os.path.lexists(name):
            yield name
        else:
            raise FileNotFoundError(f"There is no image or folder {shown(name)}, and no such captioner.")


def images_within(folder: str) -> list[str]:
    """Return the files in a folder and its sub-folders that are named as images, sorted; report unreadable folders."""

    def report(error: OSError) -> None:
        logger.warning(f"Left out: the folder {error.filename} can't be read: {error.strerror}")

    found = [Path(parent, name) for parent, _, names in os.walk(folder, onerror=report) for name in names]
    # Pipes and devices are not files, and would never end.
    return [str(file) for file in sorted(found) if is_image_name(file.name) and file.is_file()]


def readable_images(paths: Iterable[str], captioner: Captioner, progress: Progress) -> Iterator[str]:
    """Yield the images that can be opened, and report the others.

    The captioner opens each image once more. Only --skip_broken costs this time: an error within the captioner could
    not be caught image by image.
    """
    for path in paths:
        try:
            captioner.open(path)
        except (OSError, ValueError) as e:
            progress.write(f"Left out: {e}", sys.stderr)
            progress.advance()
        else:
            yield path


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `hf-captioner caption`."""
    parser = CommandParser(
        prog="hf-captioner caption",
        usage="hf-captioner caption [CAPTIONER] IMAGE [IMAGE ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="[CAPTIONER] IMAGE", nargs="+", help="folder of a trained captioner, or its "
        f"id on the Hub (default: {NAME}, which comes with the package); images, folders of images, URLs")  # fmt: skip

    captions = parser.add_argument_group("captions")
    captions.add_argument("--num_captions", type=positive_int, metavar="N", default=1,
        help="captions for each image, the best first (default: %(default)s)")  # fmt: skip
    captions.add_argument("--num_beams", type=positive_int, metavar="N",
        help="beams of beam search (default: as saved with the captioner)")  # fmt: skip
    captions.add_argument("--json", type=Path, metavar="FILE", help="also write captions and their scores to this file")

    pictures = parser.add_argument_group("pictures of where the model looked")
    pictures.add_argument("--attention", type=Path, metavar="DIR", help="draw pictures of each image in this folder")
    pictures.add_argument("--attention_format", nargs="+", choices=FORMATS,
        help="panels: a panel for each word (default); overlay: one heat map; gif: a heat map word by word; html: one "
        "page of all images")  # fmt: skip

    run = parser.add_argument_group("run")
    run.add_argument("--skip_broken", action="store_true", help="leave out images that can't be read, and name them")
    run.add_argument("--batch_size", type=positive_int, metavar="N", default=8,
        help="images captioned at the same time (default: %(default)s)")  # fmt: skip
    run.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: cpu for an exported captioner; for others "
        "an accelerator if there is one)")  # fmt: skip
    add_hub_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.attention_format and arguments.attention is None:
        parser.error("--attention_format needs a folder for the pictures; name one with --attention DIR")
    arguments.attention_format = arguments.attention_format or ["panels"]
    return arguments
