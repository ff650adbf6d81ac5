"""The results pages: every marked table and picture, computed from docs/results/STUDY.json.

A table stands between the marks

    <!-- table: STUDY errors -->  ...  <!-- end -->

and a picture is drawn for

    <!-- picture: STUDY curves ../images/FILE.svg -->

Of a study's methods, those to be shown may follow after a colon, in this order; names with spaces
in quotes: <!-- table: STUDY paired: cd "cd, 4 views" -->.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks.results.kept import KEPT, LabeledResult, ResultsError, load_kept
from benchmarks.results.pictures import PICTURES
from benchmarks.results.tables import TABLES
from teach_once.report.table import in_markdown
from teach_once.runtime.safe.files import write_atomically

PAGE = Path("docs/development/results.md")
PAGES = (PAGE, Path("docs/explanation/results.md"))  # everything, and a table for each question
_METHODS = r"(?:: (?P<methods>[^>]*?))?"
_TABLE = re.compile(
    rf"<!-- table: (?P<study>[\w.+-]+) (?P<kind>\w+){_METHODS} -->\n.*?<!-- end -->", re.DOTALL
)
_PICTURE = re.compile(
    rf"<!-- picture: (?P<study>[\w.+-]+) (?P<kind>\w+) (?P<file>[\w./+-]+\.svg){_METHODS} -->"
)
_Made = TypeVar("_Made")


def page_with_tables(text: str, folder: Path = KEPT) -> str:
    """The page with every marked table computed from the kept files. Raises ResultsError."""

    def table(mark: re.Match[str]) -> str:
        opening = mark[0].partition("\n")[0]
        make = _of_kind(TABLES, mark, opening)
        return f"{opening}\n{in_markdown(make(_runs(mark, opening, folder)))}<!-- end -->"

    return _TABLE.sub(table, text)


def pictures_of(text: str, folder: Path = KEPT) -> dict[str, bytes]:
    """{file name: SVG bytes} of every marked picture of the page. Raises ResultsError."""
    return {
        mark["file"]: _of_kind(PICTURES, mark, mark[0])(_runs(mark, mark[0], folder))
        for mark in _PICTURE.finditer(text)
    }


def _of_kind(known: Mapping[str, _Made], mark: re.Match[str], opening: str) -> _Made:
    if mark["kind"] not in known:
        what = opening.split()[1].rstrip(":")
        raise ResultsError(f"{opening}: unknown {what}; known: {', '.join(known)}")
    return known[mark["kind"]]


def _runs(mark: re.Match[str], opening: str, folder: Path) -> Sequence[LabeledResult]:
    """Load the runs of a mark's study, or of the methods that the mark names."""
    runs = load_kept(folder / f"{mark['study']}.json")
    methods = shlex.split(mark["methods"] or "")
    found = {run.result.method for run in runs}
    if unknown := [method for method in methods if method not in found]:
        raise ResultsError(f"{opening}: no run of {', '.join(unknown)} is kept")
    return [r for method in methods for r in runs if r.result.method == method] or runs


def write(page: Path, folder: Path = KEPT) -> None:
    """Write a page's tables and pictures again. Raises ResultsError before anything is written."""
    text = page.read_text()
    written, pictures = page_with_tables(text, folder), pictures_of(text, folder)
    write_atomically(page, written.encode())
    for name, svg in pictures.items():
        write_atomically(page.parent / name, svg)
