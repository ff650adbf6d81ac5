"""The processes that train one network together: this process's rank, and its collectives.

`runtime.launch` or torchrun sets the environment (RANK, WORLD_SIZE, ...). gloo exchanges tensors in
host memory, and nccl exchanges tensors on GPUs. A single process uses neither.

Every rank must call the same collectives in the same order. A rank that left the loop a step early
or saved a checkpoint alone would make the others wait forever. Therefore no rank acts on a signal
or on its own clock. Each rank contributes its request to a max all-reduce after every step, and all
ranks act on the maximum (`AsyncMaxReduce`). The result is read one step later, so that the exchange
overlaps a training step. All ranks read the same value at the same step, and therefore save and
stop after the same step.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from teach_once.runtime.errors import Stopped, UserError
from teach_once.runtime.machine.devices import check_device
from teach_once.runtime.machine.resources import RENDEZVOUS, Share, num_ranks
from teach_once.train.errors import TrainError
from teach_once.views.pixels.batches import equal_parts

_SECONDS_FOR_OTHERS = 5.0
_MET, _FAILED = "met", "failed"  # keys of the shared store: number of joined and of failed ranks
# Errors of a collective if another rank has ended.
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|TCPStore|recvValue", re.I)
_SEED_STEP = 0x9E3779B97F4A7C15  # difference between the seeds of two ranks


class RankLost(TrainError):
    """Another process of this run has ended, so this one cannot continue."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank among the `world` processes that train one network."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes and prints."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.world == 1

    def sizes(self, num_samples: int) -> list[int]:
        """Return the number of samples of each rank, out of `num_samples`."""
        return equal_parts(num_samples, self.world)

    def slice_of(self, num_samples: int) -> slice:
        """Return this rank's slice of `num_samples` samples; the ranks' slices are consecutive."""
        sizes = self.sizes(num_samples)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def seed(self, seed: int) -> int:
        """Derive this rank's seed from a common seed; rank 0 uses it unchanged."""
        return (seed + self.rank * _SEED_STEP) % 2**64

    def keep_on_first(self, value: Tensor) -> Tensor:
        """Return `value` on rank 0 and zeros elsewhere, so that the sum over ranks is `value`."""
        return value if self.is_first else torch.zeros_like(value)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum `values` over all ranks, in place."""
        if not self.is_alone:
            dist.all_reduce(values)
        return values

    def broadcast(self, values: Tensor) -> Tensor:
        """Overwrite `values` with rank 0's values, which have the same shape and dtype."""
        if not self.is_alone:
            dist.broadcast(values, src=0)
        return values

    def broadcast_number(self, value: float) -> float:
        """Return rank 0's number or decision."""
        return self.broadcast(torch.tensor(value, dtype=torch.float64)).item()

    def all_gather_rows(self, own: Sequence[Tensor], num_samples: int) -> list[Tensor]:
        """Gather the rows of all ranks in one collective: (M, ...) each -> (num_samples, ...).

        Only this rank's own rows have a gradient.
        """
        sizes, num_own = self.sizes(num_samples), len(own[0])
        # The collective needs equal shapes, and gloo supports few dtypes: exchange padded bytes.
        packed = [_compact(each.detach().reshape(num_own, -1)).view(torch.uint8) for each in own]
        row = torch.cat(packed, dim=1)
        padded = row.new_zeros(max(sizes), row.shape[1])
        padded[:num_own] = row
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded)
        found, start = [], 0
        for mine, bytes_ in zip(own, packed, strict=True):
            stop = start + bytes_.shape[1]
            rows = [
                _compact(part[:size, start:stop]).view(mine.dtype).reshape(-1, *mine.shape[1:])
                for part, size in zip(received, sizes, strict=True)
            ]
            rows[self.rank] = mine
            found.append(torch.cat(rows))
            start = stop
        return found

    def barrier(self) -> None:
        """Wait until every rank calls this."""
        self.all_reduce(torch.zeros(1))

    def check_equal(self, sha256: str, what: str, fix: str) -> None:
        """Raise TrainError on all ranks unless all pass the same sha256."""
        if self.is_alone:
            return
        own = torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.int64)
        differs = (own != self.broadcast(own.clone())).any().long()
        if self.all_reduce(differs):
            raise TrainError(f"the ranks of this run differ in {what}", fix=fix)


def _compact(values: Tensor) -> Tensor:
    """Copy to the standard layout, so that `view(dtype)` works; `contiguous` may skip one row."""
    return values.clone(memory_format=torch.contiguous_format)


ALONE = Ranks()


@dataclass
class AsyncMaxReduce:
    """An asynchronous max all-reduce of a few integers, one step behind; see the module."""

    ranks: Ranks
    _values: Tensor | None = None
    _work: Any = field(default=None, repr=False)

    def start(self, own: list[int]) -> None:
        """Start reducing this rank's integers, after the last result has been read."""
        self._values = torch.tensor(own, dtype=torch.int64)
        self._work = dist.all_reduce(self._values, dist.ReduceOp.MAX, async_op=True)

    def wait(self, length: int) -> list[int]:
        """Return the maxima of the integers started last, or zeros if there were none."""
        if self._values is None:
            return [0] * length
        self._work.wait()
        found: list[int] = self._values.tolist()
        self._values = self._work = None
        return found


@contextmanager
def init_process_group(device: str) -> Iterator[Ranks]:
    """Join the other processes of this run in a context; a single process joins nothing.

    device: as for `runtime.machine.devices.pick_device`. If several ranks fail with a user's error,
    the first one raises it, and the others end silently with the same exit status. Raises RankLost
    if another rank has ended without an error, and TrainError if there are too few GPUs.
    """
    if num_ranks() == 1:
        yield ALONE
        return
    uses_cuda = check_device(device).type == "cuda"
    if uses_cuda:
        _require_own_gpus(device)
    store, rank, world = _rendezvous()
    backends = "cpu:gloo,cuda:nccl" if uses_cuda else "gloo"
    ranks = Ranks(rank, world)
    try:
        dist.init_process_group(backends, store=store, rank=rank, world_size=world)
        yield ranks
        ranks.barrier()
        dist.destroy_process_group()
    except Exception as error:
        explained = _explain(error, ranks)
        is_foreseen = isinstance(explained, UserError | Stopped | OSError)
        if not _is_first_failure(store, ranks) and is_foreseen:
            raise SystemExit(getattr(explained, "exit_code", UserError.exit_code)) from None
        if explained is error:
            raise
        raise explained from None


def _rendezvous() -> tuple[Store, int, int]:
    """Return the store that all ranks share, this process's rank, and the number of ranks."""
    if file := os.environ.get(RENDEZVOUS):
        rank, world = int(os.environ["RANK"]), num_ranks()
        store = FileStore(file, world)
        store.add(_MET, 1)
        while store.add(_MET, 0) < world:  # unlike torch's wait, a signal ends this at once
            time.sleep(0.02)
        return store, rank, world
    kept, rank, world = next(rendezvous("env://"))
    # torchrun keeps one store across restarts; entries of the last attempt must not be read.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"teach-once/{attempt}/{world}", kept), rank, world


def _store_outlives_ranks() -> bool:
    """Return True if the store is a file or torchrun's; otherwise rank 0 serves it."""
    return RENDEZVOUS in os.environ or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _explain(error: Exception, ranks: Ranks) -> Exception:
    """Return RankLost if a collective failed because another rank has ended, else the error."""
    is_torchs = isinstance(error, RuntimeError) and not isinstance(error, UserError)
    if not is_torchs or not _LOST.search(str(error)):
        return error
    return RankLost(
        f"rank {ranks.rank} of {ranks.world} lost another process of this run, which was killed "
        f"or lost its connection: {str(error).splitlines()[0]}",
        fix="run the same command again: it resumes from the last checkpoint",
    )


def _is_first_failure(store: Store, ranks: Ranks) -> bool:
    """Count this failure in the store; returns True if it is the first failure of any rank."""
    try:
        is_first = bool(store.add(_FAILED, 1) == 1)
        if ranks.is_first and not _store_outlives_ranks():
            # The store ends with this process, and other ranks must still count their failures.
            ended = time.monotonic() + _SECONDS_FOR_OTHERS
            while store.add(_FAILED, 0) < ranks.world and time.monotonic() < ended:
                time.sleep(0.05)
    except RuntimeError:  # the store was lost
        return True
    return is_first


def _require_own_gpus(device: str) -> None:
    """Raise TrainError if local processes would share a GPU, which nccl does not allow."""
    processes, gpus = Share.of_this_process().count, torch.cuda.device_count()
    if torch.device("cuda" if device == "auto" else device).index is not None:
        raise TrainError(
            f"device {device!r} is one GPU, and {processes} processes train together",
            fix="use --device auto (with make: DEVICE=auto)",
        )
    if processes > gpus and not _has_gpu_of_its_own(gpus):
        raise TrainError(
            f"{processes} processes of this machine need a GPU each, but torch finds {gpus}",
            fix=f"use as many processes as GPUs (with make: NPROC={gpus}), or --device cpu",
        )


def _has_gpu_of_its_own(gpus: int) -> bool:
    """Return True if srun gives each process its own GPU, as --gpus-per-task=1 does.

    If processes share a GPU after all, nccl reports it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return gpus == 1 and "SLURM_PROCID" in os.environ and visible != "" and "," not in visible
