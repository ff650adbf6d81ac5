"""What work will cost: its rate, measured on a few batches, and its memory, estimated ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from teach_once.runtime.formats import format_size

if TYPE_CHECKING:
    import torch

_MEASURED_BATCHES = 3  # and for at least
_SHORT_SECONDS = 0.3  # but where batches are slow, for no more than
_LONG_SECONDS = 2.0
_SPARE = 1.2


@dataclass(frozen=True)
class Memory:
    """The most bytes that a process takes: of the machine's memory, and of the GPU's."""

    ram_bytes: int
    gpu_bytes: int

    def __str__(self) -> str:
        on_gpu = f" and {format_size(self.gpu_bytes)} on the GPU" if self.gpu_bytes else ""
        return f"at most about {format_size(self.ram_bytes)} of memory{on_gpu}"


def peak_memory() -> int:
    """The most memory that this process has used, in bytes.

    Not `ru_maxrss`, which starts from the peak of the parent process.
    """
    status = Path("/proc/self/status").read_text()
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak) * 1024


def memory_with(to_come: int, device: torch.device) -> Memory:
    """The most that this process has taken so far, plus `to_come` bytes.

    And a fifth of the sum on top, because allocators keep some of what was freed.
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
    """Images per second over a few batches; each item is the number of images of one.

    The first batch warms up and does not count. agreed: turns whether this process has seen enough
    batches into what it does, where several that work through the same batches must stop together.
    of_processor: count the seconds in which a core worked for this process, whatever else the
    machine does; work of a GPU and of other processes is not in them.
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
