"""The processes that train one network together: which one this is, and what they exchange.

`runtime.launch` or torchrun says it in the environment (RANK, WORLD_SIZE, ...). Tensors in host
memory are exchanged by gloo, those on GPUs by nccl. A single process exchanges nothing and starts
neither.
Every rank must come to the same exchanges in the same order.
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
_MET, _FAILED = "met", "failed"  # in the store of all ranks: how many have come, have failed
# What an exchange raises where another rank is gone.
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|TCPStore|recvValue", re.I)
_SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of two ranks


class RankLost(TrainError):
    """Another process of this run has ended, so that this one cannot continue."""


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of the `world` processes that train one network."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.world == 1

    def sizes(self, num_samples: int) -> list[int]:
        """How many of so many samples each rank takes, in the order of the ranks."""
        return equal_parts(num_samples, self.world)

    def slice_of(self, num_samples: int) -> slice:
        """Those that this rank takes: the slices of all ranks follow one another."""
        sizes = self.sizes(num_samples)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def seed(self, seed: int) -> int:
        """This rank's own, made of one that is the same for all; rank 0 has it as it is."""
        return (seed + self.rank * _SEED_STEP) % 2**64

    def counted(self, value: Tensor) -> Tensor:
        """A value that all ranks know, as the share of this one: the sum of shares is the value."""
        return value if self.is_first else torch.zeros_like(value)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks; written into `values`."""
        if not self.is_alone:
            dist.all_reduce(values)
        return values

    def of_first(self, values: Tensor) -> Tensor:
        """What rank 0 has, of the same shape and type; written into `values`."""
        if not self.is_alone:
            dist.broadcast(values, src=0)
        return values

    def number_of_first(self, value: float) -> float:
        """What rank 0 has: a number, or a decision that all are to follow."""
        return self.of_first(torch.tensor(value, dtype=torch.float64)).item()

    def rows_of_all(self, own: Sequence[Tensor], num_samples: int) -> list[Tensor]:
        """Of tensors (own, ...) of this rank's samples, those of the `num_samples` of all ranks.

        In one exchange. The rows of other ranks carry no gradient, one's own do.
        """
        sizes, num_own = self.sizes(num_samples), len(own[0])
        # The collective wants equal shapes, gloo wants types that it knows: padded bytes.
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

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        self.sum(torch.zeros(1))

    def refuse_difference(self, sha256: str, what: str, fix: str) -> None:
        """Raise TrainError, on all ranks, unless all have the same sha256."""
        if self.is_alone:
            return
        own = torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.int64)
        differs = (own != self.of_first(own.clone())).any().long()
        if self.sum(differs):
            raise TrainError(f"the ranks of this run differ in {what}", fix=fix)


def _compact(values: Tensor) -> Tensor:
    """A copy that can be looked at as another type: `contiguous` leaves a single row as it lies."""
    return values.clone(memory_format=torch.contiguous_format)


ALONE = Ranks()


@dataclass
class Votes:
    """A small vector of whole numbers, of which all ranks take the largest after each step.

    The exchange of a step runs beside the next one, whose end brings its result: nothing waits
    for it, and all ranks learn the same at the same step.
    """

    ranks: Ranks
    _cast: Tensor | None = None
    _work: Any = field(default=None, repr=False)

    def cast(self, own: list[int]) -> None:
        """Give this step's numbers, after the result of the last ones."""
        self._cast = torch.tensor(own, dtype=torch.int64)
        self._work = dist.all_reduce(self._cast, dist.ReduceOp.MAX, async_op=True)

    def result(self, length: int) -> list[int]:
        """The largest of all ranks of each number that was cast last; zeros where nothing was."""
        if self._cast is None:
            return [0] * length
        self._work.wait()
        found: list[int] = self._cast.tolist()
        self._cast = self._work = None
        return found


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the other processes, if there are any, for as long as the context is open.

    device: as `runtime.machine.devices.pick_device` takes it. Of several ranks that fail with an
    error of the user's, the first one raises it and the others end in silence with its exit status.
    Raises RankLost where another one has ended without a word, TrainError where GPUs are too few.
    """
    if num_ranks() == 1:
        yield ALONE
        return
    uses_cuda = check_device(device).type == "cuda"
    if uses_cuda:
        _refuse_shared_gpus(device)
    store, rank, world = _meet()
    backends = "cpu:gloo,cuda:nccl" if uses_cuda else "gloo"
    ranks = Ranks(rank, world)
    try:
        dist.init_process_group(backends, store=store, rank=rank, world_size=world)
        yield ranks
        ranks.wait_for_all()
        dist.destroy_process_group()
    except Exception as error:
        explained = _explained(error, ranks)
        is_foreseen = isinstance(explained, UserError | Stopped | OSError)
        if not _is_first_failure(store, ranks) and is_foreseen:
            raise SystemExit(getattr(explained, "exit_code", UserError.exit_code)) from None
        if explained is error:
            raise
        raise explained from None


def _meet() -> tuple[Store, int, int]:
    """The store of all ranks, which rank this is, and how many there are."""
    if file := os.environ.get(RENDEZVOUS):
        rank, world = int(os.environ["RANK"]), num_ranks()
        store = FileStore(file, world)
        store.add(_MET, 1)
        while store.add(_MET, 0) < world:  # unlike torch's own waiting, a signal ends this at once
            time.sleep(0.02)
        return store, rank, world
    kept, rank, world = next(rendezvous("env://"))
    # torchrun keeps one store over its restarts: what the last attempt left must not be read.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"teach-once/{attempt}/{world}", kept), rank, world


def _store_outlives_ranks() -> bool:
    """Whether the store is a file or torchrun's; otherwise rank 0 serves it."""
    return RENDEZVOUS in os.environ or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _explained(error: Exception, ranks: Ranks) -> Exception:
    """RankLost for what an exchange raises where another rank is gone; any other as it is."""
    is_torchs = isinstance(error, RuntimeError) and not isinstance(error, UserError)
    if not is_torchs or not _LOST.search(str(error)):
        return error
    return RankLost(
        f"rank {ranks.rank} of {ranks.world} lost another process of this run, which was killed "
        f"or lost its connection: {str(error).splitlines()[0]}",
        fix="run the same command again: it resumes from the last checkpoint",
    )


def _is_first_failure(store: Store, ranks: Ranks) -> bool:
    """Count a failure; whether it is the first one of any rank."""
    try:
        is_first = bool(store.add(_FAILED, 1) == 1)
        if ranks.is_first and not _store_outlives_ranks():
            # The store ends with this process: others have yet to count theirs.
            ended = time.monotonic() + _SECONDS_FOR_OTHERS
            while store.add(_FAILED, 0) < ranks.world and time.monotonic() < ended:
                time.sleep(0.05)
    except RuntimeError:  # it was the store that was lost
        return True
    return is_first


def _refuse_shared_gpus(device: str) -> None:
    """Raise TrainError where processes of this machine would share a GPU, which nccl cannot."""
    processes, gpus = Share.of_this_process().count, torch.cuda.device_count()
    if torch.device("cuda" if device == "auto" else device).index is not None:
        raise TrainError(
            f"device {device!r} is one GPU, and {processes} processes train together",
            fix="--device auto; with make: DEVICE=auto",
        )
    if processes > gpus and not _has_gpu_of_its_own(gpus):
        raise TrainError(
            f"{processes} processes of this machine need a GPU each, and torch sees {gpus}",
            fix=f"as many processes as GPUs, with make: GPUS={gpus}; or --device cpu",
        )


def _has_gpu_of_its_own(gpus: int) -> bool:
    """Return True if srun shows this process one GPU, as --gpus-per-task=1 does, each another one.

    If it is the same one after all, nccl names it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return gpus == 1 and "SLURM_PROCID" in os.environ and visible != "" and "," not in visible
