"""A web page about a system's captions: its scores, their spread, the best, the worst and some others.

One file without anything from elsewhere and without scripts, in the style of `attention_page`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from html import escape
from string import Template

from PIL.Image import Image

from ..metrics.tokenization import tokenize_ptb
from ..model.captions import spaced
from ..visualization.page import STYLE, jpeg_uri, sha256_of
from .predictions import Evaluation, written

NUM_WORDS = 20  # bars of the histogram of words

REPORT_STYLE = (
    STYLE
    + """
h2 { margin: 2.5rem 0 .8rem; font-size: 1.15rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem 1.2rem .15rem 0; text-align: left; font-weight: normal; vertical-align: top; }
th { color: var(--faded); }
td.figure { text-align: right; }
.bars { width: 100%; max-width: 44rem; }
.bars meter { width: 100%; height: .7rem; display: block; }
.bars meter + meter { opacity: .4; }
.bars td { padding-right: .8rem; }
.gallery { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%), 1fr)); }
.score { color: var(--faded); font-size: .85rem; font-variant-numeric: tabular-nums; }
figcaption ul { margin: .3rem 0; padding-left: 1.1rem; color: var(--faded); font-size: .9rem; }
"""
)

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'sha256-$style_hash'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1><p>$protocol</p></header>
$sections
</body>
</html>
""")


def report_page(
    evaluation: Evaluation, open_image: Callable[[int], Image], *, num_images: int = 8, seed: int = 0
) -> str:
    """The page of an evaluation.

    Args:
        evaluation: of `evaluate_predictions`.
        open_image: gives the image of a row of the data set.
        num_images: how many of the best, of the worst and of the others to show.
        seed: of the choice of the others.
    """
    protocol = evaluation.protocol
    cider = evaluation.image_scores["cider"]
    ranked = sorted(range(len(cider)), key=lambda index: (-cider[index], index))
    num_images = min(num_images, len(ranked))
    chosen = {
        "Best images by CIDEr": ranked[:num_images],
        "Worst images by CIDEr": ranked[::-1][:num_images],
        "Random images": random.Random(seed).sample(ranked, num_images),
    }
    figures = {
        index: _figure(evaluation, index, open_image(index), cider[index])
        for index in dict.fromkeys(index for indices in chosen.values() for index in indices)
    }
    gallery = [
        f'<h2>{title}</h2>\n<div class="gallery">\n{chr(10).join(figures[index] for index in indices)}\n</div>'
        for title, indices in chosen.items()
    ]
    captions = [tokenize_ptb(spaced(prediction.caption)) for prediction in evaluation.predictions]
    references = [
        tokenize_ptb(spaced(caption)) for prediction in evaluation.predictions for caption in prediction.references
    ]
    lengths = _histogram(Counter(map(len, captions)), Counter(map(len, references)), by_count=False)
    words = _histogram(Counter(w for c in captions for w in c), Counter(w for c in references for w in c))
    sections = [
        f"<h2>Scores</h2>\n{_scores(evaluation)}",
        f"<h2>May be put next to</h2>\n{''.join(f'<p>{escape(line)}</p>' for line in protocol.next_to())}",
        f"<h2>Words of a caption</h2>\n{lengths}",
        f"<h2>Most frequent words</h2>\n{words}",
        *gallery,
        f"<h2>Protocol</h2>\n{_protocol(evaluation)}",
    ]
    return PAGE.substitute(
        title=f"Captions of {escape(protocol.system)}",
        protocol=escape(protocol.line()),
        style=REPORT_STYLE,
        style_hash=sha256_of(REPORT_STYLE),
        sections="\n".join(sections),
    )


def _scores(evaluation: Evaluation) -> str:
    rows = []
    for name, value in evaluation.scores.items():
        interval = evaluation.intervals.get(name)
        spread = "" if interval is None else f"{interval[0]:.4f} – {interval[1]:.4f}"
        rows.append(f'<tr><th>{name}</th><td class="figure">{written(value)}</td><td>{spread}</td></tr>')
    return f"<table><tr><th>score</th><th>value</th><th>95 % interval</th></tr>{''.join(rows)}</table>"


def _histogram(of_captions: Counter, of_references: Counter, *, by_count: bool = True) -> str:
    """Bars of shares, of the captions above those of the references."""
    shares = [{key: n / max(1, counts.total()) for key, n in counts.items()} for counts in (of_captions, of_references)]
    keys = [key for key, _ in of_captions.most_common(NUM_WORDS)]
    if not by_count:
        keys = list(range(max([*of_captions, *(n for n in of_references if shares[1][n] > 0.002)]) + 1))
    largest = max((share.get(key, 0) for share in shares for key in keys), default=1) or 1
    rows = []
    for key in keys:
        first, second = (share.get(key, 0) for share in shares)
        bars = "".join(
            f'<meter value="{share / largest:.4f}" title="{whose}: {share:.1%}"></meter>'
            for whose, share in (("captions", first), ("references", second))
        )
        text = f'<td class="figure">{first:.1%}</td><td class="figure">{second:.1%}</td>'
        rows.append(f"<tr><td>{escape(str(key))}</td><td width='60%'>{bars}</td>{text}</tr>")
    head = "<tr><th></th><th></th><th>captions</th><th>references</th></tr>"
    return f'<table class="bars">{head}{"".join(rows)}</table>'


def _figure(evaluation: Evaluation, index: int, image: Image, cider: float) -> str:
    prediction = evaluation.predictions[index]
    references = "".join(f"<li>{escape(caption)}</li>" for caption in prediction.references)
    return f"""<figure>
<div class="photo"><img src="{jpeg_uri(image)}" width="{image.width}" height="{image.height}" \
alt="{escape(prediction.caption)}"></div>
<figcaption>
<div class="name">{escape(prediction.image_id)}</div>
<div>{escape(prediction.caption) or "(an empty caption)"}</div>
<div class="score">CIDEr {cider:.3f}</div>
<ul>{references}</ul>
</figcaption>
</figure>"""


def _protocol(evaluation: Evaluation) -> str:
    rows = []
    for name, value in evaluation.protocol.as_dict().items():
        if name in ("metrics", "may_be_put_next_to"):
            continue
        rows.append(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>")
    for metric in evaluation.protocol.metrics.values():
        penalty = f"; brevity penalty by the {metric['brevity_penalty']}" if metric["brevity_penalty"] else ""
        text = f"{metric['version']}; tokens {metric['tokenizer']}{penalty}"
        rows.append(f"<tr><th>{escape(', '.join(metric['scores']))}</th><td>{escape(text)}</td></tr>")
    return f"<table>{''.join(rows)}</table>"
