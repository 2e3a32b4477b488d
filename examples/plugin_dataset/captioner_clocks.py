"""Data set of drawn clocks, with two captions each that tell the time."""

import io
import math

from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw

HOURS = ["twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
TENS = ["twenty", "thirty", "forty", "fifty"]
MINUTES = ["o'clock", "five", "ten", "fifteen", *(ten + five for ten in TENS for five in ("", "-five"))]
FEATURES = Features({"image": ImageFeature(), "captions": List(Value("string")), "image_id": Value("string")})


def load_clocks(split: str | None = None, *, size: int = 64) -> Dataset | DatasetDict:
    """Draw one clock for each of the 144 times in steps of five minutes; every sixth is for validation.

    Args:
        split: "train" or "validation"; None for a dict of both.
        size: Side of the square images in pixels.

    Raises:
        ValueError: There is no such split.
    """
    times = {"train": [i for i in range(144) if i % 6], "validation": list(range(0, 144, 6))}
    if split is not None and split not in times:
        raise ValueError(f"'clocks' has no split {split!r}. It has: {', '.join(times)}.")
    wanted = times if split is None else {split: times[split]}
    splits = {name: Dataset.from_list([row(i, size) for i in wanted[name]], FEATURES, split=name) for name in wanted}
    return DatasetDict(splits) if split is None else splits[split]


def row(time: int, size: int) -> dict[str, object]:
    """Return the row of the clock at `time` times five minutes after twelve."""
    hour, minute = HOURS[time // 12], MINUTES[time % 12]
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((1, 1, size - 2, size - 2), outline="black", width=2)
    for turn, length, colour in ((time / 144, 0.25, "red"), (time / 12, 0.42, "blue")):
        tip = (math.sin(2 * math.pi * turn), -math.cos(2 * math.pi * turn))
        draw.line([(size / 2, size / 2), *[tuple(size * (0.5 + length * x) for x in tip)]], fill=colour, width=4)
    file = io.BytesIO()
    image.save(file, "PNG")
    captions = [f"it is {hour} {minute}", f"the clock says {hour} {minute}"]
    return {"image": {"bytes": file.getvalue(), "path": None}, "captions": captions, "image_id": f"clock-{time:03d}"}
