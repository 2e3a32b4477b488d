"""Score a captioner on a split of a data set, on one device or several.

    python examples/evaluate.py outputs/shapes
    accelerate launch examples/evaluate.py outputs/flickr8k flickr8k test

`hf-captioner evaluate` does the same with more options, and writes the results to files.
"""

import sys

from accelerate import Accelerator

from hf_captioner import CaptionerModel, CaptionerProcessor, load_captions
from hf_captioner.evaluation.predictions import decode_captions
from hf_captioner.evaluation.protocol import describe_decoding
from hf_captioner.evaluation.scoring import evaluate_predictions


def main(folder: str, dataset: str = "shapes", split: str = "validation") -> None:
    """Decode a caption for each image, score all captions, and print a table of scores."""
    accelerator = Accelerator()
    model = CaptionerModel.from_pretrained(folder).to(accelerator.device)
    processor = CaptionerProcessor.from_pretrained(folder)
    rows = load_captions(dataset, split)
    # Every process decodes a part of the images, and gets all captions back.
    predictions = decode_captions(model, processor, rows, accelerator, num_beams=5)
    if accelerator.is_main_process:
        decoding = describe_decoding(model.generation_config, num_beams=5)
        evaluation = evaluate_predictions(predictions, system=folder, dataset=dataset, split=split, decoding=decoding)
        print(*evaluation.table(), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
