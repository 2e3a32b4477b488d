"""Caption image files and whole folders of them.

    python examples/caption.py outputs/shapes photo.jpg
    python examples/caption.py outputs/shapes holidays/ --batch_size 16 > captions.tsv
    python examples/caption.py outputs/shapes photo.jpg --attention attention/      # pictures of where it looked
    python examples/caption.py outputs/shapes holidays/ --num_captions 3 --json captions.json --skip_broken

A line for each caption goes to standard output: the image, the caption and, with --attention, its picture, with tabs
between them. Progress and complaints go to standard error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm
from transformers import pipeline

from hf_captioner import open_image
from hf_captioner.cli import load_captioner, run_main
from hf_captioner.visualization import attention_figure

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def main(argv: Sequence[str]) -> None:
    """Open images one by one, caption them in batches, and write each caption as soon as it is there."""
    arguments = parse(argv)
    num_captions = arguments.num_captions
    if arguments.num_beams is not None and arguments.num_beams < num_captions:
        raise ValueError(f"{num_captions} captions need as many beams, but --num_beams is {arguments.num_beams}.")
    paths = list(find_images(arguments.images))
    for folder in filter(None, (arguments.attention, arguments.json and arguments.json.parent)):
        folder.mkdir(parents=True, exist_ok=True)
    captioner = build_captioner(arguments.folder, arguments.device)

    records: list[dict[str, Any]] = []
    pictures: set[Path] = set()
    opened: deque[tuple[str, Image.Image]] = deque()  # handed to the captioner, which answers in this order
    with tqdm(total=len(paths), unit="image", disable=None) as bar:
        for captions in captioner(
            open_images(paths, opened, bar, skip_broken=arguments.skip_broken),
            batch_size=arguments.batch_size,
            return_scores=True,
            return_attentions=arguments.attention is not None,
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
            if arguments.attention is not None:
                picture = free_path(arguments.attention, Path(path).stem, pictures)
                draw_attention(image, captions[0], picture)
                record["attention"] = str(picture)
                lines[0].append(str(picture))
            for line in lines:
                tqdm.write("\t".join(line), file=sys.stdout)
            records.append(record)
            bar.update()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    if not records:
        raise ValueError("No image could be read.")


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


def build_captioner(folder: str, device: str | None) -> Any:
    """The pipeline of a saved captioner.

    Raises:
        ValueError: no captioner can be loaded, or there is no such device.
    """
    model, processor = load_captioner(folder)
    try:
        return pipeline("image-captioning", model=model, processor=processor, device=device)
    except (RuntimeError, AssertionError) as e:  # torch's ways to say so
        line = str(e).partition("\n")[0].rstrip(".")
        raise ValueError(f"The device {device!r} can't be used: {line}. Try --device cpu.") from e


def draw_attention(image: Image.Image, caption: dict[str, Any], path: Path) -> None:
    """Draw where the model looked for each word of a caption."""
    attention_figure(image, caption["words"], caption["attentions"], box=caption["box"]).savefig(path)


def free_path(folder: Path, stem: str, taken: set[Path]) -> Path:
    """A name for a picture that no other image has: `stem.png`, or `stem-2.png` and so on."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    path = next(path for path in (folder / f"{name}.png" for name in names) if path not in taken)
    taken.add(path)
    return path


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a saved captioner: an output folder of train.py, or an id on the Hub")
    add("images", metavar="IMAGE", nargs="+", help="an image file, a folder of images, or a URL")
    add("--num_beams", "--num-beams", type=positive, metavar="N", help="beams (default: the model's own setting)")
    add("--num_captions", "--num-captions", type=positive, metavar="N", default=1,
        help="captions for each image, the best first (default: %(default)s)")  # fmt: skip
    add("--batch_size", "--batch-size", type=positive, metavar="N", default=8,
        help="images at once (default: %(default)s)")  # fmt: skip
    add("--attention", type=Path, metavar="DIR", help="draw where the model looked, a picture for each image")
    add("--json", type=Path, metavar="FILE", help="also write captions and their scores to this file")
    add("--device", help="cpu, cuda, cuda:1, mps, … (default: the first accelerator there is)")
    add("--skip_broken", "--skip-broken", action="store_true", help="go on without unreadable images, naming each")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """A whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


if __name__ == "__main__":
    run_main(main)
