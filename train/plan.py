"""What a student still needs, and what that costs, said before anything is done."""

from __future__ import annotations

from pathlib import Path

from configs.schema import StudentConfig, TeacherConfig
from nets.weights_file import weights_file
from store.errors import CacheError
from train.study import open_study
from views.datasets import load_dataset


def plan_lines(
    config: StudentConfig,
    teacher: TeacherConfig,
    method: str,
    seed: int,
    *,
    caches_dir: Path,
    runs_dir: Path,
) -> list[str]:
    """One line each for the teacher's weights, the cache and the run: there, or its cost."""
    dataset = load_dataset(teacher.dataset)
    samples = len(dataset.train)
    lines = [_weights_line(teacher)]
    passes = f"{samples:,} samples x {config.training.epochs} epochs through {config.student.arch}"
    try:
        study = open_study(config, teacher, caches_dir=caches_dir, runs_dir=runs_dir)
    except CacheError:
        views = teacher.views.num_views
        lines.append(
            f"cache    to be made: {samples:,} samples x {views} views = {samples * views:,} "
            f"images through {teacher.teacher.arch}"
        )
        return [*lines, f"student  to be trained: {passes}"]
    lines.append(f"cache    there: {study.cache.path}")
    if study.finished(method, seed) is not None:
        return [*lines, f"student  there: {study.run_folder(method, seed)}"]
    return [*lines, f"student  to be trained: {passes}"]


def _weights_line(teacher: TeacherConfig) -> str:
    weights = weights_file(teacher.teacher.weights)
    if weights.is_file():
        return f"teacher  there: {weights}"
    if teacher.training is None:
        return f"teacher  missing: {weights}, and the config has no training block to make it"
    limit = teacher.training.limit
    images = f"at most {limit:,} images per class" if limit else "all training images"
    return (
        f"teacher  to be trained: {images} x {teacher.training.epochs} epochs through "
        f"{teacher.teacher.arch}"
    )
