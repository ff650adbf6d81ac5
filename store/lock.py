"""One writer, or one job of several, at a time: an advisory lock that dies with its owner.

The first process of a job takes the lock alone, prepares the cache and says what is to be done;
then it lets the other processes of the same job in. `flock` keeps the lock, so whatever becomes of
a process its hold is gone with it. Works on local file systems and on NFS mounts that support
`flock`; where a file system supports none, opening for writing fails.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from store.errors import CacheBusy

LOCK_FILE = "writer.lock"
_PATIENCE_SECONDS = 600.0  # for the first process of the same job to get the cache ready
_START_SECONDS = 3.0  # in which it must have put its name into the lock file


@dataclass(frozen=True)
class Job:
    """Processes that were started together: a name they share, their number, this one's rank."""

    name: str = ""
    rank: int = 0
    world: int = 1


class WriterLock:
    """A hold on a cache's folder; `leader` is True for the process that came first."""

    def __init__(self, cache: Path, job: Job) -> None:
        """Take the lock, or wait for the leader of the same job. Raises CacheBusy."""
        self._cache, self._job = cache, job
        self._handle = os.open(cache / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self.leader = self._try(fcntl.LOCK_EX)
            if self.leader:
                self._sign()
            else:
                self._join()
        except BaseException:
            os.close(self._handle)
            raise

    def let_others_in(self) -> None:
        """The leader is done preparing: the job's other processes may go on."""
        if self._job.world > 1:
            fcntl.flock(self._handle, fcntl.LOCK_SH)

    def alone(self) -> bool:
        """Whether all the others have gone; if so nobody else can come in any more.

        If not, this process's own hold is gone.
        """
        return self._try(fcntl.LOCK_EX)

    def release(self) -> None:
        os.close(self._handle)

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _sign(self) -> None:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "job": self._job.name}
        text = json.dumps(owner).encode()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, text, 0)

    def _join(self) -> None:
        started = time.monotonic()
        while not self._same_job():
            if self._job.world == 1 or time.monotonic() - started > _START_SECONDS:
                raise self._busy()
            time.sleep(0.05)
        while not self._try(fcntl.LOCK_SH):
            if time.monotonic() - started > _PATIENCE_SECONDS:
                raise self._busy()
            time.sleep(0.05)

    def _same_job(self) -> bool:
        return self._job.world > 1 and self._owner().get("job") == self._job.name

    def _owner(self) -> dict[str, object]:
        try:
            owner = json.loads(os.pread(self._handle, 4096, 0))
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}

    def _busy(self) -> CacheBusy:
        owner = self._owner()
        return CacheBusy(
            f"{self._cache} is being written by process {owner.get('pid', '?')} on "
            f"{owner.get('host', 'this machine')}",
            fix="wait until it has ended, or stop it; what it has committed is kept",
        )
