"""The options that commands of `python -m train` share, and how what they name is opened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.load import load_student, load_teacher, refuse_missing_data, split_overrides
from configs.schema import StudentConfig, TeacherConfig
from train.errors import TrainError
from train.study import MOST_SEED, Study, open_study
from train.windows import Feed

Method = Annotated[str, typer.Option(help="one of the config's methods")]
Methods = Annotated[str, typer.Option(help='methods, as in "ce kd"; default: all of the config')]
Seed = Annotated[
    int, typer.Option(min=0, max=MOST_SEED, help="decides initial weights and order of samples")
]
Seeds = Annotated[str, typer.Option(help='seeds, as in "0 1 2"')]
Runs = Annotated[Path, typer.Option(help="folder that holds the runs")]
CachePath = Annotated[Path | None, typer.Option(help="use this cache, wherever it lies")]
FeedOption = Annotated[
    Literal["auto", "device", "host", "window"],
    typer.Option(help="where a view's teacher outputs are held while its epoch runs"),
]
Jobs = Annotated[int, typer.Option(min=1, help="runs to train side by side")]
Redo = Annotated[bool, typer.Option(help="train again, replacing the runs asked for")]


def open_configs(name: str, overrides: list[str] | None) -> tuple[StudentConfig, TeacherConfig]:
    """The student's config and that of the teacher it names. Raises ConfigError."""
    own, teachers = split_overrides(overrides or [])
    config = load_student(name, own)
    teacher = load_teacher(config.teacher, teachers)
    refuse_missing_data(teacher)
    return config, teacher


def open_named_study(
    name: str,
    overrides: list[str] | None,
    caches: Path,
    runs: Path,
    cache: Path | None,
    feed: Feed = "auto",
) -> Study:
    """The study of a student's config. Raises what `open_configs` and `open_study` raise."""
    config, teacher = open_configs(name, overrides)
    return open_study(
        config, teacher, caches_dir=caches, runs_dir=runs, cache_path=cache, feed=feed
    )


def parse_seeds(text: str) -> list[int]:
    """Whole numbers of at most 64 bits, each once. Raises TrainError."""
    words = text.split()
    if not words or not all(re.fullmatch("[0-9]{1,20}", word) for word in words):
        raise TrainError(f'--seeds {text!r}: expected whole numbers, as in "0 1 2"')
    seeds = list(dict.fromkeys(map(int, words)))
    if max(seeds) > MOST_SEED:
        raise TrainError(f"--seeds: {max(seeds)} is too large; the largest is {MOST_SEED}")
    return seeds
