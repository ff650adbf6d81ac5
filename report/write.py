"""Writes the report of a folder of runs: report.html, ablation.md, ablation.csv, ablation.png."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from report.charts import errors_by_method
from report.page import Report, html_page, markdown_page
from report.runs import Result, results_in
from report.table import csv_table, markdown_table, rows_of
from runtime.files import write_atomically


def write_report(
    folder: Path,
    names: Sequence[str] = (),
    *,
    cache: Path | None = None,
    asked: str = "",
    commands: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """Write the four files into `folder`, which holds one student's runs.

    Returns the table, and a line for each run that was left out.

    names: of the runs; default: as in `results_in`. cache: read for the teacher's errors if the
    runs were trained before these were measured. asked: the methods and seeds asked for now, in
    words. commands: to be printed; the first one made the report. Raises ReportError, CacheError.
    """
    found = results_in(folder, names)
    results = found.results
    teacher = _teacher_errors(results, cache)
    title, rows = f"Ablation of {results[0].student}", rows_of(results)
    report = Report(title, results, rows, teacher, _scope(names, asked, found.left_out), commands)
    picture = errors_by_method(rows, results, teacher, title)
    write_atomically(folder / "ablation.md", markdown_page(report).encode())
    write_atomically(folder / "ablation.csv", csv_table(results).encode())
    write_atomically(folder / "ablation.png", picture)
    write_atomically(folder / "report.html", html_page(report).encode())
    left_out = [f"left out: {problem}" for problem in found.left_out.values()]
    return markdown_table(rows, teacher), left_out


def _teacher_errors(results: Sequence[Result], cache: Path | None) -> Mapping[str, float]:
    for result in results:
        if result.teacher:
            return result.teacher
    if cache is None:
        return {}
    from store.source import open_source

    return open_source(cache).manifest.measured


def _scope(names: Sequence[str], asked: str, left_out: Collection[str]) -> str:
    """Which runs the report holds, in a sentence or two."""
    damaged = f" Left out, for their files are damaged: {', '.join(left_out)}." if left_out else ""
    if names and not asked:
        return f"The runs {', '.join(name for name in names if name not in left_out)}.{damaged}"
    more = f"; asked for now: {asked}" if asked else ""
    return f"All finished runs with these settings{more}.{damaged}"
