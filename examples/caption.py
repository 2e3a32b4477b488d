"""Caption an image and draw where the model looked for each word.

    python examples/caption.py outputs/shapes photo.jpg

`hf-captioner caption` does this for whole folders.
"""

import sys

from transformers import pipeline

import hf_captioner  # noqa: F401  # makes "image-captioning" known to transformers
from hf_captioner.visualization import attention_figure

folder, photo = sys.argv[1:]
captioner = pipeline("image-captioning", model=folder)
(caption,) = captioner(photo, return_attentions=True, return_scores=True)
print(caption["generated_text"])
for word, score in zip(caption["words"], caption["word_scores"], strict=True):
    print(f"{score:8.3f}  {word}")
figure = attention_figure(photo, caption["words"], caption["attentions"], box=caption["box"])
figure.savefig("attention.png")
