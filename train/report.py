"""The report of an ablation: the table, the runs as CSV, a picture, and a page with all of it."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.files import write_atomically
from train.run_files import METRICS_FILE
from train.runs import FoundRun, finished_of
from train.study import Study

_COLUMNS = {
    "last_top1": "top-1 error, last (%)",
    "last_top5": "top-5 error, last (%)",
    "best_top1": "top-1 error, best (%)",
    "best_top5": "top-5 error, best (%)",
    "seconds": "seconds per run",
}

Summary = dict[str, Any]
Curve = list[dict[str, Any]]  # one metrics line per epoch


@dataclass(frozen=True)
class Commands:
    """The commands that made the figures; METHOD and SEED stand in that of a single run."""

    ablation: str
    run: str
    cache: str


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; of a single value there is none."""

    mean: float
    std: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


@dataclass(frozen=True)
class Difference:
    """Of a method's last top-1 error to another's, over the seeds that both have.

    p: two-sided, of a paired t-test; None with fewer than two seeds or without any spread.
    """

    mean: float
    p: float | None

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if self.p is None else f" (p = {self.p:.2g})")


@dataclass(frozen=True)
class Row:
    """One method over all its seeds."""

    method: str
    num_seeds: int
    cells: dict[str, Spread]
    model: str = ""
    to_alone: Difference | None = None
    to_kd: Difference | None = None


def rows_of(summaries: Iterable[Summary]) -> list[Row]:
    """Group summaries by method, in the order in which the methods first come."""
    grouped: dict[str, list[Summary]] = {}
    for summary in summaries:
        grouped.setdefault(summary["method"], []).append(summary)
    return [
        Row(
            method,
            len(found),
            _cells(found),
            str(found[0].get("model", "")),
            _difference(found, grouped.get("ce", [])) if method != "ce" else None,
            _difference(found, grouped.get("kd", [])) if method not in ("ce", "kd") else None,
        )
        for method, found in grouped.items()
    ]


def _cells(summaries: Sequence[Summary]) -> dict[str, Spread]:
    """By the names of `_COLUMNS`; without top-5 errors where they say nothing."""
    values = {
        f"{when}_{top}": [s[when][f"{top}_error"] for s in summaries]
        for when in ("last", "best")
        for top in _tops(summaries)
    }
    values["seconds"] = [s["seconds"] for s in summaries]
    return {name: _spread(numbers) for name, numbers in values.items()}


def _tops(summaries: Iterable[Summary]) -> tuple[str, ...]:
    """With five classes or fewer every top-5 error is zero. Older summaries do not count them."""
    has_top5 = all(s.get("num_classes", 6) > 5 for s in summaries)
    return ("top1", "top5") if has_top5 else ("top1",)


def _spread(numbers: Sequence[float]) -> Spread:
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(statistics.fmean(numbers), std)


def _difference(ours: Sequence[Summary], theirs: Sequence[Summary]) -> Difference | None:
    errors = [{s["seed"]: s["last"]["top1_error"] for s in runs} for runs in (ours, theirs)]
    common = sorted(errors[0].keys() & errors[1].keys())
    if not common:
        return None
    gaps = [errors[0][seed] - errors[1][seed] for seed in common]
    return Difference(statistics.fmean(gaps), _paired_p(gaps))


def _paired_p(gaps: Sequence[float]) -> float | None:
    if len(gaps) < 2 or statistics.stdev(gaps) == 0:
        return None
    from scipy import stats

    t = statistics.fmean(gaps) / (statistics.stdev(gaps) / len(gaps) ** 0.5)
    return float(2 * stats.t.sf(abs(t), len(gaps) - 1))


def table_cells(rows: Sequence[Row], teacher: Mapping[str, float]) -> list[list[str]]:
    """Header, teacher and one line per method; mean ± sample standard deviation over seeds."""
    names = [name for name in _COLUMNS if all(name in row.cells for row in rows)]
    titles = [_COLUMNS[name] for name in names]
    lines = [["method", "model", "seeds", *titles, "Δ to ce", "Δ to kd"]]
    if "test_top1_error" in teacher:
        known = {f"last_{top}": f"{teacher[f'test_{top}_error']:.2f}" for top in ("top1", "top5")}
        lines.append(["teacher", "", "", *(known.get(name, "") for name in names), "", ""])
    for row in rows:
        cells = [str(row.cells[name]) for name in names]
        differences = [str(each) if each else "" for each in (row.to_alone, row.to_kd)]
        lines.append([row.method, row.model, str(row.num_seeds), *cells, *differences])
    return lines


def markdown_table(rows: Sequence[Row], teacher: Mapping[str, float]) -> str:
    header, *body = table_cells(rows, teacher)
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def csv_table(summaries: Sequence[Summary]) -> str:
    """One line per run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    errors_of = [(when, top) for when in ("last", "best") for top in _tops(summaries)]
    names = [f"{when}_{top}" for when, top in errors_of]
    writer.writerow(["method", "model", "seed", *names, "best_epoch", "seconds", "cache"])
    for s in summaries:
        errors = [s[when][f"{top}_error"] for when, top in errors_of]
        of_run = [s["method"], s.get("model", ""), s["seed"]]
        writer.writerow([*of_run, *errors, s["best"]["epoch"], s["seconds"], s["cache"]])
    return text.getvalue()


def read_curves(runs: Sequence[FoundRun]) -> dict[tuple[str, int], Curve]:
    """The metrics of every run, by method and seed."""
    texts = {(run.label, run.seed): (run.folder / METRICS_FILE).read_text() for run in runs}
    return {key: [json.loads(line) for line in text.splitlines()] for key, text in texts.items()}


def write_report(study: Study, commands: Commands, asked: str) -> str:
    """Write report.html, ablation.md, .csv and .png into the study's folder; returns the table.

    They hold all finished runs of the study, of which there must be one; asked: which of its
    methods and seeds were asked for now, in words.
    """
    from train.page import page

    folder, title = study.folder, f"Ablation of {study.config.name}"
    runs = finished_of(study)
    summaries = [dict(run.summary) for run in runs if run.summary is not None]
    # A run that was trained before the teacher's pass had ended knows nothing of its errors.
    summaries = [{**s, "teacher": s["teacher"] or study.cache.measured} for s in summaries]
    rows, teacher = rows_of(summaries), summaries[0]["teacher"]
    curves = read_curves(runs)
    text = _markdown_report(title, rows, summaries, commands, asked)
    write_atomically(folder / "ablation.md", text.encode())
    write_atomically(folder / "ablation.csv", csv_table(summaries).encode())
    write_atomically(folder / "ablation.png", picture(rows, teacher, title, summaries))
    views = study.cache.num_views
    write_atomically(
        folder / "report.html",
        page(title, rows, summaries, curves, commands, views, asked).encode(),
    )
    return markdown_table(rows, teacher)


def _markdown_report(
    title: str,
    rows: Sequence[Row],
    summaries: Sequence[Summary],
    commands: Commands,
    asked: str,
) -> str:
    first = summaries[0]
    return (
        f"# {title}\n\n{markdown_table(rows, first['teacher'])}\n"
        f"![error per method](ablation.png)\n\n{legend(first)} {scope(asked)}\n\n"
        f"Command: `{commands.ablation}`\\\nCache: `{first['cache']}` (identity "
        f"{first['cache_sha256']})\\\nDevice: {first['device']}, torch "
        f"{first['versions']['torch']}\n"
    )


def scope(asked: str) -> str:
    """Which runs the report holds."""
    return f"All finished runs with these settings; asked for now: {asked}."


def legend(summary: Summary) -> str:
    """What the columns mean."""
    return (
        f"Mean ± sample standard deviation over seeds. Last: after the last epoch; best: the epoch "
        f"with the lowest top-1 error on the {summary['best']['chosen_on']} set. Δ: of the last "
        f"top-1 error, over the seeds that both have; p of a paired t-test, not corrected for the "
        f"number of rows."
    )


def picture(
    rows: Sequence[Row],
    teacher: Mapping[str, float],
    title: str,
    summaries: Sequence[Summary],
) -> bytes:
    """PNG bytes: per method the runs as dots, mean and deviation as a bar, two reference lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 1.0 * len(rows), 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    names = [row.method for row in rows]
    means = [row.cells["last_top1"].mean for row in rows]
    stds = [row.cells["last_top1"].std or 0.0 for row in rows]
    rotation = 30 if len(rows) > 7 else 0
    axes.set_xticks(
        range(len(names)), names, rotation=rotation, ha="right" if rotation else "center"
    )
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
    if "test_top1_error" in teacher:
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
