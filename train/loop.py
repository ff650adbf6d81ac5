"""The training loop: epochs of shuffled views through one network, with any list of loss terms.

The order of an epoch is a pure function of (seed, epoch), what the network draws in a step one of
(seed, epoch, step), and the learning rate one of the step number, so the state of a run is its
tensors and the number of the last finished epoch; a run continued from a checkpoint equals one that
was never stopped, bit for bit on a CPU. Nothing inside the step loop waits for the device.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from configs.schema import LossTerm, Normalisation, Training, ViewsConfig
from nets.draws import seeded
from nets.error_rates import ErrorRates
from nets.precision import autocast, tf32_only_for
from nets.taps import changed_in_place, read_stages
from train.connectors import Connectors
from train.evaluate import evaluate
from train.feed import TeacherOutputs, TeacherSource
from train.schedule import learning_rate_at, weight_at
from train.study import TrainError
from train.terms import Batch, loss_named
from views.batches import Pixels, ViewBatch
from views.datasets import Dataset, Split
from views.parameters import view_of_epoch
from views.pixels import evaluation_pixels, open_pixels
from views.seeds import STEP_STREAM, draws


class Diverged(TrainError):
    """The loss of a run is no longer a number."""


Active = tuple[str, float, dict[str, float]]  # loss name, weight, options


class SplitPixels(NamedTuple):
    """The views of a dataset's splits, on or on their way to the training device."""

    train: Pixels
    validation: Pixels | None  # where there is one, the best epoch is chosen on it
    test: Pixels


@dataclass(frozen=True)
class Task:
    """Everything that stays the same over a run."""

    data: SplitPixels
    num_views: int
    training: Training
    terms: tuple[LossTerm, ...]
    stages: Mapping[str, str]
    seed: int
    device: torch.device
    freeze_idle_classifier: bool = True


@dataclass
class Learner:
    """Everything that changes over a run."""

    network: nn.Module
    connectors: Connectors | None
    optimizer: torch.optim.Optimizer
    forward: Callable[[Tensor], Tensor]  # the network's, perhaps compiled

    def state_dict(self) -> dict[str, object]:
        return {
            "network": self.network.state_dict(),
            "connectors": self.connectors.state_dict() if self.connectors else {},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, dict[str, object]]) -> None:
        self.network.load_state_dict(state["network"])
        if self.connectors:
            self.connectors.load_state_dict(state["connectors"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class EpochResult:
    """What one epoch came to. Losses are means over the epoch's samples, before their weights."""

    epoch: int
    loss: float
    losses: dict[str, float]
    weights: dict[str, float]
    errors: ErrorRates | None  # on the test split; None in epochs without a test
    validation: ErrorRates | None
    learning_rate: float
    num_samples: int
    train_seconds: float  # the steps, the teacher's outputs at hand
    wait_seconds: float  # for the feed, before the first step
    evaluate_seconds: float
    step_losses: list[float] = field(repr=False)

    @property
    def seconds(self) -> float:
        return self.wait_seconds + self.train_seconds + self.evaluate_seconds

    @property
    def deciding(self) -> ErrorRates | None:
        """The errors that the best epoch is chosen by."""
        return self.errors if self.validation is None else self.validation

    @property
    def images_per_second(self) -> float:
        return self.num_samples / max(self.train_seconds, 1e-9)


@functools.lru_cache(maxsize=1)
def open_splits(
    dataset: Dataset,
    views: ViewsConfig,
    normalisation: Normalisation,
    device: torch.device,
    num_workers: int | None,
) -> SplitPixels:
    """Training, validation and test split; kept, so that the runs of a study share them."""

    def evaluation(split: Split) -> Pixels:
        return evaluation_pixels(split, views, normalisation, device, num_workers)

    return SplitPixels(
        train=open_pixels(dataset.train, views, normalisation, device, num_workers),
        validation=evaluation(dataset.validation) if dataset.validation else None,
        test=evaluation(dataset.test),
    )


def make_learner(
    network: nn.Module, connectors: Connectors | None, training: Training, device: torch.device
) -> Learner:
    """Move to the device and set up SGD over the network's and the connectors' parameters."""
    network = network.to(device=device, memory_format=torch.channels_last)
    parameters = list(network.parameters())
    if connectors is not None:
        connectors = connectors.to(device=device, memory_format=torch.channels_last)
        parameters += list(connectors.parameters())
    optimizer = torch.optim.SGD(
        parameters,
        lr=training.learning_rate,
        momentum=training.momentum,
        nesterov=training.nesterov,
        weight_decay=training.weight_decay,
        fused=True,
    )
    # A parameter that no loss reaches yet would have no buffer while the others have theirs, which
    # the fused step refuses. Starting from zeros gives the same first step.
    if training.momentum:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    forward = _compiled(network) if training.compile else network
    return Learner(network, connectors, optimizer, forward)


def _compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network by torch.compile, with no code of networks that this process compiled before.

    Networks of one class share compiled code, which is guarded on no hooks: the code of a network
    without taps would also run for one with taps, and read none.
    """
    torch.compiler.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(network)
    return compiled


@dataclass(frozen=True)
class Partial:
    """An epoch of which `step` steps are done. Tensors are float32, on the host."""

    epoch: int
    step: int
    step_losses: Tensor
    sums: dict[str, Tensor]
    train_seconds: float


class Pause(Protocol):
    """Decides in the middle of an epoch whether to keep what is done, and keeps it."""

    def is_due(self) -> bool: ...

    def keep(self, partial: Partial) -> None:
        """May raise, to end the training there."""
        ...

    def end_if_asked(self, epoch: int) -> None:
        """May raise, to end the training after a whole epoch, which is kept."""
        ...


def fit(
    task: Task,
    learner: Learner,
    source: TeacherSource,
    *,
    first_epoch: int,
    on_epoch: Callable[[EpochResult], None],
    partial: Partial | None = None,
    pause: Pause | None = None,
) -> None:
    """Train from `first_epoch` (1 for a new run) to the last; `on_epoch` after each.

    partial: what was done of the first epoch before. pause: asked after every step and epoch.
    """
    learner.network.train()
    with student_maps(task, learner) as maps:
        for epoch in range(first_epoch, task.training.epochs + 1):
            result = _run_epoch(task, learner, source, epoch, maps, partial, pause)
            partial = None
            maps.clear()  # those of the last test batch
            on_epoch(result)
            if pause is not None and epoch < task.training.epochs:
                pause.end_if_asked(epoch)


def _run_epoch(
    task: Task,
    learner: Learner,
    source: TeacherSource,
    epoch: int,
    maps: dict[str, Tensor],
    partial: Partial | None,
    pause: Pause | None,
) -> EpochResult:
    waiting = time.perf_counter()
    num_samples, batch_size = len(task.data.train), task.training.batch_size
    order = source.order(task.seed, epoch, num_samples)
    source.start_epoch(epoch, order)
    started = time.perf_counter()
    steps = -(-num_samples // batch_size)
    active = active_terms(task.terms, epoch)
    view = view_of_epoch(epoch, task.num_views)
    step_losses, sums, first_step, seconds_before = _begun(partial, active, task.device)
    seeds = draws(task.seed, epoch, steps, 1, stream=STEP_STREAM)[:, 0]
    batches = task.data.train.batches([view], order[first_step * batch_size :], batch_size)
    for step, batch in enumerate(batches, start=first_step):
        rate = learning_rate_at(task.training, (epoch - 1) * steps + step, steps)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        with seeded(int(seeds[step])):
            losses = run_step(task, learner, source, active, batch, maps)
        maps.clear()
        step_losses.append(losses.pop("total"))
        for name, value in losses.items():
            sums[name] += value * len(batch.ids)
        if pause is not None and step + 1 < steps and pause.is_due():
            seconds = seconds_before + time.perf_counter() - started
            pause.keep(_partial(epoch, step + 1, step_losses, sums, seconds))
    totals = torch.stack([*step_losses, *sums.values()]).tolist()  # the epoch's one wait
    _refuse_divergence(totals[:steps], epoch)
    trained = time.perf_counter()
    is_tested = epoch % task.training.evaluate_every == 0 or epoch == task.training.epochs
    errors = _errors_on(task.data.test, task, learner) if is_tested else None
    on_validation = _errors_on(task.data.validation, task, learner) if is_tested else None
    sizes = [min(batch_size, num_samples - step * batch_size) for step in range(steps)]
    return EpochResult(
        epoch=epoch,
        loss=sum(n * x for n, x in zip(sizes, totals, strict=False)) / num_samples,
        losses={
            name: total / num_samples for name, total in zip(sums, totals[steps:], strict=True)
        },
        weights={name: weight for name, weight, _ in active},
        errors=errors,
        validation=on_validation,
        learning_rate=rate,
        num_samples=num_samples,
        train_seconds=seconds_before + trained - started,
        wait_seconds=started - waiting,
        evaluate_seconds=time.perf_counter() - trained,
        step_losses=totals[:steps],
    )


def _begun(
    partial: Partial | None, active: Sequence[Active], device: torch.device
) -> tuple[list[Tensor], dict[str, Tensor], int, float]:
    """Losses of the steps so far, their sums by name, how many steps, and their seconds."""
    if partial is None:
        return [], {name: torch.zeros((), device=device) for name, _, _ in active}, 0, 0.0
    step_losses = list(partial.step_losses.to(device).unbind())
    sums = {name: value.to(device) for name, value in partial.sums.items()}
    return step_losses, sums, partial.step, partial.train_seconds


def _partial(
    epoch: int,
    step: int,
    step_losses: Sequence[Tensor],
    sums: Mapping[str, Tensor],
    train_seconds: float,
) -> Partial:
    on_host = {name: value.cpu() for name, value in sums.items()}
    return Partial(epoch, step, torch.stack(list(step_losses)).cpu(), on_host, train_seconds)


def _refuse_divergence(step_losses: Sequence[float], epoch: int) -> None:
    """Raise Diverged at the first loss that is no number: nothing good comes after it."""
    for step, loss in enumerate(step_losses, start=1):
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss became {loss} in epoch {epoch}, step {step}\n  fix: lower "
                f"training.learning_rate, or the weights of the method's losses"
            )


def _errors_on(pixels: Pixels | None, task: Task, learner: Learner) -> ErrorRates | None:
    if pixels is None:
        return None
    return evaluate(learner.network, pixels, task.training.precision, task.device)


def active_terms(terms: Sequence[LossTerm], epoch: int) -> list[Active]:
    """The terms whose weight is not zero in this epoch; the others are not even computed."""
    return [
        (term.loss, weight, term.options)
        for term in terms
        if (weight := weight_at(term, epoch)) != 0.0
    ]


def stages_read(task: Task) -> Mapping[str, str]:
    """The student's stages whose maps are to be kept: none where no term looks at any."""
    looks = any(loss_named(term.loss).student - {"logits"} for term in task.terms)
    return task.stages if looks else {}


def student_maps(task: Task, learner: Learner) -> AbstractContextManager[dict[str, Tensor]]:
    """While open, each forward pass fills the dict with the student's maps that losses look at.

    They are what their modules returned: of a map that an operation behind it changes in place, a
    copy. Raises TrainError where the last batch is one sample and batch norm needs more.
    """
    stages = stages_read(task)
    num_samples, batch_size = len(task.data.train), task.training.batch_size
    is_alone = batch_size == 1 or num_samples % batch_size == 1
    changed = set()
    if stages or is_alone:
        try:
            changed = _try_batch(task, learner, stages, 1 if is_alone else 2)
        except ValueError as error:  # batch norm's
            if not is_alone:
                raise
            raise TrainError(_told_of_lone_sample(num_samples, batch_size, error)) from None

    def own(stage: str, features: Tensor) -> Tensor:
        return features.clone() if stage in changed else features

    return read_stages(learner.network, stages, own)


def _try_batch(
    task: Task, learner: Learner, stages: Mapping[str, str], num_images: int
) -> set[str]:
    """Show blank images; returns the stages whose maps are changed in place afterwards."""
    height, width, channels = task.data.train.shape
    images = torch.zeros(num_images, channels, height, width, device=task.device)
    with autocast(task.training.precision, task.device):
        maps, changed = changed_in_place(
            learner.network, stages, images.to(memory_format=torch.channels_last)
        )
        if stages and learner.connectors is not None:
            connectors = copy.deepcopy(learner.connectors)  # their batch norm counts what it sees
            connectors(maps)
            connectors.hint(maps)
    return changed


def _told_of_lone_sample(num_samples: int, batch_size: int, error: ValueError) -> str:
    larger = range(batch_size + 1, num_samples + 1)
    better = next((size for size in larger if num_samples % size != 1), None)
    fix = f"training.batch_size={better}" if better else "more images"
    return (
        f"training.batch_size is {batch_size}, so that the last of an epoch's batches is one of "
        f"{num_samples:,} samples alone, which this network cannot be trained with: {error}\n"
        f"  fix: {fix}"
    )


def run_step(
    task: Task,
    learner: Learner,
    source: TeacherOutputs,
    active: Sequence[Active],
    batch: ViewBatch,
    maps: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """One optimiser step; returns the detached losses by name, and their weighted "total".

    The forward pass fills `maps` with the student's feature maps, where a loss needs them.
    """
    teacher = source.outputs(batch)
    with tf32_only_for(task.training.precision):
        losses = _losses(task, learner, active, batch, teacher, maps)
        total = torch.stack([weight * losses[name] for name, weight, _ in active]).sum()
        learner.optimizer.zero_grad(set_to_none=True)
        total.backward()
    if not task.freeze_idle_classifier:
        _fill_missing_gradients(learner.network)
    learner.optimizer.step()
    return {**{name: value.detach() for name, value in losses.items()}, "total": total.detach()}


def _losses(
    task: Task,
    learner: Learner,
    active: Sequence[Active],
    batch: ViewBatch,
    teacher: Mapping[str, Tensor],
    maps: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The forward pass, and each active loss by name, with its graph."""
    with autocast(task.training.precision, task.device):
        logits = learner.forward(batch.inputs)
        wanted = {output for name, _, _ in active for output in loss_named(name).student}
        connect = learner.connectors
        means = connect(maps) if connect is not None and "means" in wanted else ()
        hint = connect.hint(maps) if connect is not None and "hint" in wanted else None
    seen = Batch(
        labels=batch.labels,
        logits=logits,
        means=means,
        maps=dict(maps),
        hint=hint,
        teacher=teacher,
        other_labels=batch.other_labels,
        other_shares=batch.other_shares,
    )
    return {name: loss_named(name).compute(seen, **options) for name, _, options in active}


def _fill_missing_gradients(network: nn.Module) -> None:
    """Give parameters that no loss reaches a gradient of zero, so that weight decay acts on them.

    Without it SGD leaves them as they are. The original implementation multiplies idle terms by
    zero instead of leaving them out, which shrinks its classifier during a CD-only warm-up.
    """
    for parameter in network.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
