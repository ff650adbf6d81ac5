"""One writer, or one job of several, at a time: an advisory lock that dies with its owner.

The first process of a job takes the lock alone, prepares the cache and says what is to be done;
then it lets the other processes of the same job in. They wait as long as it holds the lock, however
long it prepares; where it dies before it is ready, one of them prepares instead.

`flock` keeps the lock, so whatever becomes of a process its hold is gone with it. Processes that it
forks (to read images, say) would inherit that hold and outlive it: they close their copy at once.
Works on local file systems and on NFS mounts that support `flock`; where a file system supports
none, opening for writing fails.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import Busy

LOCK_FILE = "writer.lock"
_START_SECONDS = 3.0  # in which the first process must have put its name into the lock file
_POLL_SECONDS = 0.05
_CLOSED = -1

_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()  # by this process


@dataclass(frozen=True)
class Job:
    """Processes that were started together: a name they share, their number, this one's rank."""

    name: str = ""
    rank: int = 0
    world: int = 1


class WriterLock:
    """A hold on a cache's folder; `leader` is True for the process that is to prepare it."""

    def __init__(self, cache: Path, job: Job, busy: type[Busy] = Busy) -> None:
        """Take the lock, or wait until the leader of the same job is ready. Raises `busy`."""
        self._cache, self._job, self._busy_error = cache, job, busy
        self._handle = os.open(cache / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        _held.add(self)
        try:
            self.leader = self._try(fcntl.LOCK_EX) or self._leads_after_waiting()
            if self.leader:
                self._sign(is_ready=False)
        except BaseException:
            self.release()
            raise

    def let_others_in(self) -> None:
        """The leader is done preparing: the job's other processes may go on."""
        if self._job.world > 1:
            self._sign(is_ready=True)
            fcntl.flock(self._handle, fcntl.LOCK_SH)

    def alone(self) -> bool:
        """Whether all the others have gone; if so nobody else can come in any more.

        If not, this process's own hold is gone.
        """
        return self._try(fcntl.LOCK_EX)

    def release(self) -> None:
        """Let go; does nothing in a forked process, which never had a hold."""
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
        """Put the owner's name into the lock file, flushed so that other hosts see it too."""
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "job": self._job.name,
            "ready": is_ready,
        }
        text = json.dumps(owner).encode()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, text, 0)
        os.fsync(self._handle)

    def _leads_after_waiting(self) -> bool:
        """Wait for a leader of this job; True where it died unready, and this process leads."""
        started = time.monotonic()
        while True:
            if not self._same_job():
                if self._job.world == 1 or time.monotonic() - started > _START_SECONDS:
                    raise self._busy()
            elif self._try(fcntl.LOCK_SH):
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
            owner = json.loads(os.pread(self._handle, 4096, 0))
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}

    def _busy(self) -> Busy:
        owner = self._owner()
        return self._busy_error(
            f"{self._cache} is being written by process {owner.get('pid', '?')} on "
            f"{owner.get('host', 'this machine')}",
            fix="wait until it has ended, or stop it; what it has committed is kept",
        )


def _let_go_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_child)
