"""Loss weights and the learning rate over a run; epochs are counted from 1."""

from __future__ import annotations

import math
from bisect import bisect_right

from teach_once.configs.schema import Cosine, LossTerm, MultiStep, Training


def weight_at(term: LossTerm, epoch: int) -> float:
    """Return the weight of a term in an epoch.

    Zero before `start_epoch`. Afterwards `weight`, times `decay` for each past entry of
    `decay_epochs`, with a linear warm-up over the first `warmup_epochs`. Early Decay Teacher is a
    choice of these settings: see docs/how-to/methods.md.
    """
    if epoch < term.start_epoch:
        return 0.0
    reached = bisect_right(sorted(term.decay_epochs), epoch)
    risen = min(1.0, (epoch - term.start_epoch + 1) / max(1, term.warmup_epochs))
    return float(term.weight * term.decay**reached * risen)


def learning_rate_at(training: Training, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of step `step` (from 0) of the run."""
    schedule, highest = training.schedule, training.learning_rate
    if isinstance(schedule, MultiStep):
        return highest * _multistep_factor(schedule, step // steps_per_epoch)
    steps = steps_per_epoch * training.epochs
    if isinstance(schedule, Cosine):
        warmup, last = schedule.warmup_epochs * steps_per_epoch, schedule.final_learning_rate
        factor = _warmup_factor(step, warmup)
        if factor is not None:
            return highest * factor
        return last + (highest - last) * _cosine_factor(step, warmup, steps)
    warmup_steps = schedule.warmup_fraction * steps
    factor = _warmup_factor(step, warmup_steps)
    return highest * (_cosine_factor(step, warmup_steps, steps) if factor is None else factor)


def _multistep_factor(schedule: MultiStep, finished_epochs: int) -> float:
    return schedule.gamma ** bisect_right(sorted(schedule.milestones), finished_epochs)


def _warmup_factor(step: int, warmup_steps: float) -> float | None:
    """Return a factor that rises linearly to 1 at `warmup_steps`; None from there on."""
    return (step + 1) / (warmup_steps + 1) if step < warmup_steps else None


def _cosine_factor(step: int, first: float, end: float) -> float:
    """Return a factor that falls from 1 at step `first` to 0 at `end`, which is not reached."""
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1.0, end - first)))
