"""The report as text: ablation.md, and one self-contained HTML page with the charts inside.

The page has no script and needs no network, so that it can be mailed, archived and printed.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from report.charts import errors_by_epoch, errors_by_time
from report.escape import as_code, for_html, for_markdown
from report.ledger import ledger
from report.runs import Result
from report.table import Row, markdown_table, table_cells
from runtime.text import visible
from store.certificate import certificate_text

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 24px 20px 60px; color: #1c232b;
       background: #fff; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 36px 0 8px; }
p { margin: 6px 0; }
.quiet { color: #5b6672; font-size: 0.9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.84rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 11px 6px 0; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #e3e7eb; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 5.5em; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th:nth-child(2), td:nth-child(2) { text-align: left; }
tr.lowest td { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 8px 0; }
dt { color: #5b6672; }
dd { margin: 0; overflow-wrap: anywhere; }
img { width: 100%; height: auto; display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 24px; }
pre { background: #f4f6f8; border-radius: 6px; padding: 10px 12px; font-size: 0.82rem;
      white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 520px) {
  body { padding: 16px 12px 40px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
}
"""


@dataclass(frozen=True)
class Report:
    """What a page shows. `results` holds at least one run.

    teacher: its errors, where they are known. scope: which runs these are, in a sentence.
    commands: to be printed; the first one made the report.
    """

    title: str
    results: Sequence[Result]
    rows: Sequence[Row]
    teacher: Mapping[str, float]
    scope: str
    commands: Sequence[str] = ()


def markdown_page(report: Report) -> str:
    """The table, what its columns mean, and where the runs come from."""
    first = report.results[0]
    version = first.versions.get("torch", "?")
    command = f"Command: {as_code(report.commands[0])}\\\n" if report.commands else ""
    return (
        f"# {for_markdown(report.title)}\n\n{markdown_table(report.rows, report.teacher)}\n"
        f"![error per method](ablation.png)\n\n{_legend(first)} {for_markdown(report.scope)}\n\n"
        f"{command}Cache: {as_code(first.cache)} (identity {for_markdown(first.cache_sha256)})\\\n"
        f"{_certificate_line(report)}"
        f"Device: {for_markdown(first.device)}, torch {for_markdown(version)}\n"
    )


def _certificate_line(report: Report) -> str:
    text = certificate_text(report.teacher)
    return f"Certificate: {for_markdown(text)}\\\n" if text else ""


def html_page(report: Report) -> str:
    """The table, the learning curves, what the teacher cost, and where the runs come from."""
    title = for_html(report.title)
    body = [
        f"<h1>{title}</h1>",
        f'<p class="quiet">{_subtitle(report)}</p>',
        f'<div class="scroll">{_table(report.rows, report.teacher)}</div>',
        f'<p class="quiet">{_legend(report.results[0])} {for_html(report.scope)}</p>',
        *_learning_curves(report.results),
        "<h2>What the teacher cost</h2>",
        _definitions(ledger(report.results, report.teacher)),
        "<h2>Where it comes from</h2>",
        _definitions(_origin(report)),
        *_commands(report.commands),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def _legend(result: Result) -> str:
    return (
        f"Mean ± sample standard deviation over seeds. Last: after the last epoch; best: the epoch "
        f"with the lowest top-1 error on the {result.chosen_on} set. Δ: difference of the last "
        f"top-1 errors, over the seeds that both have; p: paired t-test, not corrected for the "
        f"number of rows."
    )


def _subtitle(report: Report) -> str:
    first = report.results[0]
    return (
        f"{for_html(first.model)}, {first.num_samples:,} training images, {first.epochs} "
        f"epochs; {len(report.rows)} methods, {len(report.results)} runs"
    )


def _origin(report: Report) -> dict[str, str]:
    first, agreement = report.results[0], report.teacher.get("train_agreement")
    certificate = certificate_text(report.teacher)
    return {
        "cache": first.cache,
        "identity (sha256)": first.cache_sha256,
        "teacher right on the cached views": (
            "not measured" if agreement is None else f"{agreement:.2%}"
        ),
        **({"certificate": certificate} if certificate else {}),
        "device": first.device,
        "versions": ", ".join(f"{name} {number}" for name, number in first.versions.items()),
    }


def _table(rows: Sequence[Row], teacher: Mapping[str, float]) -> str:
    header, *body = table_cells(rows, teacher)
    means = {row.method: round(row.cells["last_top1"].mean, 2) for row in rows}
    lowest = {method for method, mean in means.items() if mean == min(means.values())}
    lines = [_row("th", header, "")]
    lines += [_row("td", cells, "lowest" if cells[0] in lowest else "") for cells in body]
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[str], kind: str) -> str:
    shown = "".join(f"<{tag}>{for_html(cell)}</{tag}>" for cell in cells)
    return f'<tr class="{kind}">{shown}</tr>' if kind else f"<tr>{shown}</tr>"


def _learning_curves(results: Sequence[Result]) -> list[str]:
    """Nothing where the runs' metrics are gone."""
    if not any(result.curve for result in results):
        return []
    return [
        "<h2>Learning curves</h2>",
        '<div class="pair">',
        _image("test error by epoch", errors_by_epoch(results)),
        _image("test error by wall time", errors_by_time(results)),
        "</div>",
        '<p class="quiet">Means over seeds; bands from the lowest to the highest seed.</p>',
    ]


def _commands(commands: Sequence[str]) -> list[str]:
    shown = [f"<pre>{html.escape(visible(command))}</pre>" for command in commands]
    return ["<h2>Commands</h2>", *shown] if shown else []


def _definitions(pairs: Mapping[str, str]) -> str:
    entries = (f"<dt>{for_html(k)}</dt><dd>{for_html(v)}</dd>" for k, v in pairs.items())
    return f"<dl>{''.join(entries)}</dl>"


def _image(what: str, svg: bytes) -> str:
    data = base64.b64encode(svg).decode()
    return f'<img alt="{for_html(what)}" src="data:image/svg+xml;base64,{data}">'
