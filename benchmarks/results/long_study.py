"""Train every run that the results page shows of a student, and keep their results.

Hours on a small machine. The same command resumes; a part is kept as soon as all its runs are
finished.

- methods: every method of the student's file
- classifier: Early Decay Teacher with weight decay acting on the classifier that waits
- cached: fewer views, reduced records, and the teacher in the loop
- batch-norm: a teacher with recalibrated batch norm, and one with batch norm in training mode
- weights: other weights of four methods, a third of the epochs, on held-out samples
- chosen: the best of these on all samples, at full length
- cut-logits: a method that reads nothing but logits, from a cache that holds few of them
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results.kept import KEPT, ResultsError, keep, load_kept
from benchmarks.results.tables import by_label
from teach_once.configs.load import CONFIG_DIR, load_student
from teach_once.configs.schema import StudentConfig
from teach_once.configs.yaml_subset import parse_yaml
from teach_once.runtime.machine.resources import usable_cores
from teach_once.store import CacheError, TeacherCache

_POLL_SECONDS = 0.2
SEEDS = (0, 1, 2)
VIEWS = (1, 4, 16)
CUT_LOGITS = (1, 2, 4)
# Weights to try beside the published ones.
WEIGHTS: Mapping[str, Sequence[float]] = {
    "at": (3000, 300, 100),
    "rkd": (0.3, 0.1, 0.03),
    "dist": (4, 1, 0.5),
    "lskd": (3, 1, 0.3),
}
_UINT8 = {"logits": "uint8", "means": "uint8"}
_IDLE_CLASSIFIER = ("cd+gkd+edt", "cd+gkd+early")  # whose first epochs have no labels
_NO_MAPS = ("taps.energy=null", "taps.hint=null")


@dataclass(frozen=True)
class Group:
    """Runs of methods with each seed, kept in a folder of their own and under one label.

    cache: that they read; without one the option `live` says how the teacher runs in the loop.
    study: what is added to the name of the file that they are kept in.
    """

    folder: str
    methods: tuple[str, ...]
    cache: Path | None
    overrides: tuple[str, ...] = ()
    label: str = "{method}"
    seeds: tuple[int, ...] | None = None
    live: str = ""
    study: str = ""

    @property
    def runs(self) -> list[tuple[str, int]]:
        return [(method, seed) for method in self.methods for seed in self.seeds or SEEDS]


@dataclass(frozen=True)
class LongStudy:
    """jobs: runs side by side. device: as the programs take it."""

    student: str
    jobs: int
    device: str

    @property
    def config(self) -> StudentConfig:
        return load_student(self.student)

    @property
    def teacher(self) -> str:
        return self.config.teacher

    @property
    def written(self) -> Any:
        """The student's file as it stands there, without defaults."""
        return parse_yaml((CONFIG_DIR / "student" / f"{self.student}.yaml").read_text())

    def make_cache(self, caches: str, *overrides: str) -> Path:
        """The teacher's cache in a folder that holds no other; the pass is run, or resumed."""
        words = ["--caches", caches, "--device", self.device, *overrides]
        run_all([["train", "teacher", self.teacher, "--train-teacher", *words]], 1)
        run_all([["precompute", self.teacher, *words]], 1)
        return only_cache(caches, self.teacher)

    def small_cache(self) -> Path:
        """The full cache without energy maps and hint."""
        full = self.make_cache("caches")
        small = Path("caches-small", full.name)
        if not _is_small(small):  # a copy that was interrupted is resumed
            run_all([["store", "copy", str(full), "caches-small"]], 1)
            run_all([["store", "trim", str(small), "--drop-taps", "energy,hint"]], 1)
        return small

    def train(self, *groups: Group) -> None:
        """Train the runs of these groups, so many side by side, and keep them."""
        commands = {group: [self._command(group, run) for run in group.runs] for group in groups}
        run_all([each for of_one in commands.values() for each in of_one], self.jobs)
        for group, of_one in commands.items():
            self.keep(group.folder, of_one, group.label, group.cache, group.study)

    def _command(self, group: Group, run: tuple[str, int]) -> list[str]:
        method, seed = run
        words = ["train", "student", self.student, "--method", method, "--seed", str(seed)]
        words += ["--cache", str(group.cache)] if group.cache else [group.live]
        return [*words, "--runs", group.folder, "--device", self.device, *group.overrides]

    def keep(
        self,
        folder: str,
        commands: Sequence[Sequence[str]],
        label: str,
        cache: Path | None,
        study: str = "",
        names: Sequence[str] = (),
    ) -> None:
        """All runs of a folder, or these, into the file of the student, or another study of it."""
        text = "; ".join(shlex.join(["python", "-m", *words]) for words in commands)
        name, runs = f"{self.student}{study}", Path(folder, self.student)
        file = keep(name, runs, names, text, jobs=self.jobs, label=label, cache=cache)
        print(f"{file}: {label}", flush=True)


def _is_small(folder: Path) -> bool:
    """Whether a cache has been trimmed; one that is still being copied has no manifest to open."""
    try:
        taps = TeacherCache.open(folder).manifest.taps
    except CacheError:
        return False
    return not any(name.startswith(("energy", "hint")) for name in taps)


def methods(study: LongStudy) -> None:
    cache, words = study.make_cache("caches"), _ablation(study)
    run_all([words], 1)
    study.keep("runs", [words], "{method}", cache)


def _ablation(study: LongStudy) -> list[str]:
    words = ["train", "ablation", study.student, "--seeds", " ".join(map(str, SEEDS))]
    return [*words, "--jobs", str(study.jobs), "--device", study.device]


def classifier(study: LongStudy) -> None:
    study.train(
        Group(
            "runs/decayed-classifier",
            tuple(name for name in _IDLE_CLASSIFIER if name in study.config.methods),
            study.make_cache("caches"),
            ("training.freeze_idle_classifier=false",),
            "{method}, classifier decays",
        )
    )


def cached(study: LongStudy) -> None:
    small = study.small_cache()
    groups = [
        Group(
            f"runs/views-{views}",
            ("cd+gkd",),
            small,
            (f"num_views={views}", *_of_teacher(_NO_MAPS)),
            f"{{method}}, {views} view{'s' * (views > 1)}",
        )
        for views in VIEWS
    ]
    groups += [_reduced(small, form, "cd+gkd") for form in (_UINT8, _cut(1))]
    study.train(
        *groups, Group("runs/live", ("cd+gkd",), None, label="cd+gkd, live", live="--live-teacher")
    )
    _keep_with_all_views(study, small)


def _keep_with_all_views(study: LongStudy, small: Path) -> None:
    """The same runs as in `methods`, which read nothing that the small cache lacks."""
    names = sorted(each.name for each in Path("runs", study.student).glob("cd+gkd-seed*"))
    if not names:
        raise ResultsError(
            f"runs/{study.student} has no runs of cd+gkd",
            fix=f"python -m benchmarks.results train methods --student {study.student}",
        )
    label = f"{{method}}, {TeacherCache.open(small).manifest.num_views} views"
    study.keep("runs", [_ablation(study)], label, small, names=names)


def _reduced(small: Path, form: Mapping[str, str], method: str) -> Group:
    """Runs from a cache whose records are reduced, which is made.

    form: the options of `store convert`, which are also the types in the teacher's file.
    """
    name = _name_of(form)
    file_name = name.replace(", ", "-").replace(" ", "-")
    dest = small.parent / file_name
    options = [word for key, value in form.items() for word in (f"--{key}", value)]
    run_all([["store", "convert", str(small), str(dest), *options]], 1)
    overrides = _of_teacher([*_NO_MAPS, *_taps(form)])
    return Group(f"runs/{method}-{file_name}", (method,), dest, overrides, f"{method}, {name}")


def _cut(count: int) -> dict[str, str]:
    return {"logits": f"top:{count}", "means": "uint8"}


def _name_of(form: Mapping[str, str]) -> str:
    kind, _, count = form["logits"].partition(":")
    return f"{count} logit{'s' * (count != '1')}, {form['means']} means" if count else kind


def cut_logits(study: LongStudy) -> None:
    small = study.small_cache()
    study.train(*(_reduced(small, _cut(count), "kd") for count in CUT_LOGITS))


def batch_norm(study: LongStudy) -> None:
    changes = ("teacher.bn=recalibrated", *_NO_MAPS)
    study.make_cache("caches")
    cache = study.make_cache("caches-recalibrated", *changes)
    study.train(
        Group(
            "runs/recalibrated",
            ("kd", "cd", "cd+gkd+edt"),
            cache,
            _of_teacher(changes),
            label="{method}, recalibrated",
        ),
        Group("runs/live-bn", ("cd",), None, label="cd, live in training mode", live="--live-bn"),
    )


def weights(study: LongStudy) -> None:
    there_are = TeacherCache.open(study.make_cache("caches")).manifest.num_views
    count = min(study.config.training.epochs // 3, there_are)
    # The teacher keeps the weights that it has, though it was trained on what is held out here.
    held_out = ("dataset.validation_fraction=0.1", f"views.count={count}", "training=null")
    cache = study.make_cache("caches-validation", *held_out)
    study.train(
        *(
            Group(
                f"runs/weights/{method}-{weight:g}",
                (method,),
                cache,
                (f"methods.{method}.1.weight={weight:g}", *_a_third(study), *_of_teacher(held_out)),
                f"{method}, weight {weight:g}",
                SEEDS[:1],
                study="-weights",
            )
            for method, candidates in WEIGHTS.items()
            for weight in candidates
        )
    )


def chosen(study: LongStudy) -> None:
    cache = study.make_cache("caches")
    study.train(
        *(
            Group(
                f"runs/{method}-{weight:g}",
                (method,),
                cache,
                (f"methods.{method}.1.weight={weight:g}",),
                f"{method}, weight {weight:g}",
            )
            for method, weight in best_weights(study).items()
        )
    )


def best_weights(study: LongStudy, folder: Path = KEPT) -> dict[str, float]:
    """Of each method, the weight beside the published one with the lowest validation error."""
    errors: dict[str, dict[float, float]] = {}
    for each in by_label(load_kept(folder / f"{study.student}-weights.json")):
        method, _, weight = each.label.partition(", weight ")
        error = each.first.last_validation
        if error is None:
            raise ResultsError(f"{each.label}: no samples were held out")
        errors.setdefault(method, {})[float(weight)] = error
    return {
        method: min(tried, key=lambda weight: tried[weight]) for method, tried in errors.items()
    }


def _a_third(study: LongStudy) -> Iterator[str]:
    """Of the epochs, and of the schedule's milestones."""
    epochs = study.config.training.epochs // 3
    yield f"training.epochs={epochs}"
    yield f"training.evaluate_every={epochs}"
    if milestones := study.written["training"]["schedule"].get("milestones"):
        yield f"training.schedule.milestones={[max(each // 3, 1) for each in milestones]}"


def _of_teacher(overrides: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"teacher.{each}" for each in overrides)


def _taps(form: Mapping[str, str]) -> list[str]:
    """The types of `store convert` as a teacher's file says them."""
    return [
        f"taps.{key}={{top: {value.removeprefix('top:')}}}"
        if value.startswith("top:")
        else f"taps.{key}={value}"
        for key, value in form.items()
    ]


def only_cache(caches: str, teacher: str) -> Path:
    found = sorted(Path(caches).glob(f"{teacher}-*"))
    if len(found) != 1:
        raise ResultsError(f"{caches} holds {len(found)} caches of {teacher}; expected one")
    return found[0]


PARTS: Mapping[str, Callable[[LongStudy], None]] = {
    "methods": methods,
    "classifier": classifier,
    "cached": cached,
    "batch-norm": batch_norm,
    "weights": weights,
    "chosen": chosen,
    "cut-logits": cut_logits,
}


def run_all(commands: Sequence[Sequence[str]], jobs: int) -> None:
    """Run `python -m` each of these, so many side by side. Ends this process where one fails.

    They do not hear Ctrl-C, which this process passes on, once, and waits.
    """
    environment = dict(os.environ)
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(usable_cores() // jobs, 1))
    waiting, running = list(commands), list[subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                words = waiting.pop(0)
                print(f"$ {shlex.join(['python', '-m', *words])}", flush=True)
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", *words], env=environment, start_new_session=True
                    )
                )
            for process in [each for each in running if each.poll() is not None]:
                running.remove(process)
                if process.returncode:
                    sys.exit(process.returncode)
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
