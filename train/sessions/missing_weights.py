"""Train a teacher whose weights are missing, after the user has agreed to the cost.

Loads torch only if there is something to train.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from teach_once.configs.load import check_data_exists
from teach_once.configs.schema import TeacherConfig
from teach_once.nets.weights.source import weights_file
from teach_once.runtime.command.options import Compute
from teach_once.train.recording.options import Recording
from teach_once.train.runs.weights import check_trainable, format_record, reason_not_to_train
from teach_once.views.datasets import load_dataset

if TYPE_CHECKING:
    from teach_once.train.engine.ranks import Ranks

DEFAULT_TEACHER = "digits-resnet20"  # as in the Makefile
_HOURS_TO_AGREE_TO = 1 / 6  # a longer training requires --train-teacher


def train_missing_weights(
    config: TeacherConfig,
    caches: Path | None,
    compute: Compute,
    recording: Recording,
    *,
    retrain: bool,
    agreed: bool,
    ranks: Ranks | None = None,
) -> None:
    """Train the weights, or print why no training is needed.

    caches: train nothing if a complete cache is in this folder. retrain: train existing weights
    again. agreed: allow over ten minutes of training (on a CPU, of processor time). ranks: the
    processes that train together, each of which calls this; None: one process. Raises ConfigError,
    TrainError or DatasetError.
    """
    check_data_exists(config)
    console = recording.console or Console(quiet=True)
    reason = "" if retrain else reason_not_to_train(config, caches)
    # Rank 0 writes the weights, perhaps to a disk that other machines cannot read.
    if ranks.broadcast_number(bool(reason)) if ranks else reason:
        console.print(reason)
        return
    check_trainable(config)

    from teach_once.train.engine.ranks import ALONE
    from teach_once.train.runs.check_methods import check_teacher
    from teach_once.train.sessions.teacher import train_teacher

    check_teacher(config, load_dataset(config.dataset, caches))
    record = train_teacher(
        config,
        compute,
        recording,
        retrain=retrain,
        limit_hours=math.inf if retrain or agreed or _is_default(config) else _HOURS_TO_AGREE_TO,
        ranks=ranks or ALONE,
    )
    if record:
        console.print(format_record(record, weights_file(config.teacher.weights)))


def _is_default(config: TeacherConfig) -> bool:
    """Return True for the teacher of the documented first command with unchanged settings.

    Its cost is known and small, and its weights' path belongs to the project, so nothing can be
    misspelled.
    """
    source = config.source
    return source is not None and source.name == DEFAULT_TEACHER and not source.overrides
