"""The runs behind the results page: which caches are made, which groups of runs are trained.

`study.yaml` lists them. Hours on a small machine. The same command resumes; a group is kept as soon
as all its runs are finished. Every step is a command of the project, which is printed and kept with
the results.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from benchmarks.results.kept import KEPT, ResultsError, keep, load_kept
from teach_once.__main__ import main as teach_once
from teach_once.configs.load import load_student

STUDY = Path(__file__).with_name("study.yaml")
_CHECKED = ConfigDict(extra="forbid")


@checked_dataclass(frozen=True, config=_CHECKED)
class CacheSpec:
    """path: a pattern of the one cache that `command` makes, resumes, or finds complete.

    $teacher, $device and, in `command`, $NAME of another cache stand for their values.
    """

    path: str
    command: str


@checked_dataclass(frozen=True, config=_CHECKED)
class Group:
    """Runs of methods with each seed, kept in one folder under one label.

    methods: () for all methods of the student. cache: the cache they read; if None, `options` run
    the teacher in the loop. weights: method -> weights of its second term, each a group of its own;
    "best": the weight of each method with the lowest validation error. suffix: of the kept file.
    stored_in: a smaller cache that has all that the runs read; its bytes are kept.
    """

    folder: str
    methods: tuple[str, ...] = ()
    cache: str | None = None
    label: str = "{method}"
    options: str = ""
    weights: dict[str, tuple[float, ...]] | Literal["best"] | None = None
    seeds: tuple[int, ...] | None = None
    suffix: str = ""
    stored_in: str | None = None


@checked_dataclass(frozen=True, config=_CHECKED)
class StudySpec:
    student: str
    seeds: tuple[int, ...]
    caches: dict[str, CacheSpec]
    parts: dict[str, tuple[Group, ...]]


def load_study(file: Path) -> StudySpec:
    """Raises ResultsError if the file is not a valid study."""
    try:
        return TypeAdapter(StudySpec).validate_python(yaml.safe_load(file.read_text()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ResultsError(f"{file} is not a valid study: {error}") from None


@dataclass(frozen=True)
class LongStudy:
    """jobs: runs trained in parallel. device: as in the commands' option."""

    study: StudySpec
    jobs: int
    device: str
    _caches: dict[str, Path] = field(default_factory=dict)

    def train(self, part: str) -> None:
        """Train the runs of each group of a part and keep them."""
        for group in self.study.parts[part]:
            for each in self._with_weights(group):
                self._train(each)

    def make_cache(self, name: str) -> Path:
        """Run the command of a cache, after the commands of the caches that it names."""
        spec = self.study.caches[name]
        if name not in self._caches:
            teacher = load_student(self.study.student).teacher
            values = {"teacher": teacher, "device": self.device}
            for other in Template(spec.command).get_identifiers():
                if other not in values:
                    values[other] = str(self.make_cache(other))
            run([Template(word).substitute(values) for word in shlex.split(spec.command)])
            self._caches[name] = only_path(Template(spec.path).substitute(values))
        return self._caches[name]

    def _with_weights(self, group: Group) -> Iterator[Group]:
        """The groups of a group with weights, one for each method and weight."""
        weights = best_weights(self.study.student) if group.weights == "best" else group.weights
        if weights is None:
            yield group
            return
        for method, tried in weights.items():
            for weight in tried:
                yield replace(
                    group,
                    folder=f"{group.folder}/{method}-{weight:g}",
                    methods=(method,),
                    label=f"{method}, weight {weight:g}",
                    options=f"methods.{method}.1.weight={weight:g} {group.options}",
                )

    def _commands(self, group: Group) -> Iterator[list[str]]:
        student, seeds = self.study.student, group.seeds or self.study.seeds
        words = ["--runs", group.folder, "--device", self.device, *shlex.split(group.options)]
        if group.cache is not None:
            runs = ["--methods", " ".join(group.methods)] if group.methods else []
            runs += ["--seeds", " ".join(map(str, seeds)), "--jobs", str(self.jobs)]
            runs += ["--cache", str(self.make_cache(group.cache))]
            yield ["train", "ablation", student, *runs, *words]
            return
        for method in group.methods:
            for seed in map(str, seeds):
                yield ["train", "student", student, "--method", method, "--seed", seed, *words]

    def _train(self, group: Group) -> None:
        commands = list(self._commands(group))
        for words in commands:
            run(words)
        student, stored = self.study.student, group.stored_in or group.cache
        runs, text = Path(group.folder, student), map(shlex.join, commands)
        names = sorted(run.name for each in group.methods for run in runs.glob(f"{each}-seed*"))
        file = keep(
            f"{student}{group.suffix}",
            runs,
            names,
            "; ".join(f"python -m {words}" for words in text),
            jobs=self.jobs if group.cache else 1,
            label=group.label,
            cache=self.make_cache(stored) if stored else None,
        )
        print(f"{file}: {group.label}", flush=True)


def run(words: Sequence[str]) -> None:
    """Run a program of the project in this process; end with its status if it fails."""
    print(f"$ {shlex.join(['python', '-m', *words])}", flush=True)
    if status := teach_once(words):
        sys.exit(status)


def only_path(pattern: str) -> Path:
    found = sorted(Path().glob(pattern))
    if len(found) != 1:
        raise ResultsError(f"{pattern}: {len(found)} caches; expected one")
    return found[0]


def best_weights(student: str, folder: Path = KEPT) -> dict[str, tuple[float, ...]]:
    """Find the weight of each method with the lowest validation error, among those tried."""
    best: dict[str, tuple[float, float]] = {}  # method -> error, weight
    for each in load_kept(folder / f"{student}-weights.json"):
        method, _, weight = each.label.partition(", weight ")
        error = each.first.last_validation
        if error is None:
            raise ResultsError(f"{each.label}: no samples were held out")
        best[method] = min(best.get(method, (math.inf, 0.0)), (error, float(weight)))
    return {method: (weight,) for method, (_, weight) in best.items()}
