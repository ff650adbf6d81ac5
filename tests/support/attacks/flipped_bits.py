"""python -m tests.support.attacks.flipped_bits [--most 2000] [--only WORD] [--seed 0]

Flips single bits of every kind of file, one at a time, and reads the file again. The flip must be
noticed (an error or a reported fault) or harmless (readers get the same content). Prints a table
for the security page; the exit status is 1 if other content is accepted. --most: number of evenly
spaced bits to flip in larger files; 0 flips all. A LINE PER KIND: to add one, add a line to
FLIPPED.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import mmap
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teach_once.nets.weights.files import read_tensors
from teach_once.report.runs import results_in
from teach_once.runtime.errors import UserError
from teach_once.store import TeacherCache
from teach_once.store.inspect.inspect import details
from teach_once.train.engine.train_state import TrainState
from teach_once.train.recording.checkpoint import read_checkpoint, restore
from teach_once.train.recording.export import _intact_weights
from teach_once.train.recording.exported import verify_export
from teach_once.train.runs.folder import runs_in
from teach_once.train.runs.study import Run
from teach_once.train.sessions.student import open_context
from teach_once.views.packed.read import packed
from tests.support.attacks.strangers.oracle import arrays_of
from tests.support.attacks.strangers.sandbox import run_limited
from tests.support.attacks.strangers.world import copy_world, make_world, study_of

NOTICED, HARMLESS, FALSE, CRASH = range(4)
_BATCH = 250  # flips in one process


@dataclass(frozen=True)
class Flipped:
    """A kind of file whose bits are flipped.

    name: of the kind. pattern: its path in the world. content: returns everything that a reader
    gets, as plain values; raises UserError if it notices damage. harmless: why a flip may change
    nothing.
    """

    name: str
    pattern: str
    content: Callable[[Path], Any]
    harmless: str = ""


@dataclass(frozen=True)
class Count:
    """Numbers of a file's bits: all, flipped, noticed and harmless, with the false ones."""

    bits: int
    tried: int
    noticed: int
    harmless: int
    false: list[str]


def count_flips(flipped: Flipped, world: Path, most: int, seed: int = 0) -> Count:
    """Flip each bit, read, and flip it back, in other processes, which a flip may end or hang."""
    file = sorted(world.glob(flipped.pattern))[0]
    bits = file.stat().st_size * 8
    chosen = list(_positions(bits, most, seed))
    usual = _copied(flipped.content(world))
    found: Counter[int] = Counter()
    false: list[str] = []
    while chosen:
        batch, chosen = chosen[:_BATCH], chosen[_BATCH:]
        results, ending = _tried(flipped, world, file, usual, batch)
        found.update(results)
        pairs = zip(batch, results, strict=False)
        false += [_told(bit, result) for bit, result in pairs if result == FALSE]
        if len(results) < len(batch):
            found[CRASH] += 1
            false.append(f"{_told(batch[len(results)], CRASH)}: {ending}")
            chosen = batch[len(results) + 1 :] + chosen
    return Count(bits, found.total(), found[NOTICED], found[HARMLESS], false)


def _positions(bits: int, most: int, seed: int) -> Iterator[int]:
    """Yield all positions, or a random one in each of `most` equal parts."""
    if not most or bits <= most:
        yield from range(bits)
        return
    chance = random.Random(seed)
    for part in range(most):
        start, stop = part * bits // most, (part + 1) * bits // most
        yield chance.randrange(start, stop)


def _told(bit: int, result: int) -> str:
    what = "other content" if result == FALSE else "no end of ours"
    return f"byte {bit // 8} bit {bit % 8} gives {what}"


def _tried(
    flipped: Flipped, world: Path, file: Path, usual: Any, bits: Sequence[int]
) -> tuple[list[int], str]:
    """Return the outcome of each flip that the process reached, and how the process ended."""
    shared = mmap.mmap(-1, len(bits))
    shared.write(b"\xff" * len(bits))

    def work() -> int:
        for number, bit in enumerate(bits):
            with _flip(file, bit):
                shared[number] = _outcome(flipped, world, usual)
        return 0

    content = file.read_bytes()
    outcome = run_limited(work, world, seconds=120, cpu_seconds=120)
    file.write_bytes(content)
    results = [value for value in shared[:] if value != 0xFF]
    return results, f"{outcome.ending} {outcome.output[-200:]}"


class _flip:
    """Flip a bit while the context is open."""

    def __init__(self, file: Path, bit: int) -> None:
        self._file, self._place, self._mask = file, bit // 8, 1 << bit % 8

    def __enter__(self) -> None:
        self._turn()

    def __exit__(self, *error: object) -> None:
        self._turn()

    def _turn(self) -> None:
        handle = os.open(self._file, os.O_RDWR)
        (byte,) = os.pread(handle, 1, self._place)
        os.pwrite(handle, bytes([byte ^ self._mask]), self._place)
        os.close(handle)


def _outcome(flipped: Flipped, world: Path, usual: Any) -> int:
    try:
        return HARMLESS if _same(_copied(flipped.content(world)), usual) else FALSE
    except UserError:
        return NOTICED


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(
            one, other, equal_nan=one.dtype.kind == "f"
        )
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


# ---- the content that readers get


class _Reported(UserError):
    """A fault that a command reports without an error."""


def _cache(path: Path) -> Any:
    opened = TeacherCache.open(path)
    if opened.faults() or opened.source.unreadable_lines:
        raise _Reported("check")
    return dict(arrays_of(path)), details(path)


def _folder(world: Path) -> Any:
    (cache,) = (world / "caches").glob("t-*")
    return _cache(cache)


def _hdf5(world: Path) -> Any:
    return _cache(world / "cache.h5")


def _images(name: str) -> Callable[[Path], Any]:
    def content(world: Path) -> Any:
        source = packed(world / name)
        splits = [(each.labels, each.loaded) for each in (source.train, source.test)]
        ids = np.arange(len(source.train))
        digests = source.digest_of(ids), source.digest_of(ids[:3]), source.test_digest()
        return source.class_names, splits, digests, source.type

    return content


def _weights(pattern: str) -> Callable[[Path], Any]:
    def content(world: Path) -> Any:
        return read_tensors(sorted(world.glob(pattern))[0])

    return content


def _run(world: Path) -> Any:
    """Return the values of a finished run in tables and the report."""
    folder = world / "runs" / "s"
    found = [run for run in runs_in(folder) if run.label == "ce"]
    if not found or found[0].summary is None:
        raise _Reported("not finished")
    results = results_in(folder)
    if results.left_out:
        raise _Reported("left out")
    return found[0].identity, found[0].summary, [r for r in results.results if r.method == "ce"]


def _trained(name: str) -> Callable[[Path], Any]:
    """Return a reader of a finished run's weights, as used by an export."""

    def content(world: Path) -> Any:
        return read_tensors(_intact_weights(study_of(world).run("ce", 0), name))

    return content


def _checkpoint(method: str) -> Callable[[Path], Any]:
    """Return a reader of a run's progress and its state."""

    def content(world: Path) -> Any:
        run, train_state = _train_state(world, method)
        file = run.folder / "checkpoint.pt"
        if (state := read_checkpoint(file, run.sha256)) is None:
            raise _Reported("begins again")
        progress = restore(state, train_state, file)
        return dataclasses.asdict(progress), train_state.state_dict()

    return content


def _export(world: Path) -> Any:
    """Read an export as `python -m train verify` does, which compares the sha256 of its files."""
    return verify_export(world / "exported")


@functools.cache
def _train_state(world: Path, method: str) -> tuple[Run, TrainState]:
    run = study_of(world).run(method, 0)
    context = open_context(run, torch.device("cpu"))
    context.teacher.close()
    return run, context.train_state


def _copied(content: Any) -> Any:
    """Copy tensors of a train state, which change with the next checkpoint that is read."""
    if isinstance(content, dict):
        return {key: _copied(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_copied(value) for value in content]
    return content.clone() if isinstance(content, torch.Tensor) else content


_HDF5 = "HDF5 bytes that the project does not read"
_ZIP = "zip fields that are not read"
_ZARR = "caches/*/teacher.zarr"
FLIPPED = (
    Flipped("manifest.json", "caches/*/manifest.json", _folder, "white space"),
    Flipped("journal line", "caches/*/journal/*.jsonl", _folder),
    Flipped("zarr.json of the group", f"{_ZARR}/zarr.json", _folder),
    Flipped("zarr.json of an array", f"{_ZARR}/logits/zarr.json", _folder),
    Flipped("chunk of logits", f"{_ZARR}/logits/c.0.1.0", _folder),
    Flipped("chunk of codes", f"{_ZARR}/stage1/c.0.0.0", _folder),
    Flipped("chunk of scales", f"{_ZARR}/stage1.scale/c.0.0.0.0", _folder),
    Flipped("labels", f"{_ZARR}/labels/c.0", _folder),
    Flipped("preview", f"{_ZARR}/preview/c.0.0.0.0", _folder),
    Flipped("sample digests", f"{_ZARR}/sample_digest/c.0.0", _folder),
    Flipped("cache as .h5", "cache.h5", _hdf5, _HDF5),
    Flipped("packed pixels", "pixels.h5", _images("pixels.h5"), _HDF5),
    Flipped("packed files", "encoded.h5", _images("encoded.h5"), _HDF5),
    Flipped("run.json", "runs/s/ce-*/run.json", _run, "white space"),
    Flipped("summary.json", "runs/s/ce-*/summary.json", _run, "white space"),
    Flipped("metrics.jsonl", "runs/s/ce-*/metrics.jsonl", _run),
    Flipped("best.pt", "runs/s/ce-*/best.pt", _trained("best")),
    Flipped("last.pt", "runs/s/ce-*/last.pt", _trained("last")),
    Flipped("checkpoint.pt", "runs/s/kd-*/checkpoint.pt", _checkpoint("kd"), _ZIP),
    Flipped("checkpoint.pt within an epoch", "runs/s/cd-*/checkpoint.pt", _checkpoint("cd"), _ZIP),
    Flipped("exported card", "exported/student.json", _export, "white space"),
    Flipped("exported weights", "exported/student.pt", _export),
    Flipped("exported program", "exported/student.pt2", _export),
    Flipped("weights", "teacher.pt", _weights("teacher.pt"), _ZIP),
)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--most", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds with this word in their names")
    parser.add_argument("--folder", help="for temporary files")
    parser.add_argument("--world", type=Path, help="an existing world")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    status = 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        world = copy_world(
            options.world or make_world(Path(folder) / "template"), Path(folder) / "flipped"
        )
        print("| file | bits | flipped | noticed | harmless | accepted as other content |")
        print("| --- | --- | --- | --- | --- | --- |")
        for flipped in (each for each in FLIPPED if options.only in each.name):
            count = count_flips(flipped, world, options.most, options.seed)
            why = f" ({flipped.harmless})" if count.harmless and flipped.harmless else ""
            print(
                f"| {flipped.name} | {count.bits:,} | {count.tried:,} | {count.noticed:,} | "
                f"{count.harmless:,}{why} | {len(count.false):,} |",
                flush=True,
            )
            print("".join(f"  {each}\n" for each in count.false[:10]), end="", file=sys.stderr)
            status = 1 if count.false else status
    return status


if __name__ == "__main__":
    sys.exit(main())
