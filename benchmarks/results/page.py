"""The results pages: every marked table and picture, computed from docs/results/STUDY.json.

A table is between the marks

    <!-- table: STUDY errors -->  ...  <!-- end -->

and a picture is drawn for

    <!-- picture: STUDY curves ../images/FILE.svg -->

The methods to show may follow after a colon, in their order; names that contain spaces are quoted:
<!-- table: STUDY paired: cd "cd, 4 views" -->. `TABLES` and `PICTURES` contain the kinds.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from matplotlib.figure import Figure

from benchmarks.results.kept import KEPT, ResultsError, load_kept
from benchmarks.results.tables import TABLES, Methods, results_of, teacher_of
from teach_once.report.charts import (
    Dot,
    as_svg,
    differences_to,
    dot_chart,
    errors_by_method,
    learning_curves,
)
from teach_once.report.learning_curves import curves_of, epochs_of
from teach_once.report.table import in_markdown, rows_of
from teach_once.runtime.metrics import TOP1_ERROR
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


def _errors(methods: Methods) -> Figure:
    """Draw a row per method."""
    results = results_of(methods)
    return errors_by_method(rows_of(results), results, teacher_of(methods))


def _stored(methods: Methods) -> Figure:
    """Draw a row per method, with the bytes of an image in the cache."""
    dots = [
        Dot(
            f"{each.label.partition(', ')[2] or each.label} · {each.bytes_per_image or 0:,} B",
            each.error.mean,
            runs=[result.last[TOP1_ERROR.name] for result in each.results],
        )
        for each in methods
    ]
    return dot_chart(dots, TOP1_ERROR.on_test(", last epoch"), {})


PICTURES: Mapping[str, Callable[[Methods], Figure | None]] = {
    "errors": _errors,
    "curves": lambda methods: learning_curves(curves_of(results_of(methods), epochs_of)),
    "differences": lambda methods: differences_to(rows_of(results_of(methods)), "kd"),
    "stored": _stored,
}


def page_with_tables(text: str, folder: Path = KEPT) -> str:
    """Compute every marked table of the page from the kept files. Raises ResultsError."""

    def table(mark: re.Match[str]) -> str:
        opening = mark[0].partition("\n")[0]
        return f"{opening}\n{in_markdown(_computed(TABLES, mark, folder))}<!-- end -->"

    return _TABLE.sub(table, text)


def pictures_of(text: str, folder: Path = KEPT) -> dict[str, bytes]:
    """Draw every marked picture of the page: {file name: SVG}. Raises ResultsError."""
    pictures = {}
    for mark in _PICTURE.finditer(text):
        if (figure := _computed(PICTURES, mark, folder)) is None:
            raise ResultsError(f"{mark[0]}: no two methods have three seeds in common")
        pictures[mark["file"]] = as_svg(figure)
    return pictures


def _computed(
    known: Mapping[str, Callable[[Methods], _Made]], mark: re.Match[str], folder: Path
) -> _Made:
    """Compute the table or picture of a mark, from its methods or from all of the study."""
    opening = mark[0].partition("\n")[0]
    if mark["kind"] not in known:
        what = opening.split()[1].rstrip(":")
        raise ResultsError(f"{opening}: unknown {what}; known: {', '.join(known)}")
    runs = {each.label: each for each in load_kept(folder / f"{mark['study']}.json")}
    labels = shlex.split(mark["methods"] or "") or list(runs)
    if unknown := [label for label in labels if label not in runs]:
        raise ResultsError(f"{opening}: no run of {', '.join(unknown)} is kept")
    try:
        return known[mark["kind"]]([runs[label] for label in labels])
    except ResultsError as error:
        raise ResultsError(f"{opening}: {mark['kind']}: {error}") from None


def write(page: Path, folder: Path = KEPT) -> None:
    """Write a page's tables and pictures again. Raises ResultsError before anything is written."""
    text = page.read_text()
    written, pictures = page_with_tables(text, folder), pictures_of(text, folder)
    write_atomically(page, written.encode())
    for name, svg in pictures.items():
        write_atomically(page.parent / name, svg)
