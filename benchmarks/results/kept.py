"""The results of a study's finished runs, in docs/results/NAME.json.

A study is trained in parts: all its methods by one command, one of them again with fewer views by
another. Each part is kept with its command and labels its runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from benchmarks.harness import machine
from teach_once.report.runs import Result, results_in
from teach_once.report.table import Spread
from teach_once.runtime.errors import UserError
from teach_once.runtime.metrics import TOP1_ERROR
from teach_once.runtime.safe.files import write_atomically
from teach_once.store import TeacherCache

KEPT = Path("docs/results")
_METHOD = "{method}"


class ResultsError(UserError, ValueError):
    """A page names results that are not kept, or a kept file is not valid."""


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Part:
    """The runs of one command.

    machine: the machine that trained them. jobs: number of runs trained in parallel.
    label: a run's label, which may contain "{method}".
    record_bytes: bytes of the cache per sample and view; None if they were not recorded.
    """

    command: str
    machine: str
    jobs: int
    label: str
    record_bytes: int | None
    results: tuple[Result, ...]

    def replaces(self, older: Part) -> bool:
        methods = {result.method for result in self.results}
        return self.label == older.label and any(r.method in methods for r in older.results)


@dataclass(frozen=True)
class MethodRuns:
    """The runs of one method with all seeds; `Result.method` is the label."""

    label: str
    results: list[Result]
    record_bytes: int | None
    jobs: int

    @property
    def first(self) -> Result:
        return self.results[0]

    @property
    def error(self) -> Spread:
        return Spread.of([result.last[TOP1_ERROR.name] for result in self.results])

    @property
    def seconds(self) -> Spread:
        return Spread.of([result.seconds for result in self.results])

    @property
    def bytes_per_image(self) -> int | None:
        """The cache's bytes per image: 0 if no run reads it, None if it was not recorded."""
        if not self.first.reads_cache:
            return 0
        return None if self.record_bytes is None else self.record_bytes * self.first.num_views


_PARTS = TypeAdapter(tuple[Part, ...])


def load_kept(file: Path) -> tuple[MethodRuns, ...]:
    """Load all runs of a study, grouped by label. Raises ResultsError."""
    return _all_runs(_load_parts(file), file)


def _all_runs(parts: Iterable[Part], file: Path) -> tuple[MethodRuns, ...]:
    """Group runs by label, in the order of first appearance. Raises ResultsError."""
    found = dict[str, MethodRuns]()
    for part in parts:
        for result in part.results:
            label = part.label.replace(_METHOD, result.method)
            runs = found.setdefault(label, MethodRuns(label, [], part.record_bytes, part.jobs))
            if any(result.seed == each.seed for each in runs.results):
                raise ResultsError(f"{file} has two runs of {label} with seed {result.seed}")
            runs.results.append(replace(result, method=label))
    return tuple(found.values())


def _load_parts(file: Path) -> tuple[Part, ...]:
    try:
        return _PARTS.validate_json(file.read_bytes())
    except FileNotFoundError:
        raise ResultsError(f"file {file} not found") from None
    except ValidationError as error:
        raise ResultsError(f"{file}: {error.errors()[0]['msg']}") from None


def keep(
    name: str,
    runs: Path,
    names: Sequence[str],
    command: str,
    *,
    jobs: int = 1,
    label: str = _METHOD,
    cache: Path | None = None,
    folder: Path = KEPT,
) -> Path:
    """Put the results of a folder's runs into the study's file.

    They replace a part with the same label and one of their methods.

    names: as in `report.runs.results_in`. jobs, label: as in `Part`. cache: the cache that the
    runs read, for `record_bytes`. Raises CacheError, ReportError, ResultsError.
    """
    found = results_in(runs, names)
    if found.left_out:
        raise ResultsError("\n".join(found.left_out.values()))
    record_bytes = None if cache is None else TeacherCache.open(cache).manifest.record_bytes
    results = tuple(
        replace(result, curve=tuple(point for point in result.curve if point.test is not None))
        for result in found.results
    )
    file = folder / f"{name}.json"
    part = Part(command, machine(), jobs, label, record_bytes, results)
    older = _load_parts(file) if file.exists() else ()
    parts = [*(each for each in older if not part.replaces(each)), part]
    _all_runs(parts, file)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, ("[\n" + ",\n".join(map(_as_json, parts)) + "\n]\n").encode())
    return file


def _as_json(part: Part) -> str:
    """Format JSON with a line per run, so that diffs between versions are readable."""
    plain = TypeAdapter(Part).dump_python(part, mode="json")
    runs = ",\n".join(json.dumps(run) for run in plain.pop("results"))
    return f'{json.dumps(plain)[:-1]}, "results": [\n{runs}\n]}}'
