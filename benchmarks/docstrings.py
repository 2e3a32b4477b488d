"""Draw docstrings at random, without their code, for a reader who is to say what each means.

python benchmarks/docstrings.py --seed 1 --num 40
"""

from __future__ import annotations

import argparse
import ast
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def docstrings() -> Iterator[tuple[str, str, str]]:
    """Yield file, signature and docstring of every documented module, class and function of package and examples."""
    for folder in ("hf_captioner", "examples"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                    yield str(file.relative_to(ROOT)), signature(node), text


def signature(node: ast.AST) -> str:
    """Return the first line of a definition, such as `def scaled(image: Image, longest_edge: float) -> Image`."""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"def {node.name}({ast.unparse(node.args)}){returns}"
    return f"class {node.name}" if isinstance(node, ast.ClassDef) else "module"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=40)
    arguments = parser.parse_args()
    drawn = random.Random(arguments.seed).sample(list(docstrings()), arguments.num)
    for number, (file, name, text) in enumerate(drawn, 1):
        print(f"{number}. {file}: {name}\n{textwrap.indent(text, '    ')}\n")


if __name__ == "__main__":
    main()
