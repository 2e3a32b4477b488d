"""The captioner that comes with the package: `photographs`, trained on photographs of people and dogs outdoors."""

from __future__ import annotations

from pathlib import Path

# Names of the captioner: short, wherever a captioner is named; and as a folder, for transformers' `from_pretrained`.
NAME = "photographs"
PHOTOGRAPHS = str(Path(__file__).parent / NAME)


def captioner_path(name: str | Path) -> str:
    """Return the folder of the captioner `photographs`, and any other name of a captioner as it is.

    A folder of your own that is called `photographs` is named `./photographs`.

    Raises:
        FileNotFoundError: This installation comes without the captioner.
    """
    if str(name) != NAME:
        return str(name)
    if not Path(PHOTOGRAPHS, "config.json").is_file():
        raise FileNotFoundError(
            f"This installation of hf_captioner has no captioner in {PHOTOGRAPHS!r}. Install the package again, or "
            "name a captioner: a folder, or an id on the Hub."
        )
    return PHOTOGRAPHS
