"""Find the habits of English that a program can see: openings of docstrings, and some phrases.

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
PAGES = ("*.md", "store/FORMAT.md", "docs/**/*.md")
# Parts and pages in which the rules marked "everywhere else" have violations.
UNREVISED: tuple[str, ...] = ()
UNREVISED_PAGES: tuple[str, ...] = ()
# A function's docstring begins with a verb, and a property's with a noun: not with these.
OPENINGS = {
    "Of ": "put the noun or the verb first",
    "Whether ": "write `Return True if`",
    "As `": "say what it does",
}
# Everywhere else, no docstring of a function begins with these or with a lower-case letter.
_NOUN_OPENINGS = (
    *("A ", "All ", "An ", "Both ", "Each ", "Every ", "How ", "Its ", "The ", "These ", "Those "),
    *("What ", "Where ", "Which ", "(", "{", "`", '"'),
)
_VERB = "begin with a verb: Return, Build, Check, ..."
PHRASES = {
    re.compile(r"\bof so many\b"): "name the number: of `num_samples` samples",
    re.compile(r"(?<!here )\bis no (?!longer\b|more\b|later\b|less\b)"): "write `is not a`",
}
# Everywhere else, in docstrings, comments and messages.
WORDS = {
    re.compile(r"\bso many\b"): "name the number",
    re.compile(r"\bbeside\b"): "write `next to`",
    re.compile(r"\bwhoever\b|\bnobody\b"): "name the process or the person",
    re.compile(r"\b(is|are|was) sound\b"): "write `valid`",
    re.compile(r"\b(lie|lies) (in|below|within|where)\b"): "write `is in`",
    re.compile(r"\b(mend|mends|mended)\b"): "write `repair`",
    re.compile(r"\bof (ours|theirs)\b"): "repeat the noun",
    re.compile(r"\b(says|knows) (that|what|which|how|where|whether)\b"): "code contains or returns",
    re.compile(r"\bthat which\b|\bis asked of\b|\bwhat is (there|left|asked)\b"): "name the noun",
    re.compile(r"\bgoes on\b|\bfor ever\b|\bat hand\b"): "write `continues`, `endlessly`, `there`",
}


class Finding(NamedTuple):
    line: int
    text: str
    advice: str


def findings(source: str, *, revised: bool = True) -> Iterator[Finding]:
    """Yield the docstrings, comments and messages of a module that have one of the habits.

    revised: apply the rules for parts of the project without violations too.
    """
    phrases = PHRASES | (WORDS if revised else {})
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            for advice in _opening_advice(node, text, revised):
                yield Finding(node.lineno, text.partition("\n")[0], advice)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for line, text in enumerate(token.string.splitlines(), token.start[0]):
                for phrase, advice in phrases.items():
                    if phrase.search(text):
                        yield Finding(line, text.strip(), advice)


def _opening_advice(
    function: ast.FunctionDef | ast.AsyncFunctionDef, text: str, revised: bool
) -> list[str]:
    """Return the advice for the first words of a function's docstring."""
    for opening, advice in OPENINGS.items():
        if text.startswith(opening):
            return [advice]
    is_property = any("property" in ast.unparse(each) for each in function.decorator_list)
    if not revised or is_property or not text:
        return []
    return [_VERB] if text.startswith(_NOUN_OPENINGS) or text[0].islower() else []


def page_findings(page: str) -> Iterator[Finding]:
    """Yield the lines of a Markdown page, outside of code blocks, that have one of the phrases."""
    is_code = False
    for number, line in enumerate(page.splitlines(), 1):
        is_code ^= line.lstrip().startswith("```")
        for phrase, advice in (PHRASES | WORDS).items():
            if not is_code and phrase.search(line):
                yield Finding(number, line.strip(), advice)


def all_findings() -> list[str]:
    """Return a line for each finding in the project's modules and pages."""
    pages = sorted({page for pattern in PAGES for page in ROOT.glob(pattern)})
    return [
        f"{page.relative_to(ROOT)}:{each.line}: {each.text} ({each.advice})"
        for page in pages
        if str(page.relative_to(ROOT)) not in UNREVISED_PAGES
        for each in page_findings(page.read_text())
    ] + [
        f"{file.relative_to(ROOT)}:{each.line}: {each.text} ({each.advice})"
        for part in PARTS
        for file in sorted((ROOT / part).rglob("*.py"))
        for each in findings(file.read_text(), revised=part not in UNREVISED)
    ]


if __name__ == "__main__":
    sys.exit("\n".join(all_findings()) or 0)
