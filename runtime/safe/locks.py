"""Advisory lock for one writer, or one job of several processes, released when its owner dies.

The first process of a job takes the lock alone and prepares the cache. Then it admits the other
processes of the same job, which wait until then. If it dies before, another process of the job
takes over.

The lock uses `flock`, so it is released when its process ends in any way. Forked processes, such as
image readers, would inherit and outlive it, so they close their copy at once. It works on local
file systems and on NFS mounts that support `flock`; elsewhere, opening for writing fails.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from teach_once.runtime.errors import Busy
from teach_once.runtime.safe.confined import make_folder_inside, open_to_update
from teach_once.runtime.safe.text import one_line

LOCK_FILE = "writer.lock"
_POLL_SECONDS = 0.05
_POLLS = 60  # polls within which the lock's owner must write its name
_MOST_OWNER_BYTES = 4096
_CLOSED = -1

_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()  # locks of this process


@dataclass(frozen=True)
class Job:
    """Processes started together: their shared name, this process's rank, their number."""

    name: str = ""
    rank: int = 0
    world: int = 1


class WriterLock:
    """A lock on a cache's folder; `leader` is True for the process that must prepare it."""

    def __init__(self, cache: Path, job: Job, busy: type[Busy] = Busy) -> None:
        """Take the lock, or wait until the leader of the same job is ready. Raises `busy`."""
        self._cache, self._job, self._busy_error = cache, job, busy
        self._handle = open_to_update(cache, LOCK_FILE)
        _held.add(self)
        try:
            self.leader = self._try(fcntl.LOCK_EX) or self._leads_after_waiting()
            if self.leader:
                self._sign(is_ready=False)
        except BaseException:
            self.release()
            raise

    def let_others_in(self) -> None:
        """Admit the other processes of the job, after the leader has prepared the cache."""
        if self._job.world > 1:
            self._sign(is_ready=True)
            fcntl.flock(self._handle, fcntl.LOCK_SH)

    def alone(self) -> bool:
        """Return True if all other processes have ended, after which none can join.

        Otherwise this process loses its own lock.
        """
        return self._try(fcntl.LOCK_EX)

    def release(self) -> None:
        """Release the lock; does nothing in a forked process, which does not own it."""
        _held.discard(self)
        handle, self._handle = self._handle, _CLOSED
        if handle != _CLOSED:
            os.close(handle)

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _sign(self, *, is_ready: bool) -> None:
        """Write the owner into the lock file, flushed so that other hosts read it too."""
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "job": self._job.name,
            "ready": is_ready,
        }
        text = json.dumps(owner).encode()
        earlier = min(os.fstat(self._handle).st_size, _MOST_OWNER_BYTES)
        text = text.ljust(earlier)  # cover the earlier text, so that the file is never truncated
        os.pwrite(self._handle, text, 0)
        os.ftruncate(self._handle, len(text))
        os.fsync(self._handle)

    def _leads_after_waiting(self) -> bool:
        """Wait for the leader of this job; returns True if it died before and this process leads.

        Another owner is accepted only after `_POLLS` identical reads: a new owner may not yet have
        written its name to the file.
        """
        num_others = 0
        while True:
            if not self._same_job():
                num_others += 1
                if self._job.world == 1 or num_others > _POLLS:
                    raise self._busy()
            else:
                num_others = 0
                if self._try(fcntl.LOCK_SH):
                    if self._owner().get("ready"):
                        return False
                    fcntl.flock(self._handle, fcntl.LOCK_UN)  # some systems cannot upgrade a lock
                    if self._try(fcntl.LOCK_EX):
                        return True
            time.sleep(_POLL_SECONDS)

    def _same_job(self) -> bool:
        return self._job.world > 1 and self._owner().get("job") == self._job.name

    def _owner(self) -> dict[str, object]:
        try:
            owner = json.loads(os.pread(self._handle, _MOST_OWNER_BYTES, 0))
        except (ValueError, RecursionError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _busy(self) -> Busy:
        for _ in range(_POLLS):  # for the owner's name
            if owner := self._owner():
                break
            time.sleep(_POLL_SECONDS)
        return self._busy_error(
            f"{self._cache} is being written by process {one_line(owner.get('pid', '?'))} on "
            f"{one_line(owner.get('host', 'this machine'))}",
            fix="wait until it ends, or stop it; committed records are kept",
        )


@contextmanager
def releasing(lock: WriterLock) -> Iterator[None]:
    """Release a lock when the context exits."""
    try:
        yield
    finally:
        lock.release()


def numbered_folder(parent: Path, first: int = 0) -> tuple[Path, WriterLock]:
    """Return and lock the first folder `parent/<number>`, from `first` on, that is not in use.

    Raises BadFile if one of them is a link.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(first):
        folder = parent / f"{number:04d}"
        make_folder_inside(parent, folder.name)
        with suppress(Busy):
            return folder, WriterLock(folder, Job())
    raise AssertionError("numbers do not end")


def _let_go_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_child)
