"""The report as text: ablation.md, and one self-contained HTML page that includes the charts.

The page needs no network, so it can be mailed, archived and printed. Its only script sorts tables;
the rest works without scripts. A Content-Security-Policy contains the hashes of this script and of
the style sheet, so a browser runs and loads nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from teach_once.report.differences import MEANING, difference_cells, interval_bars
from teach_once.report.escape import as_code, for_html, for_markdown
from teach_once.report.learning_curves import learning_curves
from teach_once.report.names import has_variants, mark_text
from teach_once.report.page_assets import SCRIPT, STYLE
from teach_once.report.probes import MEANING as PROBE_MEANING
from teach_once.report.probes import probe_cells
from teach_once.report.runs import Result
from teach_once.report.table import Cell, Row, in_markdown, markdown_table, table_cells
from teach_once.runtime.safe.text import visible
from teach_once.store.format.certificate import certificate_text


def cost_of_teacher(results: Sequence[Result], teacher: Mapping[str, float]) -> dict[str, str]:
    """Compare the images through the teacher with those of a teacher in the loop.

    teacher: measurements of the pass. With one cache, its `images_per_second` adds times in
    seconds.

    Returns a description → text for the pass, for a teacher in the loop, and for the payback.
    """
    caches: dict[str, Result] = {}
    for result in results:  # count the views of the run that read the most
        known = caches.setdefault(result.cache_sha256, result)
        caches[result.cache_sha256] = max(known, result, key=lambda each: each.num_views)
    distilled = [result for result in results if result.reads_cache]
    passed = sum(each.num_samples * each.num_views * each.num_teachers for each in caches.values())
    live = sum(each.num_samples * each.epochs * each.num_teachers for each in distilled)
    is_single = len(caches) == 1 and all(each.num_teachers == 1 for each in caches.values())
    rate = teacher.get("images_per_second") if is_single else None

    def images(count: int) -> str:
        return f"{count:,} images" + (f" ({count / rate:,.0f} s)" if rate else "")

    runs = f"{len(distilled)} distilled run{'' if len(distilled) == 1 else 's'}"
    paid = f"{passed / (live / len(distilled)):.1f} distilled runs" if live else "no distilled run"
    return {
        "the teacher's pass, once": images(passed),
        f"with the teacher in the loop, {runs}": images(live),
        "paid back after": paid,
    }


@dataclass(frozen=True)
class Report:
    """The content of a page. `results` is not empty.

    teacher: its errors, if known. scope: a sentence that describes the runs. commands: printed in
    the report; the first one made it. picture, probe_picture: file names of the charts. probe_svg:
    the second one, for the page itself.
    """

    title: str
    results: Sequence[Result]
    rows: Sequence[Row]
    teacher: Mapping[str, float]
    scope: str
    commands: Sequence[str] = ()
    picture: str = "ablation.png"
    probe_picture: str = "ablation-probe.png"
    probe_svg: bytes = b""


def markdown_page(report: Report) -> str:
    """Format the table, the legend of its columns, and the provenance of the runs."""
    first = report.results[0]
    version = first.versions.get("torch", "?")
    differences = difference_cells(report.rows)
    paired = f"{in_markdown(differences)}\n{MEANING}\n\n" if differences else ""
    command = f"Command: {as_code(report.commands[0])}\\\n" if report.commands else ""
    return (
        f"# {for_markdown(report.title)}\n\n{markdown_table(report.rows, report.teacher)}\n"
        f"![error per method]({report.picture})\n\n"
        f"{_legend(report)} {for_markdown(report.scope)}\n\n"
        f"{paired}{_probes(report)}{command}"
        f"{''.join(map(_cache_lines, _of_each_cache(report.results)))}"
        f"{_certificate_line(report)}"
        f"Device: {for_markdown(first.device)}, torch {for_markdown(version)}\n"
    )


def _probes(report: Report) -> str:
    """Format the probes in Markdown; nothing without probes."""
    if not (cells := probe_cells(report.results)):
        return ""
    picture = f"![accuracy of the probe per method]({report.probe_picture})"
    return f"{in_markdown(cells)}\n{PROBE_MEANING}\n\n{picture}\n\n"


def _probe_section(report: Report) -> list[str]:
    """Format the probes in HTML; nothing without probes."""
    if not (cells := probe_cells(report.results)):
        return []
    source = f"data:image/svg+xml;base64,{base64.b64encode(report.probe_svg).decode()}"
    return [
        "<h2>Probe</h2>",
        f'<div class="scroll">{_sortable(cells[0], list(map(_row, cells[1:])))}</div>',
        f'<p class="quiet">{for_html(PROBE_MEANING)}</p>',
        f'<img src="{source}" alt="accuracy of the probe per method" width="480">',
    ]


def _of_each_cache(results: Sequence[Result]) -> list[Result]:
    """Return the first run of each cache."""
    return list({result.cache_sha256: result for result in reversed(results)}.values())[::-1]


def _cache_lines(result: Result) -> str:
    teachers = "".join(f"Teacher: {for_markdown(each)}\\\n" for each in result.teachers)
    sha256 = for_markdown(result.cache_sha256)
    return f"{teachers}Cache: {as_code(result.cache)} (identity {sha256})\\\n"


def _certificate_line(report: Report) -> str:
    text = certificate_text(report.teacher)
    return f"Certificate: {for_markdown(text)}\\\n" if text else ""


def html_page(report: Report) -> str:
    """Format the table, the learning curves, the teacher's cost, and the provenance of the runs."""
    title = for_html(report.title)
    body = [
        f"<h1>{title}</h1>",
        f'<p class="quiet">{_subtitle(report)}</p>',
        f'<div class="scroll">{_table(report.rows, report.teacher)}</div>',
        f'<p class="quiet">{_legend(report)} {for_html(report.scope)}</p>',
        *learning_curves(report.results),
        *_differences(report.rows),
        *_probe_section(report),
        "<h2>Cost of the teacher</h2>",
        _definitions(cost_of_teacher(report.results, report.teacher)),
        "<h2>Provenance</h2>",
        _definitions(_origin(report)),
        *_commands(report.commands),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'
        f"{mark_text(report.results)}"
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{chr(10).join(body)}\n"
        f"<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _policy() -> str:
    """Allow only the page's own style sheet and script, and images inside the page."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data:; style-src {source(STYLE)}; "
        f"script-src {source(SCRIPT)}; base-uri 'none'; form-action 'none'"
    )


def _legend(report: Report) -> str:
    title, result = report.rows[0].metric.title, report.results[0]
    return (
        f"Mean ± sample standard deviation over seeds. Last: after the last epoch; best: the epoch "
        f"with the lowest {title} on the {result.chosen_on} set. Δ: difference of the last {title} "
        f"over the common seeds; p: paired t-test, not corrected for the number of rows."
    )


def _subtitle(report: Report) -> str:
    first = report.results[0]
    epochs = " or ".join(map(str, sorted({result.epochs for result in report.results})))
    kinds = "rows of methods and settings" if has_variants(report.results) else "methods"
    return (
        f"{for_html(first.model)}, {first.num_samples:,} training images, {epochs} "
        f"epochs; {len(report.rows)} {kinds}, {len(report.results)} runs"
    )


def _origin(report: Report) -> dict[str, str]:
    first, agreement = report.results[0], report.teacher.get("train_agreement")
    certificate = certificate_text(report.teacher)
    caches = _of_each_cache(report.results)
    teachers = dict.fromkeys(each for result in caches for each in result.teachers)
    return {
        **({"teacher": "; ".join(teachers)} if teachers else {}),
        "cache": ", ".join(result.cache for result in caches),
        "identity (sha256)": ", ".join(result.cache_sha256 for result in caches),
        "teacher agrees with the label on the cached views": (
            "not measured" if agreement is None else f"{agreement:.2%}"
        ),
        **({"certificate": certificate} if certificate else {}),
        "device": first.device,
        "versions": ", ".join(f"{name} {number}" for name, number in first.versions.items()),
    }


def _table(rows: Sequence[Row], teacher: Mapping[str, float]) -> str:
    header, *body = table_cells(rows, teacher)
    means = {row.method: round(row.last.mean, 2) for row in rows}
    lowest = {method for method, mean in means.items() if mean == min(means.values())}
    kinds = ["lowest" if cells[0].text in lowest else "" for cells in body]
    return _sortable(header, [_row(cells, kind) for cells, kind in zip(body, kinds, strict=True)])


def _differences(rows: Sequence[Row]) -> list[str]:
    """Format the section of paired differences; nothing if no two methods share two seeds."""
    if not (lines := difference_cells(rows)):
        return []
    bars = zip(lines[1:], interval_bars(rows), strict=True)
    table = _sortable(lines[0], [_row(cells, after=(4, bar)) for cells, bar in bars])
    return [
        "<h2>Paired differences</h2>",
        f'<div class="scroll">{table}</div>',
        f'<p class="quiet">{MEANING}</p>',
    ]


def _sortable(header: Sequence[Cell], body: Sequence[str]) -> str:
    titles = "".join(f'<th scope="col">{for_html(cell)}</th>' for cell in header)
    return (
        f'<table class="sortable"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _row(cells: Sequence[Cell], kind: str = "", after: tuple[int, str] = (-1, "")) -> str:
    """Format a row of a table. after: the index of a cell, and markup that follows its text."""
    shown = []
    for index, cell in enumerate(cells):
        value = "" if cell.value is None else f' data-value="{cell.value!r}"'
        more = after[1] if index == after[0] else ""
        shown.append(f"<td{value}>{for_html(cell)}{more}</td>")
    return f'<tr class="{kind}">{"".join(shown)}</tr>' if kind else f"<tr>{''.join(shown)}</tr>"


def _commands(commands: Sequence[str]) -> list[str]:
    shown = [f"<pre>{html.escape(visible(command))}</pre>" for command in commands]
    return ["<h2>Commands</h2>", *shown] if shown else []


def _definitions(pairs: Mapping[str, str]) -> str:
    entries = (f"<dt>{for_html(k)}</dt><dd>{for_html(v)}</dd>" for k, v in pairs.items())
    return f"<dl>{''.join(entries)}</dl>"
