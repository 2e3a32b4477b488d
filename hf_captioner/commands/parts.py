"""List the parts that captioners are made of: encoders, attentions, decoders, data sets and metrics.

    hf-captioner parts               # all parts, and where each comes from
    hf-captioner parts attentions    # those of one kind

Parts of other packages are imported. One that can't be used is listed with the reason, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..cli import EXIT_PROBLEM, CommandParser
from ..model.registry import load

# Where the registry of each kind of part is.
KINDS = {
    "encoders": "hf_captioner.model.encoders:ENCODERS",
    "attentions": "hf_captioner.model.attentions:ATTENTIONS",
    "decoders": "hf_captioner.model.decoders:DECODERS",
    "datasets": "hf_captioner.data.datasets:DATASETS",
    "metrics": "hf_captioner.metrics:METRICS",
}


def main(argv: Sequence[str]) -> int:
    """Print the parts, kind by kind, and return 1 if any of them can't be used, else 0."""
    has_problems = False
    for kind in parse(argv).kinds or KINDS:
        registry = load(KINDS[kind])
        names = registry.names()
        width = max(map(len, names), default=0)
        print(kind)
        for name in names:
            print(f"  {name:<{width}}  {registry.origin(name)}")
            if problem := registry.problem(name):
                has_problems = True
                print(f"  {'':<{width}}  PROBLEM: {problem}")
    return EXIT_PROBLEM if has_problems else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `hf-captioner parts`."""
    parser = CommandParser(
        prog="hf-captioner parts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} (default: all of them)")
    arguments = parser.parse_args(argv)
    if unknown := [kind for kind in arguments.kinds if kind not in KINDS]:
        parser.error(f"{unknown[0]!r} is not a kind of part. Kinds are {', '.join(KINDS)}.")
    return arguments
