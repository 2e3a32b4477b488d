"""Train a captioner on drawn shapes with a short training loop in plain PyTorch and Accelerate.

    python examples/plain_loop.py                       # about a minute on two cores
    accelerate launch examples/plain_loop.py            # on several processes, or on a GPU

It leaves out all that `examples/train.py` adds: recipes, checkpoints, beam search, rewards, logs.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from hf_captioner import CaptionerModel, CaptionerProcessor, load_captions
from hf_captioner.metrics import caption_metrics


def main(output_dir: str, num_images: int, epochs: int, batch_size: int = 16) -> None:
    """Train a small captioner on drawn shapes, caption new ones, score the captions, and save the captioner."""
    set_seed(0)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())

    # A row of a data set has an image, its reference captions and an id.
    train = load_captions("shapes", "train", num_images=num_images)
    validation = load_captions("shapes", "validation", num_images=max(8, num_images // 16))

    # The vocabulary consists of the words of the training captions.
    captions = [caption for row in train["captions"] for caption in row]
    data_config = {"input_size": (3, 64, 64), "crop_pct": 1.0}
    pixels = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_mode": "center"}
    processor = CaptionerProcessor.from_captions(captions, data_config | pixels, min_count=1)

    # Show, Attend and Tell: an encoder makes a grid of cells of an image; a decoder with attention writes words.
    model = CaptionerModel.from_encoder(
        "test_resnet", pretrained=False, encoder_kwargs={"output_stride": 16}, data_config=data_config,
        vocab_size=len(processor.tokenizer), embedding_size=64, hidden_size=128, attention_size=64,
    )  # fmt: skip

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        """Turn rows into `pixel_values` (B, 3, H, W) and `labels` (B, K, T): word ids, -100 after a caption's end."""
        return dict(processor(images=[row["image"] for row in rows], text=[row["captions"] for row in rows]))

    loader = DataLoader(train, batch_size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * len(loader))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(epochs):
        model.train()
        total = 0.0
        for batch in loader:
            # Forward: the decoder reads each reference caption and predicts its next word at every position.
            # The loss is the mean cross-entropy of these predictions.
            loss = model(**batch).loss
            # Backward: compute the gradient of the loss, and scale it down if it is too long.
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 5.0)
            # Step: move the weights against the gradient.
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.item()
        accelerator.print(f"epoch {epoch + 1}/{epochs}: loss {total / len(loader):.3f}")

    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model).eval()
        # Greedy decoding: choose the likeliest word, read it, choose the next one, until <end>.
        predictions: list[str] = []
        for start in range(0, len(validation), batch_size):
            images = validation[start : start + batch_size]["image"]
            pixel_values = processor(images=images)["pixel_values"].to(accelerator.device)
            predictions += processor.batch_decode(model.generate(pixel_values, num_beams=1, max_length=20))
        for row, prediction in list(zip(validation, predictions, strict=True))[:5]:
            print(f"{prediction}   (reference: {row['captions'][0]})")
        scores = caption_metrics(predictions, validation["captions"][:])
        print(f"BLEU-4 {scores['bleu_4']:.3f}, CIDEr {scores['cider']:.3f}")
        model.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
        print(f"Saved. Caption images by: hf-captioner caption {output_dir} IMAGE")
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/plain_loop", help="folder for the captioner")
    parser.add_argument("--num_images", type=int, default=1500, help="training images")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training images")
    main(**vars(parser.parse_args()))
