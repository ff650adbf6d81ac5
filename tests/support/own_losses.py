"""Losses as a user would register them."""

from __future__ import annotations

from torch import Tensor

from teach_once.train.terms import Batch, loss_term


@loss_term(teacher_taps=["logits"])
def sharper(batch: Batch, sharpness: float = 1.0) -> Tensor:
    return (batch.logits - sharpness * batch.teacher["logits"]).square().mean()


@loss_term()
def sharper_by_name(
    student_logits: Tensor, teacher_logits: Tensor, sharpness: float = 1.0
) -> Tensor:
    return (student_logits - sharpness * teacher_logits).square().mean()


@loss_term()
def needs_margin(student_logits: Tensor, *, margin: float) -> Tensor:
    return (student_logits - margin).square().mean()


@loss_term()
def takes_anything(batch: Batch, **options: float) -> Tensor:
    return batch.logits.mean() * sum(options.values())


@loss_term(teacher_taps=["logits"], student=["embedding"])
def spread(batch: Batch) -> Tensor:
    """Use the whole batch: the deviation of its samples' maps and logits."""
    maps = [map_.std(dim=0).mean() for map_ in batch.maps.values()]
    return sum(maps, (batch.logits - batch.teacher["logits"]).std(dim=0).mean())


@loss_term()
def centered(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Use the whole batch: the mean of its logits."""
    ours, theirs = (each - each.mean(dim=0) for each in (student_logits, teacher_logits.float()))
    return (ours - theirs).square().mean()


@loss_term()
def root(student_logits: Tensor) -> Tensor:
    """Return NaN."""
    return (-1 - student_logits.square()).sqrt().mean()
