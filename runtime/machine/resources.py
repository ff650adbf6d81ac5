"""Memory and cores that this process may use.

They are the machine's, limited by control groups (containers, batch systems) and by the process's
own limits, divided by the number of processes that share the machine. That number is in
LOCAL_WORLD_SIZE, set with LOCAL_RANK by torchrun and `runtime.launch`.

Swap is ignored, and so is GPU memory, which control groups do not limit.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RENDEZVOUS = "TEACH_ONCE_RENDEZVOUS"  # variable: file through which ranks meet
_ROOT = Path("/")
# By version of control groups: limits, usage, and usage that the kernel can reclaim.
_V2 = (("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file"))
_V1 = (
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)


@dataclass(frozen=True)
class Share:
    """This process's share: it is process `index` of `count` on this machine."""

    index: int = 0
    count: int = 1

    @classmethod
    def of_this_process(cls) -> Share:
        """Return the share given by LOCAL_RANK and LOCAL_WORLD_SIZE; default: the whole machine."""
        index, count = _whole_number("LOCAL_RANK", 0), _whole_number("LOCAL_WORLD_SIZE", 1)
        return cls(index, max(count, 1))

    def environment(self) -> dict[str, str]:
        """Return the environment variables that give this share to a process."""
        return {"LOCAL_RANK": str(self.index), "LOCAL_WORLD_SIZE": str(self.count)}


def num_ranks() -> int:
    """Return the number of processes that train one network, on all machines (WORLD_SIZE).

    Returns 1 if RANK is missing, or if there is no rendezvous: the address and port of torchrun, or
    the file of `runtime.launch`.
    """
    given = {name for name, value in os.environ.items() if value}
    is_told = {"RANK", RENDEZVOUS} <= given or {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= given
    return max(_whole_number("WORLD_SIZE", 1), 1) if is_told else 1


@contextmanager
def sharing_machine(share: Share) -> Iterator[None]:
    """Assign a share of the machine to this process and its children."""
    before = {name: os.environ.get(name) for name in share.environment()}
    os.environ.update(share.environment())
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def total_memory(root: Path = _ROOT) -> int:
    """Return the bytes that all processes together may use, including memory in use now.

    root: where proc and sys are mounted.
    """
    of_groups = (limit for limit, _ in _memory_groups(root))
    return min(_meminfo(root, "MemTotal"), _address_space(), *of_groups)


def free_memory(root: Path = _ROOT) -> int:
    """Return the bytes that this process may still allocate: its share of the free memory."""
    of_groups = (limit - taken for limit, taken in _memory_groups(root))
    free = min(_meminfo(root, "MemAvailable"), *of_groups, _address_space() - _mapped(root))
    return max(free, 0) // Share.of_this_process().count


def usable_cores(root: Path = _ROOT) -> int:
    """Return this process's share of the cores, at least 1."""
    cores = min([len(os.sched_getaffinity(0)), *_cpu_quotas(root)])
    return max(cores // Share.of_this_process().count, 1)


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, usage) in bytes for each control group of this process that has a limit."""
    for folder, (limits, taken, given_back) in (
        *((folder, _V2) for folder in _groups(root, "")),
        *((folder, _V1) for folder in _groups(root, "memory")),
    ):
        found = [value for name in limits if (value := _number_in(folder / name)) is not None]
        if found:
            stat = _table_in(folder / "memory.stat")
            file_cache = sum(stat.get(name, 0) for name in given_back)
            yield min(found), (_number_in(folder / taken) or 0) - file_cache


def _cpu_quotas(root: Path) -> Iterator[int]:
    """Yield the CPU quota, in cores rounded up, of each control group that has one."""
    for folder in _groups(root, ""):
        quota, _, period = _text_in(folder / "cpu.max").partition(" ")
        if quota.isdigit():
            yield math.ceil(int(quota) / int(period))
    for folder in _groups(root, "cpu"):
        limit, per = (_number_in(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if limit is not None and per:
            yield math.ceil(limit / per)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and its parents; controller "": version 2.

    In a container the path may be the host's path. Then only the outermost folder exists.
    """
    for line in _text_in(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            mounts = (controller,) if controller else ("", "unified")
            for mount in mounts:
                own = Path(path.lstrip("/"))
                for part in (own, *own.parents) if own.parts else (own,):
                    yield root / "sys/fs/cgroup" / mount / part


def _address_space() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return soft if soft != resource.RLIM_INFINITY else 2**63


def _mapped(root: Path) -> int:
    """Return the size of this process's address space in bytes."""
    return int(_text_in(root / "proc/self/statm").split()[0]) * resource.getpagesize()


def _meminfo(root: Path, name: str) -> int:
    return _table_in(root / "proc/meminfo")[f"{name}:"] * 1024


def _table_in(file: Path) -> dict[str, int]:
    """Read a table with lines of a name, a number and an optional unit."""
    lines = (line.split() for line in _text_in(file).splitlines())
    return {words[0]: int(words[1]) for words in lines}


def _number_in(file: Path) -> int | None:
    """Read a number; None if the file is missing or contains a word ("max") or -1: no limit."""
    text = _text_in(file)
    return int(text) if text.isdigit() else None


def _text_in(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _whole_number(variable: str, otherwise: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else otherwise
