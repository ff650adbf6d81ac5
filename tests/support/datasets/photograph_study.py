"""A study on a folder of photographs of different sizes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from teach_once.configs.load import load_student, load_teacher
from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.precompute.run_pass import fill_cache
from teach_once.train.runs.study import Study, open_study
from tests.support.caches.teacher_cache import CPU, setup_of

PLAIN = {"type": "random-resized-crop", "size_px": 16}


def configs_of(
    root: Path, weights: Path, augment: dict, overrides: Sequence[str] = ()
) -> tuple[StudentConfig, TeacherConfig]:
    data = {
        "type": "imagefolder",
        "root": str(root),
        "normalization": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    }
    teacher = [
        f"dataset={json.dumps(data)}",
        f"views.augment={json.dumps(augment)}",
        "views.count=3",
        f"teacher.weights={weights}",
        "teacher.arch=resnet8",
        "taps.logits=float32",
        "taps.channel_means=float32",
    ]
    student = ["training.epochs=4", "training.batch_size=6", "training.schedule.milestones=[2]"]
    return (
        load_student("digits-resnet8", [*student, *overrides]),
        load_teacher("digits-resnet20", teacher),
    )


def study_of(
    student: StudentConfig, teacher: TeacherConfig, folder: Path, *, num_workers: int
) -> Study:
    options = PassOptions(CPU, batch_size=8, block_rows=8, num_workers=num_workers)
    fill_cache(setup_of(teacher, folder / "caches"), options, Console(file=io.StringIO()))
    return open_study(student, teacher, caches_dir=folder / "caches", runs_dir=folder / "runs")
