"""Estimate the cost of work: measure the rate on a few batches, and predict the memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from teach_once.runtime.formats import format_size
from teach_once.runtime.machine.resources import free_memory

if TYPE_CHECKING:
    import torch

_MEASURED_BATCHES = 3  # at least, and for at least
_SHORT_SECONDS = 0.3  # but with slow batches for at most
_LONG_SECONDS = 2.0
_SPARE = 1.2


@dataclass(frozen=True)
class Memory:
    """Peak memory of a process in bytes: of the machine and of the GPU."""

    ram_bytes: int
    gpu_bytes: int

    def __str__(self) -> str:
        on_gpu = f" and {format_size(self.gpu_bytes)} on the GPU" if self.gpu_bytes else ""
        return f"at most about {format_size(self.ram_bytes)} of RAM{on_gpu}"

    def with_free(self) -> str:
        """Return the text with the RAM that is free now."""
        return f"{self} ({format_size(free_memory())} free)"


def peak_memory() -> int:
    """Return the peak memory of this process in bytes.

    `ru_maxrss` is not used, because it starts at the parent process's peak.
    """
    status = Path("/proc/self/status").read_text()
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak) * 1024


def memory_with(to_come: int, device: torch.device) -> Memory:
    """Return this process's peak memory plus `to_come` bytes, with a margin of a fifth.

    The margin is for allocators, which keep some freed memory.
    """
    peak = peak_memory()
    if device.type != "cuda":
        return Memory(int(_SPARE * (peak + to_come)), 0)
    import torch

    on_gpu = torch.cuda.max_memory_reserved(device) + to_come
    return Memory(int(_SPARE * (peak + to_come)), int(_SPARE * on_gpu))


def measured_rate(
    batches: Iterator[int],
    agreed: Callable[[bool], bool] = lambda is_enough: is_enough,
    *,
    of_processor: bool = False,
) -> float:
    """Measure images per second over a few batches; each item is the number of images in a batch.

    The first batch is a warm-up and does not count. agreed: turns this process's decision to stop
    into a common decision, if several processes work on the same batches. of_processor: count
    processor seconds of this process instead of elapsed seconds. This excludes other load on the
    machine, but also the work of GPUs and of other processes.
    """
    clock = time.process_time if of_processor else time.perf_counter
    next(batches)
    images, started = 0, clock()
    for number, size in enumerate(batches, start=1):
        images += size
        seconds = clock() - started
        if agreed(seconds > (_SHORT_SECONDS if number >= _MEASURED_BATCHES else _LONG_SECONDS)):
            break
    return images / seconds
