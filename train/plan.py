"""What a student still needs, and what that costs, said before anything is done."""

from __future__ import annotations

import math
from pathlib import Path

from configs.schema import StudentConfig, TeacherConfig
from nets.weights_file import weights_file
from store.errors import CacheError
from train.study import Study, open_study
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
    return [*lines, f"student  to be trained: {passes}", _memory_line(study)]


def _memory_line(study: Study) -> str:
    """What the data take; the network's share is the batch's and cannot be told without it."""
    images = len(study.dataset.train) + len(study.dataset.test)
    of_images = images * math.prod(study.image_shape) / 1e6
    of_view = study.cache.nbytes / study.cache.num_views / 1e6
    outputs = f"two views of teacher outputs at most {2 * of_view:,.1f} MB"
    if study.window_rows is not None:
        share = study.window_rows / study.cache.num_samples
        outputs = f"two windows of teacher outputs at most {2 * share * of_view:,.1f} MB"
    return f"memory   images {of_images:,.1f} MB if resident, {outputs}; the network comes on top"


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
