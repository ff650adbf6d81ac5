"""Trains a teacher whose weights are missing, once somebody has agreed to what that costs.

Loads torch only where there is something to train.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from configs.load import refuse_missing_data
from configs.schema import TeacherConfig
from nets.weights_file import weights_file
from train.teacher_weights import format_record, reason_not_to_train, refuse_untrainable
from views.datasets import load_dataset

_HOURS_TO_AGREE_TO = 1 / 6  # a longer training asks for --train-teacher


def train_missing_weights(
    config: TeacherConfig,
    caches: Path | None,
    *,
    retrain: bool,
    agreed: bool,
    device: str,
    num_workers: int | None,
    track: Sequence[str],
    console: Console,
) -> None:
    """Train the weights, or print why they need no training.

    caches: train nothing if a complete cache is in this folder. retrain: also if they exist.
    agreed: also if it takes over ten minutes. Raises ConfigError, TrainError, DatasetError.
    """
    refuse_missing_data(config)
    if not retrain and (reason := reason_not_to_train(config, caches)):
        console.print(reason)
        return
    refuse_untrainable(config)

    from train.check import check_teacher
    from train.teacher import train_teacher

    check_teacher(config, load_dataset(config.dataset, caches))
    record = train_teacher(
        config,
        device=device,
        console=console,
        num_workers=num_workers,
        retrain=retrain,
        limit_hours=math.inf if retrain or agreed else _HOURS_TO_AGREE_TO,
        track=track,
    )
    console.print(format_record(record, weights_file(config.teacher.weights)))
