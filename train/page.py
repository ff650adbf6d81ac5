"""The report as one self-contained page: no script, no network, pictures inside.

Leaves out everything interactive, so that it can be mailed, archived and printed.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.report import Commands, Curve, Row, Summary, legend, scope, table_cells

_COLOURS = (
    *("#b03a2e", "#1b4f8f", "#2a7f3f", "#c77c11", "#6c3a9c", "#118a8a", "#7a5230", "#d14d8b"),
    *("#4d5a66", "#8a9a12", "#3a7bd5", "#a83232"),
)
_TICKS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
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


def page(
    title: str,
    rows: Sequence[Row],
    summaries: Sequence[Summary],
    curves: Mapping[tuple[str, int], Curve],
    commands: Commands,
    num_views: int,
    asked: str,
) -> str:
    """HTML."""
    first = summaries[0]
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="quiet">{_subtitle(first, rows)}</p>',
        f'<div class="scroll">{_table(rows, first["teacher"])}</div>',
        f'<p class="quiet">{html.escape(legend(first))} {html.escape(scope(asked))}</p>',
        "<h2>Learning curves</h2>",
        '<div class="pair">',
        _image("test error by epoch", _by_epoch(rows, curves)),
        _image("test error by wall time", _by_time(rows, curves)),
        "</div>",
        '<p class="quiet">Means over seeds; bands from the lowest to the highest seed.</p>',
        "<h2>What the teacher cost</h2>",
        _definitions(ledger(summaries, num_views)),
        "<h2>Where it comes from</h2>",
        _definitions(_origin(first)),
        "<h2>Commands</h2>",
        "".join(f"<pre>{html.escape(command)}</pre>" for command in vars(commands).values()),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def ledger(summaries: Sequence[Summary], num_views: int) -> dict[str, str]:
    """Images through the teacher: how many there were, and how many a live teacher would need."""
    taught = [s for s in summaries if s["is_taught"]]
    done = summaries[0]["num_samples"] * num_views
    live = sum(s["num_samples"] * s["epochs"] for s in taught)
    found = {
        "teacher passes run": f"1, over {num_views:,} views: {done:,} images",
        "teacher passes saved": (
            f"{len(taught):,} (one in each taught run): {live:,} images, {live - done:,} more than "
            f"were run"
        ),
    }
    rate = summaries[0]["teacher"].get("images_per_second")
    if rate:
        found["seconds saved"] = (
            f"{(live - done) / rate:,.0f} net, at the {rate:,.0f} images/s measured when the cache "
            f"was made, of {sum(s['seconds'] for s in summaries):,.0f} s of training"
        )
    if taught:
        found["paid back after"] = f"{done / (live / len(taught)):.1f} taught runs"
    return found


def _subtitle(summary: Summary, rows: Sequence[Row]) -> str:
    runs = sum(row.num_seeds for row in rows)
    return (
        f"{html.escape(summary['model'])}, {summary['num_samples']:,} training images, "
        f"{summary['epochs']} epochs; {len(rows)} methods, {runs} runs"
    )


def _origin(summary: Summary) -> dict[str, str]:
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    agreement = summary["teacher"].get("train_agreement")
    return {
        "cache": summary["cache"],
        "identity (sha256)": summary["cache_sha256"],
        "teacher right on the cached views": (
            "not measured" if agreement is None else f"{agreement:.2%}"
        ),
        "device": summary["device"],
        "versions": versions,
    }


def _table(rows: Sequence[Row], teacher: Mapping[str, float]) -> str:
    header, *body = table_cells(rows, teacher)
    means = {row.method: round(row.cells["last_top1"].mean, 2) for row in rows}
    lowest = {method for method, mean in means.items() if mean == min(means.values())}
    lines = [_row("th", header, "")]
    lines += [_row("td", cells, "lowest" if cells[0] in lowest else "") for cells in body]
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[str], kind: str) -> str:
    shown = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f'<tr class="{kind}">{shown}</tr>' if kind else f"<tr>{shown}</tr>"


def _definitions(pairs: Mapping[str, str]) -> str:
    entries = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in pairs.items())
    return f"<dl>{''.join(entries)}</dl>"


def _image(what: str, svg: bytes) -> str:
    data = base64.b64encode(svg).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/svg+xml;base64,{data}">'


def _by_epoch(rows: Sequence[Row], curves: Mapping[tuple[str, int], Curve]) -> bytes:
    return _chart(rows, curves, "epoch", lambda line, seconds: float(line["epoch"]))


def _by_time(rows: Sequence[Row], curves: Mapping[tuple[str, int], Curve]) -> bytes:
    return _chart(rows, curves, "seconds of training", lambda line, seconds: seconds)


def _chart(
    rows: Sequence[Row],
    curves: Mapping[tuple[str, int], Curve],
    label: str,
    place: Callable[[dict[str, Any], float], float],
) -> bytes:
    """SVG bytes: the top-1 error of every method, over its tested epochs."""
    figure = Figure(figsize=(6.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for row, colour in zip(rows, _repeated(_COLOURS, len(rows)), strict=True):
        of_seeds = [_points(curve, place) for (m, _), curve in curves.items() if m == row.method]
        _draw(axes, row.method, of_seeds, colour)
    axes.set_xlabel(label)
    if label == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("top-1 test error (%)")
    axes.set_yscale("symlog", linthresh=1.0)  # rows lie close together at the end, where it counts
    axes.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    errors = [line["top1_error"] for curve in curves.values() for line in curve]
    tested = [error for error in errors if error is not None]
    axes.set_ylim(min(tested) * 0.7 if min(tested) > 1 else 0, max(tested) * 1.15 + 0.1)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2, framealpha=0.9)
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()


def _repeated(colours: Sequence[str], count: int) -> list[str]:
    return [colours[number % len(colours)] for number in range(count)]


def _points(
    curve: Curve, place: Callable[[dict[str, Any], float], float]
) -> list[tuple[float, float]]:
    points, seconds = [], 0.0
    for line in curve:
        seconds += line["train_seconds"] + line["wait_seconds"]
        if line["top1_error"] is not None:
            points.append((place(line, seconds), line["top1_error"]))
    return points


def _draw(
    axes: Axes, method: str, of_seeds: Sequence[Sequence[tuple[float, float]]], colour: str
) -> None:
    by_epoch = list(zip(*of_seeds, strict=False))
    xs = [sum(x for x, _ in points) / len(points) for points in by_epoch]
    errors = [[error for _, error in points] for points in by_epoch]
    axes.plot(xs, [sum(e) / len(e) for e in errors], color=colour, lw=1.6, label=method)
    axes.fill_between(
        xs, [min(e) for e in errors], [max(e) for e in errors], color=colour, alpha=0.1, lw=0
    )
