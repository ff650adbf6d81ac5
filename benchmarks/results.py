"""python -m benchmarks.results keep NAME RUNS_FOLDER [RUN ...] --command "make ablation ..."
python -m benchmarks.results write

docs/results.md rests on docs/results/NAME.json: what the finished runs of one study say of
themselves, and the command that trained them. `keep` writes such a file from a folder of runs;
`write` computes every table of the page from these files again, between the marks

    <!-- table: NAME errors -->  ...  <!-- end -->

Tables: `errors` (a row per method), `differences` (paired by seed, with intervals), `curves` (the
error of each tested epoch), `cost` (seconds and images). After the name of the table the methods to
be shown may follow, in this order: <!-- table: NAME errors: ce kd cd -->.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from benchmarks.harness import machine
from report.differences import difference_cells
from report.runs import Result, results_in
from report.table import Cell, Spread, in_markdown, rows_of, table_cells
from runtime.errors import UserError
from runtime.files import write_atomically

PAGE = Path("docs/results.md")
KEPT = Path("docs/results")
_MARK = re.compile(
    r"<!-- table: (?P<name>[\w.+-]+) (?P<table>\w+)(?:: (?P<methods>[^>]*?))? -->\n.*?<!-- end -->",
    re.DOTALL,
)


class ResultsError(UserError, ValueError):
    """A page that names what is not kept, or a kept file that says something else."""


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Kept:
    """A study. machine: that trained it."""

    command: str
    machine: str
    results: tuple[Result, ...]


_KEPT = TypeAdapter(Kept)


def load_kept(file: Path) -> Kept:
    """Raises ResultsError."""
    try:
        return _KEPT.validate_json(file.read_bytes())
    except FileNotFoundError:
        raise ResultsError(f"there is no {file}") from None
    except ValidationError as error:
        raise ResultsError(f"{file}: {error.errors()[0]['msg']}") from None


def keep(name: str, runs: Path, names: Sequence[str], command: str, folder: Path = KEPT) -> Path:
    """Write what the runs of a folder say, their curves where they were tested.

    names: as in `report.runs.results_in`. Raises ReportError, ResultsError.
    """
    found = results_in(runs, names)
    if found.left_out:
        raise ResultsError("\n".join(found.left_out.values()))
    file = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    tested = [
        dataclasses.replace(r, curve=tuple(p for p in r.curve if p.top1 is not None))
        for r in found.results
    ]
    kept = Kept(command, machine(), tuple(tested))
    plain = _KEPT.dump_python(kept, mode="json")
    runs_by_line = ",\n".join(json.dumps(run) for run in plain.pop("results"))
    head = json.dumps(plain)[:-1]
    write_atomically(file, f'{head}, "results": [\n{runs_by_line}\n]}}\n'.encode())
    return file


def page_with_tables(text: str, folder: Path = KEPT) -> str:
    """The page with every marked table computed from the kept files. Raises ResultsError."""

    def table(mark: re.Match[str]) -> str:
        opening = mark[0].partition("\n")[0]
        make = TABLES.get(mark["table"])
        if make is None:
            raise ResultsError(f"{opening}: unknown table; known: {', '.join(TABLES)}")
        results = load_kept(folder / f"{mark['name']}.json").results
        if mark["methods"]:
            results = _chosen(results, mark["methods"].split(), opening)
        return f"{opening}\n{in_markdown(make(results))}<!-- end -->"

    return _MARK.sub(table, text)


def _chosen(results: Sequence[Result], methods: Sequence[str], mark: str) -> tuple[Result, ...]:
    found = {result.method for result in results}
    if unknown := [method for method in methods if method not in found]:
        raise ResultsError(f"{mark}: no run of {', '.join(unknown)} is kept")
    return tuple(r for method in methods for r in results if r.method == method)


def _errors(results: Sequence[Result]) -> list[list[Cell]]:
    return table_cells(rows_of(results), _teacher(results))


def _differences(results: Sequence[Result]) -> list[list[Cell]]:
    return difference_cells(rows_of(results))


def _curves(results: Sequence[Result]) -> list[list[Cell]]:
    """A row per method, a column per epoch in which all its runs were tested."""
    epochs = sorted({p.epoch for r in results for p in r.curve if p.top1 is not None})
    lines = [[Cell("method"), *(Cell(f"epoch {epoch}") for epoch in epochs)]]
    for row in rows_of(results):
        of_one = [result for result in results if result.method == row.method]
        lines.append([Cell(row.method), *(Cell.of(_at(of_one, epoch)) for epoch in epochs)])
    return lines


def _at(results: Sequence[Result], epoch: int) -> Spread | None:
    errors = [p.top1 for r in results for p in r.curve if p.epoch == epoch and p.top1 is not None]
    return Spread.of(errors) if len(errors) == len(results) else None


@dataclass(frozen=True)
class _Cost:
    """Of one run on average, and of the teacher's pass."""

    seconds: Spread
    student_images: int
    live_images: int
    passed_images: int

    @classmethod
    def of(cls, results: Sequence[Result]) -> _Cost:
        first = results[0]
        is_taught = first.reads_cache or first.method.endswith("-live")
        return cls(
            Spread.of([result.seconds for result in results]),
            first.num_samples * first.epochs,
            first.num_samples * first.epochs * first.num_teachers if is_taught else 0,
            first.num_samples * first.num_views * first.num_teachers if first.reads_cache else 0,
        )


def _cost(results: Sequence[Result]) -> list[list[Cell]]:
    """Images through networks say what a run costs on any machine."""
    titles = (
        "method",
        "seconds per run",
        "images through the student",
        "images through the teacher, live",
        "in one pass for all runs",
        "paid back after (runs)",
    )
    lines = [[Cell(title) for title in titles]]
    for row in rows_of(results):
        cost = _Cost.of([result for result in results if result.method == row.method])
        back = cost.passed_images / cost.live_images if cost.passed_images else None
        images = (cost.student_images, cost.live_images, cost.passed_images)
        shown = [Cell(f"{number:,}" if number else "") for number in images]
        paid = Cell("" if back is None else f"{back:.1f}")
        lines.append([Cell(row.method), Cell.of(cost.seconds), *shown, paid])
    return lines


def _teacher(results: Sequence[Result]) -> Mapping[str, float]:
    return next((result.teacher for result in results if result.teacher), {})


TABLES: Mapping[str, Callable[[Sequence[Result]], list[list[Cell]]]] = {
    "errors": _errors,
    "differences": _differences,
    "curves": _curves,
    "cost": _cost,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="do", required=True)
    keeping = commands.add_parser("keep", help="write docs/results/NAME.json from finished runs")
    keeping.add_argument("name")
    keeping.add_argument("folder", type=Path)
    keeping.add_argument("runs", nargs="*")
    keeping.add_argument("--command", required=True, help="that trained them")
    commands.add_parser("write", help="compute the tables of docs/results.md again")
    options = parser.parse_args(arguments)
    try:
        if options.do == "keep":
            print(keep(options.name, options.folder, options.runs, options.command))
        else:
            write_atomically(PAGE, page_with_tables(PAGE.read_text()).encode())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
