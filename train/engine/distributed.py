"""Train one network on several ranks: each rank's work, and how it becomes the loss of the batch.

Student and connectors are one module under torch's DistributedDataParallel, whose forward pass ends
with the losses. Each rank passes its slice of a batch through the network.

- A loss that is a mean over samples is computed on the slice, times the slice's fraction of the
  batch.
- Any other loss is computed on the whole batch, on every rank: its inputs are exchanged, and only
  the rank's own rows have a gradient.

In both cases the gradient of the batch's loss is the sum of the ranks' gradients, for any sizes of
slices, so the ranks exchange their gradients. The parameters that a loss reaches change during a
run (warm-up, decay, an idle classifier). They are determined in each step, and parameters that no
loss reaches have no gradient, as in a single process.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from teach_once.configs.schema import Training
from teach_once.nets.networks.sync_batch_norm import synchronized
from teach_once.train.engine.idle_ranks import check_idle_ranks
from teach_once.train.engine.ranks import Ranks
from teach_once.train.engine.step import ActiveTerm, forward_pass, weighted_sum
from teach_once.train.engine.train_state import TrainState
from teach_once.train.terms import INPUTS, Batch, Loss, loss_named
from teach_once.views.pixels.batches import ViewBatch

Values = Any  # of a batch: a tensor (B, ...), a list, tuple or mapping of such tensors, or None


def convert_sync_batchnorm(network: nn.Module, training: Training, ranks: Ranks) -> None:
    """Make batch norm use the batch of all ranks, unless the recipe keeps it local.

    Raises ArchError if the network has an unsupported kind of batch norm.
    """
    if not ranks.is_alone and training.batch_norm == "sync":
        synchronized(network)


def wrap_ddp(train_state: TrainState, num_samples: int) -> TrainState:
    """Make all ranks train one network; with a single process, return the train state unchanged.

    num_samples: samples in an epoch. Raises TrainError if a batch has too few samples for the
    ranks.
    """
    if train_state.ranks.is_alone:
        return train_state
    check_idle_ranks(train_state.training, num_samples, train_state.ranks.world)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.11 has no alternative name
        train_state.distributed = DistributedDataParallel(
            _RankForward(train_state), broadcast_buffers=False, find_unused_parameters=True
        )
    train_state.distributed.register_comm_hook(None, lambda _, bucket: _sum_gradients(bucket))
    return train_state


def broadcast_buffers(train_state: TrainState) -> None:
    """Copy rank 0's batch norm statistics to all ranks, if each rank has its own.

    Rank 0 saves its statistics, and all ranks must evaluate the same network.
    """
    if train_state.ranks.is_alone or train_state.training.batch_norm == "sync":
        return
    for network in filter(None, (train_state.network, train_state.average)):
        for buffer in network.buffers():
            train_state.ranks.broadcast(buffer)


def _sum_gradients(bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sum a bucket of gradients over the ranks; DistributedDataParallel would average them."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    summed: torch.futures.Future[torch.Tensor] = work.get_future().then(
        lambda future: future.value()[0]
    )
    return summed


class _RankForward(nn.Module):
    """A forward pass on this rank's slice, up to the losses."""

    def __init__(self, train_state: TrainState) -> None:
        super().__init__()
        self.network, self.connectors = train_state.network, train_state.connectors
        self._train_state = train_state

    def forward(
        self,
        teacher_outputs: dict[str, Tensor],
        part: ViewBatch,
        terms: Sequence[ActiveTerm],
        num_samples: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective of the backward pass, and this rank's contributions to the losses.

        num_samples: of all ranks together. The contributions, including "total", add up to the
        losses.
        """
        ranks = self._train_state.ranks
        seen = forward_pass(self._train_state, teacher_outputs, part, terms)
        used = [loss_named(term.loss) for term in terms]
        whole = WholeBatch(ranks, seen, num_samples, used)
        losses = {term.loss: whole.compute(loss_named(term.loss), term.options) for term in terms}
        shares = {
            name: loss.detach()
            if loss_named(name).per_sample
            else ranks.keep_on_first(loss.detach())
            for name, loss in losses.items()
        }
        objective = weighted_sum(losses, terms)
        return objective, {**shares, "total": weighted_sum(shares, terms)}


class WholeBatch:
    """A batch of `num_samples` over all ranks, of which this rank has the slice `own`."""

    def __init__(
        self, ranks: Ranks, own: Batch, num_samples: int, losses: Iterable[Loss] = ()
    ) -> None:
        """Exchange the inputs of all losses that need the whole batch, in one collective.

        losses: the losses to compute.
        """
        self._ranks, self._own, self._num_samples = ranks, own, num_samples
        names = {name for loss in losses if not loss.per_sample for name in loss.inputs}
        self._inputs = self._of_all({name: INPUTS[name].of(own) for name in sorted(names)})

    def compute(self, loss: Loss, options: Mapping[str, float]) -> Tensor:
        """Return this rank's contribution to the loss; see the module."""
        if loss.per_sample:
            share = len(self._own.labels) / self._num_samples
            return loss.compute(self._own, **options) * share
        if loss.inputs:
            return loss.computed({name: self._inputs[name] for name in loss.inputs}, options)
        own = {each.name: getattr(self._own, each.name) for each in fields(Batch)}
        return loss.scalar(loss.function(Batch(**self._of_all(own)), **options))

    def _of_all(self, values: dict[str, Values]) -> dict[str, Values]:
        """Return these values with the rows of all ranks; this rank's rows keep their gradient."""
        own = list(_tensors(values))
        rows = self._ranks.all_gather_rows(own, self._num_samples) if own else []
        whole: dict[str, Values] = _replace_tensors(values, iter(rows))
        return whole


def _tensors(values: Values) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for each in values.values():
            yield from _tensors(each)
    elif isinstance(values, list | tuple):
        for each in values:
            yield from _tensors(each)


def _replace_tensors(values: Values, tensors: Iterator[Tensor]) -> Values:
    """Return the same structure with other tensors, in the order of `_tensors`."""
    if isinstance(values, Tensor):
        return next(tensors)
    if isinstance(values, Mapping):
        return {name: _replace_tensors(each, tensors) for name, each in values.items()}
    if isinstance(values, list | tuple):
        return type(values)([_replace_tensors(each, tensors) for each in values])
    return values
