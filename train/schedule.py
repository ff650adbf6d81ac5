"""How loss weights and the learning rate move over a run; epochs are counted from 1."""

from __future__ import annotations

import math
from bisect import bisect_right

from configs.schema import LossTerm, MultiStep, OneCycle, Training


def weight_at(term: LossTerm, epoch: int) -> float:
    """The weight of a term in an epoch.

    Zero before `start_epoch`; from then on `weight`, times `decay` for each of `decay_epochs` that
    has been reached; over the first `warmup_epochs` it rises linearly to that. Early Decay Teacher
    is a way to set these: see the README.
    """
    if epoch < term.start_epoch:
        return 0.0
    reached = bisect_right(sorted(term.decay_epochs), epoch)
    risen = min(1.0, (epoch - term.start_epoch + 1) / max(1, term.warmup_epochs))
    return float(term.weight * term.decay**reached * risen)


def learning_rate_at(training: Training, step: int, steps_per_epoch: int) -> float:
    """The learning rate of step `step` (from 0) of the run."""
    schedule = training.schedule
    if isinstance(schedule, MultiStep):
        finished_epochs = step // steps_per_epoch
        return training.learning_rate * _multistep_factor(schedule, finished_epochs)
    return training.learning_rate * _onecycle_factor(
        schedule, step, steps_per_epoch * training.epochs
    )


def _multistep_factor(schedule: MultiStep, finished_epochs: int) -> float:
    return schedule.gamma ** bisect_right(sorted(schedule.milestones), finished_epochs)


def _onecycle_factor(schedule: OneCycle, step: int, total_steps: int) -> float:
    warmup_steps = schedule.warmup_fraction * total_steps
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    position = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * position))
