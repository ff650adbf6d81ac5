"""Find the habits of English that a program can see: openings of docstrings, and two phrases.

python -m tests.support.english      part of make lint: a line for each place, with advice
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

from tests.support.project import ROOT

PARTS = (
    *("runtime", "configs", "store", "nets", "views", "precompute", "train", "report"),
    *("teach_once", "benchmarks", "examples"),
)
# A function's docstring begins with a verb, and a property's with a noun: not with these.
OPENINGS = {
    "Of ": "put the noun or the verb first",
    "Whether ": "write `Return True if`",
    "As `": "say what it does",
}
PHRASES = {
    re.compile(r"\bof so many\b"): "name the number: of `num_samples` samples",
    re.compile(r"(?<!here )\bis no (?!longer\b|more\b|later\b|less\b)"): "write `is not a`",
}


class Finding(NamedTuple):
    line: int
    text: str
    advice: str


def findings(source: str) -> Iterator[Finding]:
    """Yield the docstrings, comments and messages of a module that have one of the habits."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            for opening, advice in OPENINGS.items():
                if text.startswith(opening):
                    yield Finding(node.lineno, text.partition("\n")[0], advice)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for line, text in enumerate(token.string.splitlines(), token.start[0]):
                for phrase, advice in PHRASES.items():
                    if phrase.search(text):
                        yield Finding(line, text.strip(), advice)


def all_findings() -> list[str]:
    return [
        f"{file.relative_to(ROOT)}:{each.line}: {each.text} ({each.advice})"
        for part in PARTS
        for file in sorted((ROOT / part).rglob("*.py"))
        for each in findings(file.read_text())
    ]


if __name__ == "__main__":
    sys.exit("\n".join(all_findings()) or 0)
