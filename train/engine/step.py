"""The training step, and the steps of an epoch.

The network's random draws in a step (dropout, stochastic depth) depend on (seed, epoch, step) and,
with several processes, on the rank. The learning rate depends on the step's number, and the order
of samples on (seed, epoch). Nothing here synchronizes the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from teach_once.configs.schema import LossTerm, Training
from teach_once.nets.networks.precision import autocast, tf32_only_for
from teach_once.nets.student import PARTS
from teach_once.nets.teacher.draws import seeded
from teach_once.train.engine.comparison import ERRORS_ONLY, Evaluator
from teach_once.train.engine.train_state import TrainState
from teach_once.train.method.optimizer import set_learning_rate
from teach_once.train.outputs.shuffle_buffer import ShuffleBuffer
from teach_once.train.outputs.teacher_outputs import Ids, TeacherOutputs
from teach_once.train.schedule import learning_rate_at, weight_at
from teach_once.train.terms import Batch, loss_named
from teach_once.views.augment.parameters import view_of_epoch
from teach_once.views.pixels.batches import ViewBatch
from teach_once.views.pixels.resident import DatasetPixels
from teach_once.views.seeds import STEP_STREAM, draws, permutation


def train_step(
    train_state: TrainState,
    teacher: TeacherOutputs,
    batch: ViewBatch,
    terms: Sequence[ActiveTerm],
    num_samples: int | None = None,
) -> dict[str, Tensor]:
    """Train on one batch: teacher's outputs, forward pass, losses, backward pass, update.

    num_samples: samples in the batch on all ranks, if there are several; `batch` is this rank's
    slice.

    Returns the unweighted losses by name and their weighted sum as "total": detached scalars on the
    device, averaged over the parts of a batch. With several ranks, each returns its contribution,
    and the losses are the sums over the ranks.
    """
    train_state.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    total = num_samples or len(batch.ids)
    parts = train_state.slices.parts(batch, total)
    for number, (part, size) in enumerate(parts, start=1):
        share = size / total
        with (
            tf32_only_for(train_state.precision),
            _sync_gradients(train_state, number == len(parts)),
        ):
            objective, losses = _forward_part(train_state, teacher.rows(part), part, terms, size)
            train_state.scaler.scale(objective * share).backward()  # type: ignore[no-untyped-call]
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.detach() * share
        train_state.maps.clear()
    _update(train_state)
    return sums


def compute_losses(
    train_state: TrainState,
    teacher_outputs: dict[str, Tensor],  # from the cache or the teacher's forward pass
    batch: ViewBatch,
    terms: Sequence[ActiveTerm],
) -> dict[str, Tensor]:
    """Return the losses of a forward pass by name, and their weighted sum as "total"."""
    seen = forward_pass(train_state, teacher_outputs, batch, terms)
    losses = {term.loss: loss_named(term.loss).compute(seen, **term.options) for term in terms}
    return {**losses, "total": weighted_sum(losses, terms)}


def forward_pass(
    train_state: TrainState,
    teacher_outputs: dict[str, Tensor],
    batch: ViewBatch,
    terms: Sequence[ActiveTerm],
) -> Batch:
    """Run the student and collect the outputs of student and teacher that the losses read."""
    with autocast(train_state.precision, train_state.device):
        logits = train_state.forward(batch.inputs)  # stores the maps in train_state.maps
        connected = _run_connectors(train_state, terms)
    return Batch(
        labels=batch.labels,
        logits=logits,
        maps={name: map_ for name, map_ in train_state.maps.items() if name not in PARTS},
        means=connected.means,
        hint=connected.hint,
        pre_logits=connected.pre_logits,
        parts=connected.parts,
        teacher=teacher_outputs,
        other_labels=batch.other_labels,
        other_shares=batch.other_shares,
        mean_squares=train_state.mean_squares,
    )


def weighted_sum(losses: Mapping[str, Tensor], terms: Sequence[ActiveTerm]) -> Tensor:
    return torch.stack([term.weight * losses[term.loss] for term in terms]).sum()


def _forward_part(
    train_state: TrainState,
    teacher_outputs: dict[str, Tensor],
    part: ViewBatch,
    terms: Sequence[ActiveTerm],
    num_samples: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the objective of the backward pass, and the losses."""
    if train_state.distributed is not None:
        objective, losses = train_state.distributed(teacher_outputs, part, terms, num_samples)
        return objective, losses
    losses = compute_losses(train_state, teacher_outputs, part, terms)
    return losses["total"], losses


def _sync_gradients(train_state: TrainState, is_last_part: bool) -> AbstractContextManager[None]:
    """Exchange gradients between ranks only with the last part of a batch."""
    if train_state.distributed is None or is_last_part:
        return nullcontext()
    apart: AbstractContextManager[None] = train_state.distributed.no_sync()
    return apart


def _update(train_state: TrainState) -> None:
    """Update the weights with the accumulated gradients."""
    if not train_state.freeze_idle_classifier:
        _fill_missing_gradients(train_state.network)
    if (longest := train_state.training.max_grad_norm) is not None:
        train_state.scaler.unscale_(train_state.optimizer)
        nn.utils.clip_grad_norm_(train_state.parameters(), longest)
    train_state.scaler.step(train_state.optimizer)
    train_state.scaler.update()
    if train_state.average is not None:
        train_state.average.update_parameters(train_state.network)


class ActiveTerm(NamedTuple):
    """A loss term with its weight in one epoch."""

    loss: str
    weight: float
    options: Mapping[str, float]


def active_terms(terms: Sequence[LossTerm], epoch: int) -> list[ActiveTerm]:
    """Return the terms with a nonzero weight in this epoch; others are not computed."""
    weighted = (ActiveTerm(term.loss, weight_at(term, epoch), term.options) for term in terms)
    return [term for term in weighted if term.weight != 0.0]


class Connected(NamedTuple):
    """The connectors' outputs that losses read; see `train.terms`."""

    means: Sequence[Tensor] = ()
    hint: Tensor | None = None
    pre_logits: Tensor | None = None
    parts: tuple[Tensor, Tensor] | None = None


def _run_connectors(train_state: TrainState, terms: Sequence[ActiveTerm]) -> Connected:
    wanted = {output for term in terms for output in loss_named(term.loss).student}
    if (connectors := train_state.connectors) is None:
        return Connected()
    return Connected(
        connectors(train_state.maps) if "means" in wanted else (),
        connectors.hint(train_state.maps) if "hint" in wanted else None,
        connectors.pre_logits(train_state.maps) if "pre_logits" in wanted else None,
        connectors.parts_of(train_state.maps) if "parts" in wanted else None,
    )


def _fill_missing_gradients(network: nn.Module) -> None:
    """Give parameters that no loss reaches a zero gradient, so that weight decay applies to them.

    Otherwise the optimizer skips them. The original implementation multiplies idle terms by zero
    instead of omitting them, which shrinks its classifier in a CD-only warm-up.
    """
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


# ---- the steps of an epoch


class AnyRun(Protocol):
    """The interface of a run for training: a student's (`train.runs.study`) or a teacher's."""

    @property
    def folder(self) -> Path: ...
    @property
    def identity(self) -> Mapping[str, Any]: ...
    @property
    def training(self) -> Training: ...
    @property
    def terms(self) -> Sequence[LossTerm]: ...
    @property
    def seed(self) -> int: ...
    @property
    def num_views(self) -> int: ...


@dataclass(frozen=True)
class TrainContext:
    """A run on a device: its images, its network and its teacher's outputs, which it must close."""

    run: AnyRun
    data: DatasetPixels
    train_state: TrainState
    teacher: TeacherOutputs
    shuffle: ShuffleBuffer | None = None  # None: shuffle the whole dataset
    evaluator: Evaluator = ERRORS_ONLY  # of the test images

    @property
    def num_steps(self) -> int:
        """Number of steps per epoch."""
        return -(-len(self.data.train) // self.run.training.batch_size)

    def order(self, epoch: int) -> Ids:
        """Return the samples (N,) of all ranks in the epoch's order."""
        if self.shuffle is not None:
            return self.shuffle.order(self.run.seed, epoch)
        return permutation(self.run.seed, epoch, len(self.data.train))


class Step(NamedTuple):
    """The result of a step; number: from 1. losses: from `train_step`."""

    number: int
    num_samples: int
    learning_rate: float
    losses: dict[str, Tensor]


def start_epoch(context: TrainContext, epoch: int) -> Ids:
    """Load the epoch's teacher outputs and return the order of its samples.

    The next epoch's outputs are read in the background.
    """
    order, num_views = context.order(epoch), context.run.num_views
    slices = context.train_state.slices
    context.teacher.start_epoch(view_of_epoch(epoch, num_views), slices.samples(order))
    if epoch < context.run.training.epochs:
        following = slices.samples(context.order(epoch + 1))
        context.teacher.prefetch(view_of_epoch(epoch + 1, num_views), following)
    return order


def epoch_steps(
    context: TrainContext,
    epoch: int,
    order: Ids,
    terms: Sequence[ActiveTerm],
    *,
    steps_done: int = 0,
) -> Iterator[Step]:
    """Yield the epoch's training steps one at a time.

    order: the samples of the epoch. steps_done: completed steps, which are skipped.
    """
    run, train_state = context.run, context.train_state
    size, num_steps = run.training.batch_size, context.num_steps
    seeds = draws(run.seed, epoch, num_steps, 1, stream=STEP_STREAM)[:, 0]
    view = view_of_epoch(epoch, run.num_views)
    left = order[steps_done * size :]
    batches = itertools.chain.from_iterable(
        context.data.train.batches([view], ids, own_size)
        for ids, own_size in train_state.slices.of_epoch(left)
    )
    for step, batch in enumerate(batches, start=steps_done):
        rate = learning_rate_at(run.training, (epoch - 1) * num_steps + step, num_steps)
        set_learning_rate(train_state.optimizer, rate)
        num_samples = min(size, len(order) - step * size)
        with seeded(train_state.ranks.seed(int(seeds[step]))):
            losses = train_step(train_state, context.teacher, batch, terms, num_samples)
        yield Step(step + 1, num_samples, rate, losses)
