"""What the finished runs of a study say of themselves, in docs/results/NAME.json.

A study is trained in parts: all its methods by one command, one of them again with fewer views by
another. Each part is kept with its command, and names its runs by a label of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from benchmarks.harness import machine
from teach_once.report.runs import Result, results_in
from teach_once.runtime.errors import UserError
from teach_once.runtime.safe.files import write_atomically
from teach_once.store import TeacherCache

KEPT = Path("docs/results")
_METHOD = "{method}"
_LIVE = ("-live", "-live-bn")  # end a method's name where the teacher ran in the loop


class ResultsError(UserError, ValueError):
    """A page that names what is not kept, or a kept file that says something else."""


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Part:
    """The runs of one command. machine: that trained them.

    jobs: how many were trained side by side. label: of a run, which may contain "{method}".
    record_bytes: of the cache that they read, each sample and view; None where nobody asked for it.
    """

    command: str
    machine: str
    jobs: int
    label: str
    record_bytes: int | None
    results: tuple[Result, ...]

    @property
    def methods(self) -> set[str]:
        return {result.method for result in self.results}

    def replaces(self, older: Part) -> bool:
        return self.label == older.label and bool(self.methods & older.methods)

    def labeled(self) -> Iterator[LabeledResult]:
        for result in self.results:
            label = self.label.replace(_METHOD, result.method)
            is_live = not result.reads_cache and result.method.endswith(_LIVE)
            labeled = dataclasses.replace(result, method=label)
            yield LabeledResult(labeled, self.record_bytes, is_live, self.jobs)


@dataclasses.dataclass(frozen=True)
class LabeledResult:
    """A run under the label of its part, which stands where its method stood.

    is_live: whether a teacher ran in the loop. jobs: how many were trained side by side.
    """

    result: Result
    record_bytes: int | None
    is_live: bool
    jobs: int

    @property
    def machine_seconds(self) -> float:
        """Its share of the time for which the machine trained."""
        return self.result.seconds / self.jobs


_PARTS = TypeAdapter(tuple[Part, ...])


def load_kept(file: Path) -> tuple[LabeledResult, ...]:
    """All runs of a study. Raises ResultsError."""
    return _labeled(_load_parts(file), file)


def _labeled(parts: Iterable[Part], file: Path) -> tuple[LabeledResult, ...]:
    """Raises ResultsError where two runs have one name."""
    found = tuple(each for part in parts for each in part.labeled())
    seen: set[tuple[str, int]] = set()
    for each in found:
        key = each.result.method, each.result.seed
        if key in seen:
            raise ResultsError(f"{file} has two runs of {key[0]} with seed {key[1]}")
        seen.add(key)
    return found


def _load_parts(file: Path) -> tuple[Part, ...]:
    try:
        return _PARTS.validate_json(file.read_bytes())
    except FileNotFoundError:
        raise ResultsError(f"there is no {file}") from None
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
    """Put what the runs of a folder say into the study's file.

    They take the place of a part with the same label that has one of their methods.

    names: as in `report.runs.results_in`. jobs, label: as in `Part`. cache: that the runs read, for
    the bytes of a record. Raises CacheError, ReportError, ResultsError.
    """
    found = results_in(runs, names)
    if found.left_out:
        raise ResultsError("\n".join(found.left_out.values()))
    record_bytes = None if cache is None else TeacherCache.open(cache).manifest.record_bytes
    results = tuple(_with_tested_epochs(result) for result in found.results)
    file = folder / f"{name}.json"
    part = Part(command, machine(), jobs, label, record_bytes, results)
    older = _load_parts(file) if file.exists() else ()
    parts = [*(each for each in older if not part.replaces(each)), part]
    _labeled(parts, file)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, _text(parts).encode())
    return file


def _with_tested_epochs(result: Result) -> Result:
    tested = tuple(point for point in result.curve if point.top1 is not None)
    return dataclasses.replace(result, curve=tested)


def _text(parts: Iterable[Part]) -> str:
    """JSON with a line per run, so that differences between versions can be read."""
    return "[\n" + ",\n".join(map(_text_of, parts)) + "\n]\n"


def _text_of(part: Part) -> str:
    plain = TypeAdapter(Part).dump_python(part, mode="json")
    runs = ",\n".join(json.dumps(run) for run in plain.pop("results"))
    return f'{json.dumps(plain)[:-1]}, "results": [\n{runs}\n]}}'
