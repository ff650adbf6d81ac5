"""Each document of the world with its changes and the commands that read it.

A LINE PER DOCUMENT: to add one, add a line to DOCUMENTS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.attacks.strangers.changes.arrays import chunk_changes
from tests.support.attacks.strangers.changes.change import (
    Change,
    Rewrites,
    byte_rewrites,
    rewriting,
)
from tests.support.attacks.strangers.changes.hdf5 import hdf5_changes
from tests.support.attacks.strangers.changes.images import image_changes
from tests.support.attacks.strangers.changes.packed import packed_changes
from tests.support.attacks.strangers.changes.places import new_file_changes, place_changes
from tests.support.attacks.strangers.changes.run_seals import (
    seal_checkpoint,
    seal_metrics,
    seal_run,
    seal_summary,
    seal_weights,
)
from tests.support.attacks.strangers.changes.seals import (
    Seal,
    seal_hdf5_cache,
    seal_journal,
    seal_manifest,
    seal_zarr_json,
)
from tests.support.attacks.strangers.changes.tensors import tensor_changes
from tests.support.attacks.strangers.changes.trees import json_rewrites, line_rewrites
from tests.support.attacks.strangers.changes.yaml_texts import yaml_changes

Changes = Callable[[Path], Iterable[Change]]


@dataclass(frozen=True)
class Document:
    """A document of the world.

    pattern: its path; the first match is used. commands: names of the commands that read it.
    is_typed: the user names this folder, so that a link in its place is followed.
    """

    name: str
    pattern: str
    changes: Changes
    commands: tuple[str, ...]
    is_typed: bool = False

    def path(self, world: Path) -> Path:
        """Return its path; for a missing document, the path it would have."""
        folder, _, last = self.pattern.rpartition("/")
        found = sorted(world.glob(self.pattern))
        return found[0] if found else sorted(world.glob(folder))[0] / last


def _json(rewrites: Callable[[bytes], Rewrites], seal: Seal | None = None) -> Changes:
    def changes(file: Path) -> Iterator[Change]:
        for kind, name, rewrite in rewrites(file.read_bytes()):
            yield Change(kind, name, rewriting(rewrite))
            if seal is not None and kind != "flip":
                yield Change(kind, f"{name}, sealed", _sealed(rewriting(rewrite), seal), True)
        yield from place_changes(is_folder=False)

    return changes


def _tensors(seal: Seal) -> Changes:
    def changes(file: Path) -> Iterator[Change]:
        yield from tensor_changes(file)
        for change in tensor_changes(file, seal):
            if change.is_sealed:
                yield dataclasses.replace(change, name=f"{change.name}, sealed")

    return changes


def _sealed(apply: Callable[[Path], None], seal: Seal) -> Callable[[Path], None]:
    def both(path: Path) -> None:
        apply(path)
        seal(path)

    return both


def _hdf5_cache(file: Path) -> Iterable[Change]:
    return hdf5_changes(file, seal_hdf5_cache, _nested_manifest(file))


def _nested_manifest(file: Path) -> Rewrites:
    import h5py

    with h5py.File(file) as content:
        text = bytes(content["manifest"][()])
    yield from json_rewrites(text)


def _folder(file: Path) -> Iterable[Change]:
    return place_changes(is_folder=True)


def _bytes_of_file(file: Path) -> Iterable[Change]:
    for kind, name, rewrite in byte_rewrites(file.read_bytes()):
        yield Change(kind, name, rewriting(rewrite))
    yield from place_changes(is_folder=False)


def _new(file: Path) -> Iterable[Change]:
    return new_file_changes()


_LOOK = ("store list", "store info", "store info --json", "store check")
_CACHE = (
    *_LOOK,
    "store export",
    "store trim",
    "store convert",
    "precompute",
    "precompute --plan",
    "verify",
)
_TRAIN = ("train student ce", "train student kd", "train plan")
_EVERY = (*_CACHE, *_TRAIN, "store info --plot")
_PLOTTED = (*_CACHE, "store info --plot")
_H5 = ("store check h5", "store info h5", "store import", "store list h5", "train plan h5")
_PIXELS, _ENCODED = ("precompute pixels",), ("precompute encoded", "pack again")
_IMAGES = ("pack images", "pack images encoded")
_FINISHED = ("train student ce", "train runs", "report", "train export", "train plan")
_KD, _CD = ("train student kd", "train runs"), ("train student cd", "train runs")
_WEIGHTS = ("train teacher", "precompute --plan", "verify", "train student live")
_TEACHER = ("precompute --plan", "train plan", "configs teacher")
_STUDENT = ("train plan", "configs student", "train student ce")
_AGAIN = ("train export again", "train verify")

_manifest, _lines = _json(json_rewrites, seal_manifest), _json(line_rewrites, seal_journal)
_metadata, _plain = _json(json_rewrites, seal_zarr_json), _json(json_rewrites)
_run, _summary = _json(json_rewrites, seal_run), _json(json_rewrites, seal_summary)
_metrics = _json(line_rewrites, seal_metrics)
_weights, _checkpoint = _tensors(seal_weights), _tensors(seal_checkpoint)
_halves, _floats, _bytes = chunk_changes("<f2"), chunk_changes("<f4"), chunk_changes("u1")

DOCUMENTS = (
    Document("manifest", "caches/*/manifest.json", _manifest, _EVERY),
    Document("journal", "caches/*/journal/*.jsonl", _lines, _CACHE),
    Document("job list", "caches/*/journal/job.json", _new, _CACHE),
    Document("another journal", "caches/*/journal/000002-0000.jsonl", _new, _CACHE),
    Document("lock of a cache", "caches/*/writer.lock", _new, _CACHE),
    Document("metadata to come", "caches/*/teacher.zarr/logits/zarr.json.next", _new, _CACHE),
    Document("group metadata", "caches/*/teacher.zarr/zarr.json", _metadata, _CACHE),
    Document("metadata", "caches/*/teacher.zarr/logits/zarr.json", _metadata, _CACHE),
    Document("metadata of labels", "caches/*/teacher.zarr/labels/zarr.json", _metadata, _CACHE),
    Document("metadata of a scale", "caches/*/*/stage1.scale/zarr.json", _metadata, _CACHE),
    Document("chunk of logits", "caches/*/teacher.zarr/logits/c.0.1.0", _halves, _PLOTTED),
    Document("chunk of codes", "caches/*/teacher.zarr/stage1/c.1.0.0", _bytes, _CACHE),
    Document("chunk of a scale", "caches/*/*/stage1.scale/c.0.0.0.0", _floats, _CACHE),
    Document("chunk of correct", "caches/*/teacher.zarr/correct/c.0.0", _bytes, _CACHE),
    Document("chunk of attention", "caches/*/teacher.zarr/attention1/c.0.0.0", _halves, _CACHE),
    Document("labels", "caches/*/*/labels/c.0", chunk_changes("<i8"), _PLOTTED),
    Document("preview", "caches/*/teacher.zarr/preview/c.*", _bytes, _CACHE),
    Document("sample digests", "caches/*/*/sample_digest/c.0.0", chunk_changes("|u1"), _CACHE),
    Document("folder of caches", "caches", _folder, (*_CACHE, *_TRAIN), True),
    Document("folder of a cache", "caches/*", _folder, (*_CACHE, *_TRAIN), True),
    Document("zarr group", "caches/*/teacher.zarr", _folder, _CACHE),
    Document("folder of an array", "caches/*/teacher.zarr/logits", _folder, _CACHE),
    Document("folder of the journal", "caches/*/journal", _folder, _CACHE),
    Document("HDF5 cache", "cache.h5", _hdf5_cache, _H5),
    Document("packed pixels", "pixels.h5", packed_changes, _PIXELS),
    Document("packed files", "encoded.h5", packed_changes, _ENCODED),
    Document("picture", "images/train/cat/00.png", image_changes, _IMAGES),
    Document("class of pictures", "images/train/cat", _folder, _IMAGES),
    Document("folder of pictures", "images", _folder, _IMAGES),
    Document("run.json", "runs/s/ce-*/run.json", _run, _FINISHED),
    Document("summary.json", "runs/s/ce-*/summary.json", _summary, _FINISHED),
    Document("metrics.jsonl", "runs/s/ce-*/metrics.jsonl", _metrics, _FINISHED),
    Document("best.pt", "runs/s/ce-*/best.pt", _weights, ("train export", "train runs")),
    Document("last.pt", "runs/s/ce-*/last.pt", _weights, ("train export last", "report")),
    Document("folder of runs", "runs", _folder, _FINISHED, True),
    Document("folder of a student", "runs/s", _folder, _FINISHED, True),
    Document("folder of a run", "runs/s/ce-*", _folder, _FINISHED),
    Document("folder of an interrupted run", "runs/s/kd-*", _folder, _KD),
    Document("lock of a run", "runs/s/kd-*/writer.lock", _new, _KD),
    Document("events", "runs/s/kd-*/tensorboard", _folder, _KD),
    Document("checkpoint after an epoch", "runs/s/kd-*/checkpoint.pt", _checkpoint, _KD),
    Document("checkpoint within an epoch", "runs/s/cd-*/checkpoint.pt", _checkpoint, _CD),
    Document("run.json, interrupted", "runs/s/kd-*/run.json", _run, _KD),
    Document("metrics.jsonl, interrupted", "runs/s/kd-*/metrics.jsonl", _metrics, _KD),
    Document("best.pt, interrupted", "runs/s/kd-*/best.pt", tensor_changes, _KD),
    Document("weights", "teacher.pt", _weights, _WEIGHTS),
    Document("summary of the weights", "teacher.training/summary.json", _summary, _WEIGHTS),
    Document("run.json of the weights", "teacher.training/run.json", _run, _WEIGHTS),
    Document("folder of the weights' training", "teacher.training", _folder, _WEIGHTS),
    Document("export card", "exported/student.json", _summary, _AGAIN),
    Document("exported weights", "exported/student.pt", tensor_changes, _AGAIN),
    Document("exported program", "exported/student.pt2", _bytes_of_file, _AGAIN),
    Document("folder of an export", "exported", _folder, _AGAIN, True),
    Document("teacher's config", "t.yaml", yaml_changes, _TEACHER),
    Document("student's config", "s.yaml", yaml_changes, _STUDENT),
)
