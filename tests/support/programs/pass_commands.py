"""Command lines of `python -m precompute` for the small digits teacher."""

from __future__ import annotations

from pathlib import Path

from teach_once.configs.schema import TeacherConfig


def overrides_of(weights: str) -> list[str]:
    return [
        "teacher.arch=resnet8",
        f"teacher.weights={weights}",
        "dataset.max_per_class=6",
        "views.count=3",
        "taps.attention=null",
        "taps.hint=null",
    ]


def arguments_of(config: TeacherConfig, caches: Path, *more: str) -> list[str]:
    return [
        "digits-resnet20",
        "--caches",
        str(caches),
        "--device",
        "cpu",
        "--block-rows",
        "4",
        "--batch-size",
        "2",
        *more,
        *overrides_of(config.teacher.weights),
    ]
