"""Write the report of a folder of runs: report.html, ablation.md, ablation.csv, ablation.png.

`report.names` defines the suffixes of these names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from teach_once.report.charts import as_png, as_svg, errors_by_method
from teach_once.report.names import has_variants, suffix_for
from teach_once.report.page import Report, html_page, markdown_page
from teach_once.report.probes import probe_chart
from teach_once.report.runs import Found, Result, results_in
from teach_once.report.table import csv_table, rows_of, terminal_table
from teach_once.runtime.safe.files import write_atomically


class WrittenReport(NamedTuple):
    """The terminal's table, a line for each run left out, and the suffix of the file names."""

    table: str
    left_out: Sequence[str]
    suffix: str


def write_report(
    folder: Path,
    names: Sequence[str] = (),
    *,
    methods: Sequence[str] = (),
    cache: Path | None = None,
    asked: str = "",
    commands: Sequence[str] = (),
) -> WrittenReport:
    """Write the four files into `folder`, which contains one student's runs.

    names, methods: as in `results_in`. cache: read for the teacher's errors if the runs lack them.
    asked: the requested methods and seeds in words; then `names` are all runs of a study. commands:
    printed in the report; the first one made it.

    Raises ReportError if there is nothing to report, CacheError if `cache` cannot be read.
    """
    found = results_in(folder, names, methods)
    results = found.results
    suffix = suffix_for(folder, results, found.finished, () if asked else (*names, *methods))
    teacher = _teacher_errors(results, cache)
    title, rows = f"Ablation of {results[0].student}", rows_of(results)
    scope = _scope(names, methods, asked, found)
    picture_name = f"ablation{suffix}.png"
    probe_name = f"ablation-probe{suffix}.png"
    probe = probe_chart(results)
    svg = b"" if probe is None else as_svg(probe)
    report = Report(title, results, rows, teacher, scope, commands, picture_name, probe_name, svg)
    if probe is not None:
        write_atomically(folder / probe_name, as_png(probe))
    picture = as_png(errors_by_method(rows, results, teacher))
    write_atomically(folder / f"ablation{suffix}.md", markdown_page(report).encode())
    write_atomically(folder / f"ablation{suffix}.csv", csv_table(results).encode())
    write_atomically(folder / picture_name, picture)
    write_atomically(folder / f"report{suffix}.html", html_page(report).encode())
    left_out = [f"left out: {problem}" for problem in found.left_out.values()]
    return WrittenReport(terminal_table(rows, teacher), left_out, suffix)


def _teacher_errors(results: Sequence[Result], cache: Path | None) -> Mapping[str, float]:
    """Return the teacher's measurements; with several caches, only those that are equal in all."""
    caches: dict[str, Mapping[str, float]] = {}
    for result in results:
        if not caches.get(result.cache_sha256):
            caches[result.cache_sha256] = result.teacher
    first, *others = caches.values()
    if not first and not others and cache is not None:
        from teach_once.store.read.source import open_source

        return open_source(cache).manifest.measured
    return {
        name: value
        for name, value in first.items()
        if all(other.get(name) == value for other in others)
    }


def _scope(names: Sequence[str], methods: Sequence[str], asked: str, found: Found) -> str:
    """Describe the runs of the report in a sentence or two."""
    left_out = found.left_out
    damaged = (
        f" Left out because their files are damaged: {', '.join(left_out)}." if left_out else ""
    )
    if names and not asked:
        return f"The runs {', '.join(name for name in names if name not in left_out)}.{damaged}"
    more = f"; requested now: {asked}" if asked else ""
    of = f" of the method {' or '.join(methods)}" if methods else ""
    if has_variants(found.results):
        return f"All finished runs{of} of this folder, with different settings{more}.{damaged}"
    return f"All finished runs{of} with these settings{more}.{damaged}"
