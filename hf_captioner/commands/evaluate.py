"""Score a saved captioner, or the captions of any other system, on a split of a data set.

    python examples/evaluate.py outputs/shapes --dataset shapes --split validation --num_beams 5
    accelerate launch examples/evaluate.py outputs/flickr8k --dataset flickr8k --split test
    python examples/evaluate.py captions.json --dataset flickr8k --split test     # COCO's format of results
    python examples/evaluate.py outputs/first outputs/second --dataset shapes     # is the second better?

Captions are decoded, each image once whatever the number of processes. `results.json` (scores, 95 % intervals and
the protocol), `predictions.jsonl` and `report.html` go to `--output_dir`; two systems get a folder each there, `first`
and `second`, and `comparison.json`.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset

from ..cli import CommandParser, add_hub_arguments, hub_arguments, load_captioner
from ..data.datasets import load_captions
from ..data.rows import check_captions, drop_broken_images, open_row, undecoded
from ..evaluation.predictions import (
    Evaluation,
    Prediction,
    collapse_warnings,
    comparison_lines,
    decode_captions,
    evaluate_predictions,
    prediction_records,
    read_predictions,
)
from ..evaluation.protocol import describe_decoding
from ..evaluation.report_page import report_page
from ..metrics.resampling import NUM_RESAMPLES, compare
from ..training.accelerator import build_accelerator


def main(argv: Sequence[str]) -> None:
    """Decode or read captions, score, print, write."""
    arguments = parse(argv)
    accelerator = build_accelerator()
    say = accelerator.print
    once = functools.cache(say)  # what is said of a whole data set
    if len(arguments.systems) > 2:
        raise ValueError(f"{len(arguments.systems)} systems are given; give one to score or two to compare.")
    with accelerator.local_main_process_first():
        dataset = load(arguments, arguments.split, once)
    split_images = len(dataset)
    if arguments.max_images is not None:
        dataset = dataset.select(range(min(arguments.max_images, len(dataset))))
    dataset = check_captions(dataset, skip_broken=arguments.skip_broken, report=say)
    if arguments.skip_broken:
        dataset = drop_broken_images(dataset, report=say)
    rows = undecoded(dataset)
    captioned = [caption(system, rows, accelerator, arguments) for system in arguments.systems]
    if not accelerator.is_main_process:
        return

    training = training_captions(arguments, once)
    output_dir = Path(arguments.output_dir or default_folder(arguments.systems))
    evaluations = []
    for system, folder, (predictions, decoding) in zip(
        arguments.systems, folders(output_dir, arguments.systems), captioned, strict=True
    ):
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
            report=say,
        )
        write(evaluation, rows, folder, say)
        evaluations.append(evaluation)
    if len(evaluations) == 2:
        report_comparison(evaluations[0], evaluations[1], arguments, output_dir, say)


def load(arguments: argparse.Namespace, split: str, say: Callable[[str], None]) -> Dataset:
    """A split of the data set."""
    return load_captions(
        arguments.dataset, split, format=arguments.dataset_format, skip_broken=arguments.skip_broken, report=say
    )


def caption(
    system: str, rows: Dataset, accelerator: Accelerator, arguments: argparse.Namespace
) -> tuple[list[Prediction], dict[str, Any] | None]:
    """A system's captions of all images, and how it searched for them if it is one of this package's."""
    if Path(system).is_file():
        return read_predictions(system, rows, report=accelerator.print), None
    model, processor = load_captioner(system, **hub_arguments(arguments))
    model.to(accelerator.device)
    search = {"num_beams": arguments.num_beams}
    decoding = describe_decoding(model.generation_config, **search)
    predictions = decode_captions(
        model,
        processor,
        rows,
        accelerator,
        batch_size=arguments.batch_size,
        description=f"Captions of {system}",
        **search,
    )
    return predictions, decoding


def training_captions(arguments: argparse.Namespace, say: Callable[[str], None]) -> list[str] | None:
    """Captions among which a caption is not novel."""
    if not arguments.training_split:
        return None
    try:
        dataset = load(arguments, arguments.training_split, say)
    except ValueError as e:
        say(f"Novel captions are not counted. {e}")
        return None
    return [caption for captions in dataset["captions"][:] for caption in captions]


def write(evaluation: Evaluation, rows: Dataset, output_dir: Path, say: Callable[[str], None]) -> None:
    """Print the scores; write them, the captions and the report."""
    say(f"Scores of {evaluation.protocol.system} on {evaluation.protocol.line()}:")
    for line in evaluation.table():
        say(f"  {line}")
    for warning in collapse_warnings(evaluation.scores):
        say(f"  Warning: {warning}")
    output_dir.mkdir(parents=True, exist_ok=True)
    results, captions, report = (output_dir / n for n in ("results.json", "predictions.jsonl", "report.html"))
    results.write_text(json.dumps(evaluation.as_dict(), indent=2) + "\n", encoding="utf-8")
    scores = evaluation.image_scores
    with captions.open("w", encoding="utf-8") as file:
        for index, record in enumerate(prediction_records(evaluation.predictions)):
            record["scores"] = {name: column[index] for name, column in scores.items()}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    report.write_text(report_page(evaluation, lambda index: open_row(rows[index])), encoding="utf-8")
    say(f"Written: {results}, {captions}, {report}")


def report_comparison(
    first: Evaluation, second: Evaluation, arguments: argparse.Namespace, output_dir: Path, say: Callable[[str], None]
) -> None:
    """Say whether the second system is better, and how surely."""
    differences = compare(first.tallies, second.tallies, num_resamples=arguments.num_resamples, seed=arguments.seed)
    names = first.protocol.system, second.protocol.system
    say(f"{names[1]} minus {names[0]}, 95 % intervals of paired resamples:")
    for line in comparison_lines(*names, differences):
        say(f"  {line}")
    result = {
        "first": first.protocol.as_dict(),
        "second": second.protocol.as_dict(),
        "second_minus_first": {name: difference._asdict() for name, difference in differences.items()},
    }
    path = output_dir / "comparison.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(f"Written: {path}")


def default_folder(systems: Sequence[str]) -> Path:
    """`FOLDER/evaluation`, `NAME_evaluation` beside a file, and here for a name on the Hub; `comparison` for two."""
    if len(systems) == 2:
        return Path("comparison")
    path = Path(systems[0])
    if path.is_dir():
        return path / "evaluation"
    # A folder called like an id on the Hub would be taken for the captioner the next time.
    return path.with_name(f"{path.stem}_evaluation") if path.is_file() else Path(f"{path.name}_evaluation")


def folders(output_dir: Path, systems: Sequence[str]) -> list[Path]:
    """Where the files of each system go."""
    return [output_dir] if len(systems) == 1 else [output_dir / "first", output_dir / "second"]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = CommandParser(
        prog="hf-captioner evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("systems", nargs="+", metavar="SYSTEM", help="a saved captioner (an output folder of train.py, or an id on the "
        "Hub), or a file of captions (COCO's result format, or predictions.jsonl); two to compare them")  # fmt: skip
    add("--dataset", default="shapes", help="name of a data set, a folder or file in any usual form, or an id on the "
        "Hub (default: %(default)s)")  # fmt: skip
    add("--dataset_format", help="form of its files, such as coco or kaggle; recognised by default")
    add("--split", default="validation", help="its split to score (default: %(default)s)")
    add("--num_beams", type=int, default=5, help="beams (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="images at once (default: %(default)s)")
    add("--output_dir", help="where the files go (default: SYSTEM/evaluation, FILE_evaluation beside "
        "a file, NAME_evaluation for a captioner on the Hub, comparison for two)")  # fmt: skip
    add("--max_images", type=int, help="score only the first so many images")
    add("--skip_broken", action="store_true", help="go on without unreadable images, naming each")
    add("--java", action="store_true", help="METEOR and SPICE too, if Java and pycocoevalcap are here")
    add("--training_split", default="train", help="captions not in this split are novel; '' to "
        "leave that out (default: %(default)s)")  # fmt: skip
    add("--num_resamples", type=int, default=NUM_RESAMPLES, help="bootstrap samples behind the "
        "intervals (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of these samples (default: %(default)s)")
    add_hub_arguments(parser)
    return parser.parse_args(argv)
