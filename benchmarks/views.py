"""python -m benchmarks.views STUDENT [--views "1 2 4 8 16 50"] [--seeds "0 1 2"] [key=value ...]

How many views per sample are enough? Trains one method with the first k views of one cache, for
each k and seed, and writes a table and a picture. With as many views as epochs every epoch shows a
fresh one, which is what a run with the teacher in the loop computes.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.harness import machine, markdown, write_json, write_section
from configs.load import load_student, load_teacher, split_overrides
from report.runs import Result, results_in
from report.table import Row, rows_of
from runtime.files import write_atomically
from train.student import train_student
from train.study import open_study


def run_all(
    name: str,
    overrides: Sequence[str],
    method: str,
    views: Sequence[int],
    seeds: Sequence[int],
    device: str,
) -> list[Result]:
    """All runs, with the number of views for a method; finished ones are not repeated."""
    own, teachers = split_overrides(overrides)
    console, results = Console(highlight=False, markup=False), []
    for num_views in views:
        config = load_student(name, [*own, f"num_views={num_views}"])
        teacher = load_teacher(config.teacher, teachers)
        study = open_study(config, teacher, caches_dir=Path("caches"), runs_dir=Path("runs"))
        for seed in seeds:
            run = study.run(method, seed)
            summary = train_student(run, device=device)
            (result,) = results_in(study.folder, [run.folder.name]).results
            results.append(dataclasses.replace(result, method=str(num_views)))
            error = summary["last"]["top1_error"]
            console.print(
                f"{num_views} views, seed {seed}: {error:.2f} % ({summary['seconds']:.0f} s)"
            )
    return results


def picture(rows: Sequence[Row], title: str) -> bytes:
    """PNG bytes: error against the number of views."""
    figure = Figure(figsize=(6, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    cells = [row.cells["last_top1"] for row in rows]
    axes.errorbar(
        [int(row.method) for row in rows],
        [cell.mean for cell in cells],
        yerr=[cell.std or 0.0 for cell in cells],
        fmt="o-",
        capsize=4,
        color="#1b4f8f",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(row.method) for row in rows], [row.method for row in rows])
    axes.minorticks_off()
    axes.set_xlabel("views per sample in the cache")
    axes.set_ylabel("top-1 test error, last epoch (%)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--method", default="cd+gkd")
    parser.add_argument("--views", default="1 2 4 8 16")
    parser.add_argument("--seeds", default="0 1 2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--docs", type=Path, default=Path("docs/results.md"))
    options = parser.parse_intermixed_args(arguments)
    views, seeds = ([int(word) for word in text.split()] for text in (options.views, options.seeds))
    results = run_all(
        options.student, options.overrides, options.method, views, seeds, options.device
    )
    rows = rows_of(results)
    title = f"Number of views: {options.student}, {options.method}"
    table = markdown(
        ["views", "seeds", "top-1 error, last (%)", "top-1 error, best (%)"],
        [
            [
                row.method,
                str(row.num_seeds),
                str(row.cells["last_top1"]),
                str(row.cells["best_top1"]),
            ]
            for row in rows
        ],
    )
    image = options.docs.parent / f"views-{options.student}.png"
    write_atomically(image, picture(rows, title))
    command = shlex.join(["python", "-m", "benchmarks.views", *arguments])
    body = "\n\n".join(
        [
            f"```bash\n{command}\n```",
            table.strip(),
            f"![error against the number of views]({image.name})",
            f"{results[0].epochs} epochs; {machine()}, torch {results[0].versions['torch']}.",
        ]
    )
    print(body)
    write_section(options.docs, title, body)
    found = [dataclasses.asdict(result) for result in results]
    write_json(Path("runs/benchmarks") / f"views-{options.student}.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
