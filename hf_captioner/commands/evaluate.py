"""Score a captioner, or the captions of any other system, on a split of a data set.

    hf-captioner evaluate outputs/shapes
    hf-captioner evaluate outputs/flickr8k --dataset flickr8k --split test
    hf-captioner evaluate --dataset my_folder                                # the captioner of the package
    hf-captioner evaluate captions.json --dataset flickr8k --split test      # captions in COCO's result format
    hf-captioner evaluate outputs/first outputs/second                       # is the second one better?
    accelerate launch -m hf_captioner evaluate outputs/flickr8k --dataset flickr8k     # on several devices

Writes `results.json` (scores, 95 % intervals and the protocol), `predictions.jsonl` and `report.html`. With two
systems, each gets a folder, `first` and `second`, and the differences are in `comparison.json`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset

from ..cli import CommandParser, add_access_arguments, add_hub_arguments, hub_arguments, load_captioner, positive_int
from ..data.datasets import load_captions, pick_split
from ..data.rows import open_row, select_usable_rows
from ..evaluation.predictions import Prediction, decode_captions, read_predictions
from ..evaluation.protocol import describe_decoding
from ..evaluation.report_page import report_page
from ..evaluation.results import write_comparison, write_results
from ..evaluation.scoring import (
    Evaluation,
    collapse_warnings,
    compare_evaluations,
    comparison_table,
    evaluate_predictions,
)
from ..files import explain_write_errors, write_atomically
from ..metrics.resampling import NUM_RESAMPLES
from ..pretrained import NAME
from ..training.accelerator import build_accelerator, owned_folder

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Caption a split with each system, then print and write the scores."""
    arguments = parse(argv)
    if len(arguments.systems) > 2:
        raise ValueError(f"{len(arguments.systems)} systems are given; give one to score or two to compare.")
    accelerator = build_accelerator()
    with accelerator.local_main_process_first():
        splits = load_captions(
            arguments.dataset,
            None if arguments.training_split else arguments.split,
            format=arguments.dataset_format,
            skip_broken=arguments.skip_broken,
            allow_urls=arguments.allow_urls,
            allow_outside=arguments.allow_outside,
        )
    split = pick_split(splits, arguments.split, arguments.dataset) if arguments.training_split else splits
    rows = select_usable_rows(split, max_images=arguments.max_images, skip_broken=arguments.skip_broken)
    output_dir = Path(arguments.output_dir or default_folder(arguments.systems))
    with owned_folder(output_dir, accelerator):
        captioned = [caption(system, rows, accelerator, arguments) for system in arguments.systems]
        if accelerator.is_main_process:
            score(captioned, rows, len(split), training_captions(splits, arguments), output_dir, arguments)


def score(
    captioned: Sequence[tuple[list[Prediction], dict[str, Any] | None]],
    rows: Dataset,
    split_images: int,
    training: list[str] | None,
    output_dir: Path,
    arguments: argparse.Namespace,
) -> None:
    """Print and write the scores of each system, and of two systems how they differ.

    Args:
        captioned: For each system what `caption` returned.
        rows: The images that were captioned.
        split_images: Number of images in the whole split.
        training: Captions that a novel caption must differ from, if they are known.
        output_dir: Folder for the files.
        arguments: Arguments of the command.
    """
    names = [""] if len(captioned) == 1 else ["first", "second"]
    evaluations = []
    for system, (predictions, decoding), name in zip(arguments.systems, captioned, names, strict=True):
        evaluation = evaluate_predictions(
            predictions,
            system=system,
            dataset=arguments.dataset,
            split=arguments.split,
            split_images=split_images,
            decoding=decoding,
            training=training,
            java=arguments.java,
            num_resamples=arguments.num_resamples,
            seed=arguments.seed,
        )
        show(evaluation, rows, output_dir / name)
        evaluations.append(evaluation)
    if len(evaluations) == 2:
        first, second = evaluations
        differences = compare_evaluations(first, second, num_resamples=arguments.num_resamples, seed=arguments.seed)
        print(f"{arguments.systems[1]} minus {arguments.systems[0]}, with 95 % intervals from paired resamples:")
        print(*(f"  {line}" for line in comparison_table(first, second, differences)), sep="\n")
        print(f"Written: {write_comparison(first, second, differences, output_dir)}")


def caption(
    system: str, rows: Dataset, accelerator: Accelerator, arguments: argparse.Namespace
) -> tuple[list[Prediction], dict[str, Any] | None]:
    """Return a system's captions, and the settings of their decoding, None for captions from a file. Collective."""
    if Path(system).is_file():
        return read_predictions(system, rows, allow_missing=arguments.allow_missing), None
    model, processor = load_captioner(system, **hub_arguments(arguments))
    model.to(accelerator.device)
    options: dict[str, Any] = {"batch_size": arguments.batch_size, "description": f"Captions of {system}"}
    predictions = decode_captions(model, processor, rows, accelerator, **options, num_beams=arguments.num_beams)
    return predictions, describe_decoding(model.generation_config, num_beams=arguments.num_beams)


def training_captions(splits: Mapping[str, Any], arguments: argparse.Namespace) -> list[str] | None:
    """Return the captions that a novel caption must differ from; None if there is no training split."""
    if not arguments.training_split:
        return None
    try:
        split = pick_split(splits, arguments.training_split, arguments.dataset)
    except ValueError as e:
        logger.warning(f"Novel captions are not counted. {e}")
        return None
    return [caption for captions in split["captions"][:] for caption in captions]


def show(evaluation: Evaluation, rows: Dataset, folder: Path) -> None:
    """Print an evaluation, and write its results and report to a folder."""
    print(f"Scores of {evaluation.protocol.system} on {evaluation.protocol.description}:")
    print(*(f"  {line}" for line in evaluation.table()), sep="\n")
    for line in collapse_warnings(evaluation.scores):
        logger.warning(line)
    page = report_page(evaluation, lambda index: open_row(rows[index]))
    with explain_write_errors("Scores and captions", folder):
        files = write_results(evaluation, folder)
        report = write_atomically(folder / "report.html", page)
    print(f"Written: {', '.join(map(str, [*files, report]))}")


def default_folder(systems: Sequence[str]) -> Path:
    """Return the folder to which results are written by default."""
    if len(systems) == 2:
        return Path("comparison")
    path = Path(systems[0])
    if path.is_dir() and systems[0] != NAME:
        return path / "evaluation"
    # For a captioner on the Hub, a folder called like its id would be taken for the captioner the next time.
    return path.with_name(f"{path.stem}_evaluation") if path.is_file() else Path(f"{path.name}_evaluation")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `hf-captioner evaluate`."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = CommandParser(
        prog="hf-captioner evaluate",
        usage="%(prog)s [SYSTEM [SYSTEM]] [options]",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("systems", nargs="*", default=[NAME], metavar="SYSTEM", help="captioner (a folder, or an id on "
        "the Hub), or file of captions (JSON or JSON Lines); two to compare them (default: photographs, the captioner "
        "of this package)")  # fmt: skip
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--dataset", help="name, folder, file or Hub id (default: shapes; flickr8k for the captioner photographs)")
    add("--dataset_format", metavar="FORMAT", help="layout of a folder, such as coco (default: detected)")
    add("--split", default="validation", help="split to score (default: %(default)s)")
    add("--max_images", type=positive_int, metavar="N", help="score only the first N images")
    add("--allow_missing", action="store_true", help="leave out images for which a file has no caption")
    add("--skip_broken", action="store_true", help="leave out images that can't be read, naming each")
    add_access_arguments(data)
    add = parser.add_argument_group("decoding").add_argument
    add("--num_beams", type=positive_int, default=5, metavar="N", help="beams (default: %(default)s)")
    add("--batch_size", type=positive_int, default=32, metavar="N", help="images per batch (default: %(default)s)")
    add = parser.add_argument_group("scores").add_argument
    add("--java", action="store_true", help="score METEOR and SPICE too; needs Java and pycocoevalcap")
    add("--training_split", default="train", metavar="SPLIT", help="captions in this split are not novel; '' to leave "
        "novel captions uncounted (default: %(default)s)")  # fmt: skip
    add("--num_resamples", type=positive_int, default=NUM_RESAMPLES, metavar="N", help="bootstrap samples for the "
        "intervals (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of these samples (default: %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", metavar="DIR", help="folder for the files (default: SYSTEM/evaluation for a folder, "
        "FILE_evaluation beside a file, NAME_evaluation for a captioner on the Hub, comparison for two)")  # fmt: skip
    add_hub_arguments(parser)
    arguments = parser.parse_args(argv)
    arguments.dataset = arguments.dataset or ("flickr8k" if NAME in arguments.systems else "shapes")
    return arguments
