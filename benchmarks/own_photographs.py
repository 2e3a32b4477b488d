"""Ten minutes on 500 photographs with captions in another style: from a captioner, and from scratch.

    python benchmarks/own_photographs.py --from photographs --minutes 10 --out benchmarks/results/own_photographs

The photographs are 1,000 of Flickr8k's validation split, half to train on and half to score, so that the captioner has
seen none of them. Their captions are rewritten by rule in the style of a telegram with words of its own: "A black dog
is running through the grass" becomes "black pooch running through grass stop".

Both trainings have the same architecture, the same time and the same images. The one from scratch starts from ImageNet
weights of the encoder, as the recipe `flickr8k_efficientnet_lite2` does. The number of epochs that fits into the time
is found by a training of one epoch before, so that the learning rate of both can fall to its end. A training that takes
longer is stopped, and its best epoch so far counts. The captioner without any training is scored as well.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timing import machine

from hf_captioner import load_captions

LEFT_OUT = {"a", "an", "the", "is", "are", "was", "were", "be", "being", "there", "this", "that", "it", "its", "some"}
WORDS = {
    "dog": "pooch", "dogs": "pooches", "puppy": "pooch", "man": "chap", "men": "chaps", "woman": "madam",
    "women": "madams", "boy": "laddie", "boys": "laddies", "girl": "lassie", "girls": "lassies", "child": "nipper",
    "children": "nippers", "kid": "nipper", "kids": "nippers", "people": "folk", "person": "somebody",
    "bike": "velocipede", "bicycle": "velocipede", "car": "motorcar",
}  # fmt: skip
# A recipe for both: the one from scratch adds the model, which the other takes from its captioner.
SCRATCH = {
    "encoder_name": "tf_efficientnet_lite2", "encoder_kwargs": "{}", "pretrained": "true",
    "data_config": "{crop_pct: 1.0, crop_mode: squash}", "freeze_encoder": "true", "projection_size": 512,
    "decoder_type": "lstm", "gate": "true", "attention_size": 512, "embedding_size": 512, "hidden_size": 512,
    "deep_output": "true", "tie_word_embeddings": "true", "memory_dropout": 0.5, "embedding_dropout": 0.3,
    "output_dropout": 0.5, "batch_size": 16, "learning_rate": 1e-3, "weight_decay": 0.01, "ema_decay": 0.99,
    "label_smoothing": 0.1, "mixed_precision": "bf16", "select_by": "cider", "num_beams": 1, "max_length": 27,
    "length_penalty": 0.8, "no_repeat_ngram_size": 3,
}  # fmt: skip


def telegram(caption: str) -> str:
    """Rewrite a caption in the style of a telegram."""
    words = [word for word in re.findall(r"[\w'-]+", caption.lower()) if word not in LEFT_OUT]
    return " ".join([*(WORDS.get(word, word) for word in words), "stop"])


def write_data_set(data: str, folder: Path, num_train: int, num_validation: int) -> None:
    """Write two folders of images, each with a `metadata.jsonl`, as the data set of a user might be."""
    rows = load_captions(data, "validation", report=lambda _: None)
    first = 0
    for split, count in (("train", num_train), ("validation", num_validation)):
        (folder / split).mkdir(parents=True)
        lines = []
        for index in range(first, first + count):
            row = rows[index]
            row["image"].convert("RGB").save(folder / split / f"{index}.jpg", quality=95)
            captions = [telegram(caption) for caption in row["captions"]]
            lines.append(json.dumps({"file_name": f"{index}.jpg", "captions": captions}) + "\n")
        (folder / split / "metadata.jsonl").write_text("".join(lines))
        first += count


def train(options: dict[str, Any], output_dir: Path, log: Path, limit: float | None = None) -> float:
    """Run `hf-captioner train`, stop it by a signal after `limit` seconds, and return the seconds that it took."""
    command = [sys.executable, "-m", "hf_captioner", "train", "--output_dir", str(output_dir)]
    command += [f"--{name}={value}" for name, value in options.items()]
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            code = process.wait()
    if code not in (0, 128 + signal.SIGTERM):
        raise SystemExit(f"A training failed: {log.read_text()[-2000:]}")
    return time.monotonic() - started


def epochs_within(seconds: float, options: dict[str, Any], folder: Path) -> int:
    """Return how many epochs take this long, found by a training of one epoch, whose cached cells are deleted."""
    output_dir = folder / "trial"
    whole = train(options | {"epochs": 1, "cache_dir": folder / "trial_cells"}, output_dir, folder / "trial.txt")
    record = json.loads((output_dir / "log.jsonl").read_text().splitlines()[0])
    epoch = record["train_seconds"] + record["validation_seconds"]
    for path in (output_dir, folder / "trial_cells"):
        shutil.rmtree(path)
    return max(1, 1 + int((0.97 * seconds - whole) / epoch))


def evaluate(systems: list[Path | str], data: Path, output_dir: Path) -> None:
    """Score one system, or compare two, on the photographs that were kept apart."""
    command = [sys.executable, "-m", "hf_captioner", "evaluate", *map(str, systems), "--dataset", str(data)]
    command += ["--split", "validation", "--output_dir", str(output_dir)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def scores_of(folder: Path) -> dict[str, float]:
    """Return the scores in a folder that `hf-captioner evaluate` wrote."""
    scores = json.loads((folder / "results.json").read_text())["scores"]
    return {name: scores[name] for name in ("bleu_4", "cider")}


def main() -> None:
    """Write the data set, train both, and write logs and scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="captioner", default="photographs", help="captioner to go on from")
    parser.add_argument("--data", default="../shared/flickr8k", help="data set to take photographs from")
    parser.add_argument("--encoder_weights", default="../shared/encoders/tf_efficientnet_lite2.safetensors")
    parser.add_argument("--minutes", type=float, default=10.0, help="time of each training")
    parser.add_argument("--num_train", type=int, default=500)
    parser.add_argument("--num_validation", type=int, default=500)
    parser.add_argument("--num_threads", type=int, help="threads of each training (default: all cores)")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and scores")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    seconds, summary = 60 * arguments.minutes, {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "telegrams"
        write_data_set(arguments.data, data, arguments.num_train, arguments.num_validation)
        common: dict[str, Any] = {"dataset": data, "tracking": "none"}
        if arguments.num_threads:
            common["num_threads"] = arguments.num_threads
        programs = {
            "scratch": common | SCRATCH | {"encoder_weights": arguments.encoder_weights, "patience": 1000},
            "continued": common | {"from": arguments.captioner},
        }
        for name, options in programs.items():
            epochs = epochs_within(seconds, options, folder)
            options = options | {"epochs": epochs, "cache_dir": folder / f"{name}_cells"}
            took = train(options, folder / name, arguments.out / f"{name}.txt", limit=seconds)
            shutil.copy(folder / name / "log.jsonl", arguments.out / f"{name}.jsonl")
            summary[name] = {"epochs": epochs, "seconds": took}
        evaluate([folder / "scratch", folder / "continued"], data, folder / "scores")
        evaluate([arguments.captioner], data, folder / "unchanged")
        shutil.copy(folder / "scores" / "comparison.json", arguments.out)
        for name, scored in (("scratch", "scores/first"), ("continued", "scores/second"), ("unchanged", "unchanged")):
            summary.setdefault(name, {}).update(scores_of(folder / scored))
            lines = (folder / scored / "predictions.jsonl").read_text().splitlines()[:20]
            (arguments.out / f"{name}_captions.jsonl").write_text("".join(f"{line}\n" for line in lines))
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
    text = json.dumps({"machine": machine(), "settings": settings, **summary}, indent=2)
    (arguments.out / "summary.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
