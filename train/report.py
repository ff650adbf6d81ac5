"""The table and the picture of an ablation."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.files import write_atomically

_COLUMNS = {
    "last_top1": "top-1 error, last (%)",
    "last_top5": "top-5 error, last (%)",
    "best_top1": "top-1 error, best (%)",
    "best_top5": "top-5 error, best (%)",
    "seconds": "seconds per run",
}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; of a single value there is none."""

    mean: float
    std: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


@dataclass(frozen=True)
class Row:
    """One method over all its seeds."""

    method: str
    num_seeds: int
    cells: dict[str, Spread]


def rows_of(summaries: Iterable[dict[str, Any]]) -> list[Row]:
    """Group summaries by method, in the order in which the methods first come."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        grouped.setdefault(summary["method"], []).append(summary)
    return [Row(method, len(found), _cells(found)) for method, found in grouped.items()]


def _cells(summaries: Sequence[dict[str, Any]]) -> dict[str, Spread]:
    values = {
        "last_top1": [s["last"]["top1_error"] for s in summaries],
        "last_top5": [s["last"]["top5_error"] for s in summaries],
        "best_top1": [s["best"]["top1_error"] for s in summaries],
        "best_top5": [s["best"]["top5_error"] for s in summaries],
        "seconds": [s["seconds"] for s in summaries],
    }
    return {name: _spread(numbers) for name, numbers in values.items()}


def _spread(numbers: Sequence[float]) -> Spread:
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(statistics.fmean(numbers), std)


def markdown_table(rows: Sequence[Row], teacher: dict[str, float]) -> str:
    """One row per method, the teacher first; mean ± sample standard deviation over seeds."""
    header = ["method", "seeds", *_COLUMNS.values()]
    top1, top5 = f"{teacher['test_top1_error']:.2f}", f"{teacher['test_top5_error']:.2f}"
    lines = [header, ["---"] * len(header), ["teacher", "", top1, top5, "", "", ""]]
    lines += [
        [row.method, str(row.num_seeds), *(str(row.cells[name]) for name in _COLUMNS)]
        for row in rows
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def csv_table(summaries: Iterable[dict[str, Any]]) -> str:
    """One line per run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "method",
            "seed",
            "last_top1",
            "last_top5",
            "best_top1",
            "best_top5",
            "best_epoch",
            "seconds",
            "cache",
        ]
    )
    for s in summaries:
        writer.writerow(
            [
                s["method"],
                s["seed"],
                s["last"]["top1_error"],
                s["last"]["top5_error"],
                s["best"]["top1_error"],
                s["best"]["top5_error"],
                s["best"]["epoch"],
                s["seconds"],
                s["cache"],
            ]
        )
    return text.getvalue()


def write_report(
    folder: Path, title: str, command: str, summaries: Sequence[dict[str, Any]]
) -> str:
    """Write ablation.md, .csv and .png into `folder`; returns the table."""
    rows, teacher = rows_of(summaries), summaries[0]["teacher"]
    table = markdown_table(rows, teacher)
    first = summaries[0]
    text = (
        f"# {title}\n\n{table}\n![error per method](ablation.png)\n\n"
        f"Mean ± sample standard deviation over seeds. Last: after the last epoch; best: the epoch "
        f"with the lowest top-1 error on the {first['best']['chosen_on']} set.\n\n"
        f"Command: `{command}`\\\nCache: `{first['cache']}` (identity {first['cache_sha256']})\\\n"
        f"Device: {first['device']}, torch {first['versions']['torch']}\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "ablation.md", text.encode())
    write_atomically(folder / "ablation.csv", csv_table(summaries).encode())
    write_atomically(folder / "ablation.png", _picture(rows, teacher, title, summaries))
    return table


def _picture(
    rows: Sequence[Row], teacher: dict[str, float], title: str, summaries: Sequence[dict[str, Any]]
) -> bytes:
    """PNG bytes: per method the runs as dots, mean and deviation as a bar, two reference lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 1.2 * len(rows), 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    names = [row.method for row in rows]
    means = [row.cells["last_top1"].mean for row in rows]
    stds = [row.cells["last_top1"].std or 0.0 for row in rows]
    axes.set_xticks(range(len(names)), names)
    axes.errorbar(
        range(len(names)),
        means,
        yerr=stds,
        fmt="o",
        capsize=5,
        color="#1b4f8f",
        zorder=3,
        label="mean ± std",
    )
    beside = [names.index(s["method"]) + 0.1 for s in summaries]
    errors = [s["last"]["top1_error"] for s in summaries]
    axes.plot(beside, errors, "o", ms=4, color="#6f9fd8", zorder=2, label="runs")
    axes.axhline(teacher["test_top1_error"], color="#2a7f3f", linestyle="--", label="teacher")
    alone = next((row for row in rows if row.method == "ce"), None)
    if alone is not None:
        axes.axhline(
            alone.cells["last_top1"].mean,
            color="#b03a2e",
            linestyle=":",
            label="student alone (ce)",
        )
    axes.set_ylabel("top-1 test error, last epoch (%)")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.1)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, framealpha=0.9)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
