"""The runs behind the results page: which caches are made, which groups of runs are trained.

Hours on a small machine. The same command resumes; a group is kept as soon as all its runs are
finished. Every step is a command of the project, which is printed and kept with the results.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.results.kept import KEPT, ResultsError, keep, load_kept
from teach_once.__main__ import main as teach_once
from teach_once.configs.load import load_student
from teach_once.configs.schema import MultiStep, StudentConfig
from teach_once.store import CacheError, TeacherCache

SEEDS = (0, 1, 2)
VIEWS = (1, 4, 16)
KEPT_LOGITS = (1, 2, 4)
# Weights to try next to the published ones.
WEIGHTS: Mapping[str, Sequence[float]] = {
    "at": (3000, 300, 100),
    "rkd": (0.3, 0.1, 0.03),
    "dist": (4, 1, 0.5),
    "lskd": (3, 1, 0.3),
}
_NO_MAPS = ("taps.attention=null", "taps.hint=null")
_RECALIBRATED = ("teacher.bn=recalibrated", *_NO_MAPS)


class Group(NamedTuple):
    """Runs of methods with each seed, kept in one folder under one label.

    methods: () for all methods of the student. cache: the cache they read; if None, `live` is the
    option that runs the teacher in the loop. of_teacher: overrides of the teacher's config. study:
    suffix of the file that the results are kept in.
    """

    folder: str
    methods: tuple[str, ...]
    cache: Path | None
    label: str = "{method}"
    overrides: tuple[str, ...] = ()
    of_teacher: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    live: str = ""
    study: str = ""

    def commands(self, student: str, jobs: int, device: str) -> Iterator[list[str]]:
        words = ["--runs", self.folder, "--device", device, *self.overrides]
        words += [f"teacher.{each}" for each in self.of_teacher]
        seeds = self.seeds or SEEDS
        if self.cache is None:
            for method in self.methods:
                for seed in map(str, seeds):
                    run = ["--method", method, "--seed", seed, self.live]
                    yield ["train", "student", student, *run, *words]
            return
        runs = ["--methods", " ".join(self.methods)] if self.methods else []
        runs += ["--seeds", " ".join(map(str, seeds)), "--jobs", str(jobs)]
        yield ["train", "ablation", student, *runs, "--cache", str(self.cache), *words]


@dataclass(frozen=True)
class LongStudy:
    """jobs: runs trained in parallel. device: as in the commands' option."""

    student: str
    jobs: int
    device: str

    @property
    def config(self) -> StudentConfig:
        return load_student(self.student)

    def make_cache(self, folder: str, *overrides: str) -> Path:
        """The teacher's cache, the only one in its folder; its pass is run or resumed."""
        teacher, words = self.config.teacher, ["--caches", folder, "--device", self.device]
        run(["cache-teacher", teacher, "--train-teacher", *words, *overrides])
        return only_cache(folder, teacher)

    def small_cache(self) -> Path:
        """The full cache without attention maps and hint."""
        full = self.make_cache("caches")
        small = Path("caches-small", full.name)
        if not _is_small(small):  # an interrupted copy is resumed
            run(["store", "copy", str(full), "caches-small"])
            run(["store", "trim", str(small), "--drop-taps", "attention,hint"])
        return small

    def train(self, groups: Sequence[Group]) -> None:
        """Train the runs of each group and keep them."""
        for group in groups:
            commands = list(group.commands(self.student, self.jobs, self.device))
            for words in commands:
                run(words)
            self.keep(group, commands)

    def keep(
        self, group: Group, commands: Sequence[Sequence[str]], names: Sequence[str] = ()
    ) -> None:
        """Keep all runs of a group's folder, or those named."""
        text = "; ".join(shlex.join(["python", "-m", *words]) for words in commands)
        jobs = self.jobs if group.cache else 1
        runs, file_name = Path(group.folder, self.student), f"{self.student}{group.study}"
        file = keep(file_name, runs, names, text, jobs=jobs, label=group.label, cache=group.cache)
        print(f"{file}: {group.label}", flush=True)


def run(words: Sequence[str]) -> None:
    """Run a program of the project in this process; end with its status if it fails."""
    print(f"$ {shlex.join(['python', '-m', *words])}", flush=True)
    if status := teach_once(words):
        sys.exit(status)


def _is_small(folder: Path) -> bool:
    """Return True if a cache has been trimmed; an incomplete copy has no manifest to open."""
    try:
        taps = TeacherCache.open(folder).manifest.taps
    except CacheError:
        return False
    return not any(name.startswith(("attention", "hint")) for name in taps)


def only_cache(folder: str, teacher: str) -> Path:
    found = sorted(Path(folder).glob(f"{teacher}-*"))
    if len(found) != 1:
        raise ResultsError(f"{folder} holds {len(found)} caches of {teacher}; expected one")
    return found[0]


def methods(study: LongStudy) -> list[Group]:
    """Every method of the student's file."""
    return [Group("runs", (), study.make_cache("caches"))]


def classifier(study: LongStudy) -> list[Group]:
    """Methods without labels in the first epochs, with weight decay on the idle classifier."""
    idle = tuple(name for name in ("cd+gkd+edt", "cd+gkd+early") if name in study.config.methods)
    cache, label = study.make_cache("caches"), "{method}, classifier decays"
    change = ("training.freeze_idle_classifier=false",)
    return [Group("runs/decayed-classifier", idle, cache, label, change)]


def cached(study: LongStudy) -> list[Group]:
    """Fewer views, reduced records, and the teacher in the loop."""
    small, method = study.small_cache(), ("cd+gkd",)
    _keep_with_all_views(study, small)
    groups = [_reduced(small, "cd+gkd", logits) for logits in ("uint8", "top:1")]
    for views in VIEWS:
        label, change = f"{{method}}, {views} view{'s' * (views > 1)}", (f"num_views={views}",)
        groups.append(Group(f"runs/views-{views}", method, small, label, change, _NO_MAPS))
    return [*groups, Group("runs/live", method, None, "cd+gkd, live", live="--live-teacher")]


def _keep_with_all_views(study: LongStudy, small: Path) -> None:
    """The runs of `methods`, which read nothing that the small cache lacks, under another label."""
    names = sorted(each.name for each in Path("runs", study.student).glob("cd+gkd-seed*"))
    if not names:
        raise ResultsError(
            f"runs/{study.student} has no runs of cd+gkd",
            fix=f"python -m benchmarks.results train methods --student {study.student}",
        )
    label = f"{{method}}, {TeacherCache.open(small).manifest.num_views} views"
    group = Group("runs", ("cd+gkd",), small, label)
    study.keep(group, list(group.commands(study.student, study.jobs, study.device)), names)


def _reduced(small: Path, method: str, logits: str) -> Group:
    """Runs from a converted cache, which is made. logits: "uint8" or "top:k"; means are uint8."""
    kind, _, count = logits.partition(":")
    name = f"{count} logit{'s' * (count != '1')}, uint8 means" if count else kind
    file_name = name.replace(", ", "-").replace(" ", "-")
    dest = small.parent / file_name
    run(["store", "convert", str(small), str(dest), "--logits", logits, "--channel-means", "uint8"])
    form = f"{{top_k: {count}}}" if count else logits
    taps = (*_NO_MAPS, f"taps.logits={form}", "taps.channel_means=uint8")
    folder = f"runs/{method}-{file_name}"
    return Group(folder, (method,), dest, f"{method}, {name}", of_teacher=taps)


def truncated_logits(study: LongStudy) -> list[Group]:
    """A method that reads nothing but logits, from caches that store few of them."""
    small = study.small_cache()
    return [_reduced(small, "kd", f"top:{count}") for count in KEPT_LOGITS]


def batch_norm(study: LongStudy) -> list[Group]:
    """A teacher with recalibrated batch norm, and one with batch norm in training mode."""
    study.make_cache("caches")
    cache = study.make_cache("caches-recalibrated", *_RECALIBRATED)
    recalibrated = Group("runs/recalibrated", ("kd", "cd", "cd+gkd+edt"), cache)
    live = Group("runs/live-bn", ("cd",), None, "cd, live in training mode", live="--live-bn")
    return [
        recalibrated._replace(label="{method}, recalibrated", of_teacher=_RECALIBRATED),
        live,
    ]


def weights(study: LongStudy) -> list[Group]:
    """Other weights of four methods, a third of the epochs, on held-out samples."""
    num_views = TeacherCache.open(study.make_cache("caches")).manifest.num_views
    training = study.config.training
    epochs = training.epochs // 3
    # The teacher keeps the weights that it has, though it was trained on what is held out here.
    count = f"views.count={min(epochs, num_views)}"
    held_out = ("dataset.validation_fraction=0.1", count, "training=null")
    shorter = [f"training.epochs={epochs}", f"training.eval_every={epochs}"]
    if isinstance(training.schedule, MultiStep):
        milestones = [max(each // 3, 1) for each in training.schedule.milestones]
        shorter.append(f"training.schedule.milestones={milestones}")
    cache = study.make_cache("caches-validation", *held_out)
    return [
        _weighted(method, weight, cache, "runs/weights", *shorter)._replace(
            of_teacher=held_out, seeds=SEEDS[:1], study="-weights"
        )
        for method, candidates in WEIGHTS.items()
        for weight in candidates
    ]


def chosen(study: LongStudy) -> list[Group]:
    """The best of these weights on all samples, at full length."""
    cache, best = study.make_cache("caches"), best_weights(study.student)
    return [_weighted(method, weight, cache) for method, weight in best.items()]


def _weighted(
    method: str, weight: float, cache: Path, folder: str = "runs", *changes: str
) -> Group:
    label, change = f"{method}, weight {weight:g}", f"methods.{method}.1.weight={weight:g}"
    return Group(f"{folder}/{method}-{weight:g}", (method,), cache, label, (change, *changes))


def best_weights(student: str, folder: Path = KEPT) -> dict[str, float]:
    """The weight of each method with the lowest validation error, among those tried."""
    errors: dict[str, dict[float, float]] = {}
    for each in load_kept(folder / f"{student}-weights.json"):
        method, _, weight = each.label.partition(", weight ")
        error = each.first.last_validation
        if error is None:
            raise ResultsError(f"{each.label}: no samples were held out")
        errors.setdefault(method, {})[float(weight)] = error
    return {method: min(tried, key=tried.__getitem__) for method, tried in errors.items()}


PARTS: Mapping[str, Callable[[LongStudy], list[Group]]] = {
    "methods": methods,
    "classifier": classifier,
    "cached": cached,
    "batch-norm": batch_norm,
    "weights": weights,
    "chosen": chosen,
    "cut-logits": truncated_logits,
}
