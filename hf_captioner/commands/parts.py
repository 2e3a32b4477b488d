"""List the parts that captioners are made of, and what provides each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..cli import CommandParser
from ..model.registry import load

KINDS = {
    "encoders": "hf_captioner.model.encoders:ENCODERS",
    "attentions": "hf_captioner.model.attentions:ATTENTIONS",
    "decoders": "hf_captioner.model.decoders:DECODERS",
    "datasets": "hf_captioner.data.datasets:DATASETS",
    "metrics": "hf_captioner.metrics:METRICS",
}


def main(argv: Sequence[str]) -> int:
    """List parts; 1 if any of them can't be used."""
    kinds = parse(argv).kinds or list(KINDS)
    num_problems = 0
    for kind in kinds:
        registry = load(KINDS[kind])
        names = registry.names()
        width = max(map(len, names), default=0)
        print(kind)
        for name in names:
            print(f"  {name:<{width}}  {registry.origin(name)}")
            if problem := registry.problem(name):
                num_problems += 1
                print(f"  {'':<{width}}  PROBLEM: {problem}")
    return 1 if num_problems else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = CommandParser(
        prog="hf-captioner parts",
        description="List all parts, kind by kind, with where each comes from. Ends with 1 if one can't be used.",
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all by default")
    arguments = parser.parse_args(argv)
    if unknown := [kind for kind in arguments.kinds if kind not in KINDS]:
        parser.error(f"{unknown[0]!r} is no kind of part; kinds are {', '.join(KINDS)}")
    return arguments
