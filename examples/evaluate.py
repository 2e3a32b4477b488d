"""Score a saved captioner on a split of a data set.

    python examples/evaluate.py outputs/shapes --dataset shapes --split validation --num_beams 5
    accelerate launch examples/evaluate.py outputs/flickr8k --dataset flickr8k --split test

Captions are decoded, each image once whatever the number of processes. `scores.json` and `predictions.json` go to
`--output_dir`, by default `FOLDER/evaluation`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

# Python looks for modules beside a script first, and would take this file for the library of the same name.
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import evaluate

import hf_captioner.metrics.bleu
from hf_captioner import load_captions
from hf_captioner.cli import build_accelerator, load_captioner, run_main
from hf_captioner.data import check_captions, drop_broken_images, undecoded
from hf_captioner.evaluation import (
    Prediction,
    collapse_warnings,
    decode_captions,
    prediction_records,
    score_captions,
)


def main(argv: Sequence[str]) -> None:
    """Decode, score, print, write."""
    arguments = parse(argv)
    accelerator = build_accelerator()
    say = accelerator.print
    model, processor = load_captioner(arguments.folder)
    model.to(accelerator.device)
    with accelerator.local_main_process_first():
        dataset = load_captions(arguments.dataset, arguments.split)
    if arguments.max_images is not None:
        dataset = dataset.select(range(min(arguments.max_images, len(dataset))))
    dataset = check_captions(dataset, skip_broken=arguments.skip_broken, report=say)
    if arguments.skip_broken:
        dataset = drop_broken_images(dataset, report=say)
    predictions = decode_captions(
        model,
        processor,
        undecoded(dataset),
        accelerator,
        batch_size=arguments.batch_size,
        num_beams=arguments.num_beams,
    )
    if not accelerator.is_main_process:
        return

    scores = score_captions(predictions) | official_bleu(predictions)
    protocol = f"{arguments.dataset}, {arguments.split}, {len(predictions)} images, {arguments.num_beams} beams"
    say(f"Scores of {arguments.folder} on {protocol}:")
    for name, value in scores.items():
        say(f"  {name:<18} {value:.4f}")
    for warning in collapse_warnings(scores):
        say(f"  Warning: {warning}")
    output_dir = Path(arguments.output_dir or Path(arguments.folder) / "evaluation")
    output_dir.mkdir(parents=True, exist_ok=True)
    result = {"protocol": protocol, "model": arguments.folder, **scores}
    (output_dir / "scores.json").write_text(json.dumps(result, indent=2) + "\n")
    records = json.dumps(prediction_records(predictions), indent=1, ensure_ascii=False)
    (output_dir / "predictions.json").write_text(records + "\n")
    say(f"Written: {output_dir / 'scores.json'}, {output_dir / 'predictions.json'}")


def official_bleu(predictions: Sequence[Prediction]) -> dict[str, float]:
    """BLEU-1 … BLEU-4 through `evaluate`, by the module that this package ships: it equals the official one."""
    bleu = evaluate.load(hf_captioner.metrics.bleu.__file__)
    captions = {
        "predictions": [prediction.caption for prediction in predictions],
        "references": [prediction.references for prediction in predictions],
    }
    return {f"evaluate_bleu_{order}": bleu.compute(**captions, max_order=order)["bleu"] for order in range(1, 5)}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a saved captioner: an output folder of train.py, or an id on the Hub")
    add("--dataset", default="shapes", help="name of a data set, a folder, or an id on the Hub (default: %(default)s)")
    add("--split", default="validation", help="its split to score (default: %(default)s)")
    add("--num_beams", "--num-beams", type=int, default=5, help="beams (default: %(default)s)")
    add("--batch_size", "--batch-size", type=int, default=32, help="images at once (default: %(default)s)")
    add("--output_dir", "--output-dir", help="where scores and predictions go (default: FOLDER/evaluation)")
    add("--max_images", "--max-images", type=int, help="score only the first so many images")
    add("--skip_broken", "--skip-broken", action="store_true", help="go on without unreadable images, naming each")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
