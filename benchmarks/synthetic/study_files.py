"""A study as files in a folder, for programs that run in their own process.

Its configs are those of CIFAR-10 with overrides, its teacher has random weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.synthetic.studies import save_random_weights
from teach_once.configs.load import load_student, load_teacher, to_yaml
from teach_once.precompute.compute.setup import Setup, prepare
from teach_once.train.runs.study import Study, open_study

ARCH = "resnet8"
_SHIPPED = "cifar10-resnet20"
_MEAN_STD = {"mean": [0.5] * 3, "std": [0.25] * 3}


@dataclass(frozen=True)
class StudyFiles:
    """The paths of the files; the teacher's cache and the runs are in the same folder."""

    folder: Path

    @property
    def teacher(self) -> str:
        return str(self.folder / "bench-teacher.yaml")

    @property
    def student(self) -> str:
        return str(self.folder / "bench-student.yaml")

    @property
    def caches(self) -> Path:
        return self.folder / "caches"

    @property
    def make_variables(self) -> list[str]:
        return [f"STUDENT={self.student}", f"CACHES={self.caches}", f"RUNS={self.folder}/runs"]

    def setup(self, *overrides: str) -> Setup:
        return prepare(self.teacher, list(overrides), self.caches)

    def study(self) -> Study:
        student, teacher = load_student(self.student), load_teacher(self.teacher)
        runs = self.folder / "runs"
        return open_study(student, teacher, caches_dir=self.caches, runs_dir=runs)


def write_study(
    folder: Path,
    dataset: dict[str, object],
    teacher: Sequence[str],
    student: Sequence[str],
    classes: int = 10,
) -> StudyFiles:
    """Write the configs and the weights. teacher, student: overrides of the shipped configs."""
    files, weights = StudyFiles(folder), folder / "teacher.pt"
    save_random_weights(weights, ARCH, classes)
    shipped = load_student(_SHIPPED, student)
    own = [f"dataset={json.dumps(dataset | {'normalization': _MEAN_STD})}", "views.evaluation=null"]
    own.append(f"teacher={json.dumps({'arch': ARCH, 'weights': str(weights)})}")
    config = load_teacher(shipped.teacher, [*own, *teacher])
    Path(files.teacher).write_text(to_yaml(config))
    Path(files.student).write_text(to_yaml(replace(shipped, teacher=files.teacher)))
    return files
