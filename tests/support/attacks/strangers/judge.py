"""The guarantees of every command for any input; see `faults_of`."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from tests.support.attacks.strangers.sandbox import CRASHED, MEMORY_BYTES, Outcome
from tests.support.attacks.strangers.world import SECRET

_MOST_DISK_BYTES = 2**27
# Characters that move a cursor, recolor a terminal, or reverse the reading direction.
_ESCAPES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_STATUSES = (0, 1, 2)
Snapshot = dict[str, tuple[object, ...]]


def snapshot(folder: Path, with_content: bool) -> Snapshot:
    """Return type, size and modification time of every file inside; links are not followed."""
    found: Snapshot = {}
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(here, name)
            status = os.lstat(path)
            facts: tuple[object, ...] = (stat.S_IFMT(status.st_mode),)
            if not stat.S_ISDIR(status.st_mode):
                facts += (status.st_size, status.st_mtime_ns)
            if with_content and stat.S_ISREG(status.st_mode) and status.st_size < 2**20:
                facts += (hashlib.sha256(Path(path).read_bytes()).digest(),)
            found[os.path.relpath(path, folder)] = facts
    return found


def faults_of_ending(outcome: Outcome) -> Iterator[str]:
    """Yield faults of an ending: traceback, signal, hang, memory, escape sequences, exit status."""
    if outcome.is_timed_out or outcome.status is None:
        yield outcome.ending
    elif "Traceback (most recent call last)" in outcome.output or outcome.status == CRASHED:
        last = outcome.output.strip().splitlines()[-1:]
        yield f"traceback: {''.join(last)[:200]}"
    elif outcome.status not in _STATUSES:
        yield outcome.ending
    elif outcome.status == 2 and not re.search(r"error|Error|Usage", outcome.output):
        yield "exit 2 without an error message"
    if outcome.peak_bytes > MEMORY_BYTES:
        yield f"{outcome.peak_bytes / 2**20:,.0f} MiB of memory"
    if escape := _ESCAPES.search(outcome.output):
        start = max(0, escape.start() - 30)
        yield f"escape sequence in the output: {outcome.output[start : escape.end() + 10]!r}"
    if len(outcome.output) > 100_000:
        yield f"{len(outcome.output):,} characters of output"
    if SECRET in outcome.output:
        yield "shows the content of a foreign file"


def faults_in_folder(
    world: Path, before: Snapshot, after: Snapshot, writes: tuple[str, ...]
) -> Iterator[str]:
    """Yield faults in the folder: unexpected files, foreign bytes, a filled disk."""
    changed = [name for name in after if before.get(name) != after[name]]
    changed += [name for name in before if name not in after]
    for name in changed:
        if not any(name == place or name.startswith(f"{place}/") for place in writes):
            yield f"changes {name!r}"
    written = 0
    for name in changed:
        path = world / name
        if name in after and path.is_file() and not path.is_symlink():
            written += path.stat().st_blocks * 512
            if path.stat().st_size < 2**24 and SECRET.encode() in path.read_bytes():
                yield f"copies foreign bytes into {name!r}"
    if written > _MOST_DISK_BYTES:
        yield f"writes {written / 2**20:,.0f} MiB"


def faults_outside(before: Snapshot, after: Snapshot) -> Iterator[str]:
    changed = {name for name in {**before, **after} if before.get(name) != after.get(name)}
    yield from (f"touches {name!r} outside of the folder" for name in sorted(changed))
