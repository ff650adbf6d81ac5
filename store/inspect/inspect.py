"""The properties of a cache that need neither dataset, teacher nor torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teach_once.runtime.formats import counted, format_table
from teach_once.runtime.safe.text import one_line
from teach_once.store.errors import CacheError, CacheMissing, Fault
from teach_once.store.format.certificate import certificate_in, certificate_text
from teach_once.store.format.spec import SAMPLE_DIGEST
from teach_once.store.identity import distinguishing, field_of, identity_sha256
from teach_once.store.place.open import place_at
from teach_once.store.read.evaluation import evaluation_names
from teach_once.store.read.hdf5 import is_hdf5
from teach_once.store.read.reader import TeacherCache
from teach_once.store.read.source import Source, open_source


@dataclass(frozen=True)
class Overview:
    """One cache of a list. problem: the error when opening it; "" if there is none."""

    path: Path
    source: Source | None
    problem: str = ""

    @property
    def done(self) -> float:
        """Committed fraction of the planned chunks."""
        return 0.0 if self.source is None else self.source.coverage.fraction


def overviews(folder: Path) -> Iterator[Overview]:
    """List every cache directly below `folder`, by name: folders with a manifest, exported files.

    For a URL, it lists every prefix with a manifest.
    """
    place = place_at(folder)
    is_folder = place.is_local and folder.is_dir()
    files = {path.name for path in folder.iterdir() if path.is_file()} if is_folder else set()
    for path in (folder / name for name in sorted([*place.list_folders(), *files])):
        try:
            if path.name not in files or is_hdf5(path):
                yield Overview(path, open_source(path))
        except (CacheError, OSError) as error:
            if not isinstance(error, CacheMissing) or path.name in files:
                yield Overview(path, None, getattr(error, "problem", None) or str(error))


def details(path: Path) -> dict[str, Any]:
    """Return the manifest's content and the completeness as plain JSON values.

    Raises CacheError if the cache cannot be opened.
    """
    source = open_source(path)
    m = source.manifest
    records = m.num_views * m.num_samples
    taps = {
        name: {
            "shape": list(spec.shape),
            "dtype": spec.dtype,
            "scale": spec.scale,
            "top": spec.top,
            "bytes_per_record": spec.bytes_per_record,
            "bytes": spec.bytes_per_record * records,
        }
        for name, spec in m.taps.items()
    }
    return {
        "path": str(path),
        "teacher": m.teacher,
        "identity": m.identity,
        "identity_sha256": identity_sha256(m.identity),
        "num_samples": m.num_samples,
        "num_views": m.num_views,
        "block_rows": m.block_rows,
        "taps": taps,
        "bytes_per_record": m.record_bytes,
        "bytes": m.record_bytes * records,
        "complete": source.coverage.is_complete,
        "fraction_done": source.coverage.fraction,
        "measured": m.measured,
        "certificate": certificate_in(m.measured),
        "versions": m.versions,
        "classes": m.class_names,
        "evaluations": evaluation_names(path),
    }


@dataclass(frozen=True)
class MissingRecords:
    """The number of incomplete records, and the views and taps that will be added.

    new_taps: planned taps that views lack; empty if all taps lack the same blocks.
    """

    records: int
    new_views: int
    new_taps: tuple[str, ...]

    @property
    def growth(self) -> str:
        """The new views and taps in words; "" if only planned blocks are missing."""
        views = counted(self.new_views, "view") if self.new_views else ""
        return " and ".join(filter(None, [views, ", ".join(self.new_taps)]))


def missing_records(source: Source, num_views: int, taps: Collection[str]) -> MissingRecords:
    """Count the records that a pass for the first `num_views` views of these taps must compute."""
    m, coverage = source.manifest, source.coverage
    old_views, asked = min(num_views, m.num_views), {*taps, SAMPLE_DIGEST}
    absent = asked - m.stored.keys()  # unplanned taps lack every block
    lacks = coverage.lacking_any(asked, old_views) | bool(absent)
    rows = np.full(m.blocks_per_view, m.block_rows)
    rows[-1] = m.block(0, m.blocks_per_view - 1).rows
    records = int(lacks.sum(axis=0) @ rows) + (num_views - old_views) * m.num_samples
    lacking = absent | (asked & coverage.incomplete_taps(old_views))
    is_partial = not set(taps) <= lacking
    new_taps = sorted(set(taps) & lacking) if is_partial else []
    return MissingRecords(records, num_views - old_views, tuple(new_taps))


def describe_missing(source: Source, num: int) -> list[Fault]:
    """Describe the first `num` planned chunks that are not committed."""
    return [
        Fault("not committed", source.path, array, view, block)
        for array, view, block in source.coverage.first_missing(num)
    ]


def agreement(cache: TeacherCache, num_views: int) -> float:
    """Return the teacher's accuracy on the first `num_views` cached views, from 0 to 1."""

    def num_right(view: int) -> int:
        return int(cache.read_view(view, ["correct"])["correct"].sum())

    views, num_bytes = range(num_views), num_views * cache.num_samples
    right = sum(cache.source.at_once(num_right, views, num_bytes))
    return right / (num_views * cache.num_samples)


_HEADER = ["cache", "teacher", "dataset", "views", "samples", "size", "differs in", "state"]
_MOST_SETTINGS = 8  # per line


def list_text(caches: Iterable[Overview]) -> str:
    """Format a table with a line per cache and the settings that distinguish similar caches."""
    caches = list(caches)
    alike: dict[tuple[str, str], dict[Path, Mapping[str, Any]]] = {}  # (arch, dataset) -> caches
    for cache in caches:
        if cache.source is not None:
            identity = cache.source.manifest.identity
            columns = field_of(identity, "teacher", "arch"), field_of(identity, "dataset", "type")
            alike.setdefault(columns, {})[cache.path] = _not_in_columns(identity)
    settings: dict[Path, Sequence[str]] = {}
    for group in alike.values():
        settings |= zip(group, distinguishing(list(group.values())), strict=True)
    return format_table([_HEADER, *(_row(cache, settings.get(cache.path, ())) for cache in caches)])


def _row(cache: Overview, settings: Sequence[str]) -> list[str]:
    if cache.source is None:
        return [one_line(cache.path.name), *[""] * 6, f"unusable: {one_line(cache.problem)}"]
    m = cache.source.manifest
    size = m.record_bytes * m.num_views * m.num_samples
    return [
        one_line(cache.path.name),
        one_line(field_of(m.identity, "teacher", "arch")),
        one_line(field_of(m.identity, "dataset", "type")),
        str(m.num_views),
        f"{m.num_samples:,}",
        f"{size / 1e6:,.1f} MB",
        one_line(", ".join(_shortened(settings))),
        "complete" if cache.done == 1 else f"{100 * cache.done:.1f} % done",
    ]


def _not_in_columns(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without the fields that have their own columns."""
    shown = {"teacher": "arch", "dataset": "type"}
    return {
        key: {name: each for name, each in value.items() if name != shown.get(key)}
        if isinstance(value, Mapping)
        else value
        for key, value in identity.items()
    }


def _shortened(settings: Sequence[str]) -> list[str]:
    more = len(settings) - _MOST_SETTINGS
    return list(settings if more <= 1 else [*settings[:_MOST_SETTINGS], f"{more} more"])


def info_text(info: Mapping[str, Any]) -> str:
    """Format the lines of `python -m store info`. info: from `store.inspect.inspect.details`."""
    lines = [
        one_line(info["path"]),
        f"identity   {info['identity_sha256']}",
        *_flat(info["identity"]),
        f"size       {info['num_views']} views x {info['num_samples']:,} samples x "
        f"{info['bytes_per_record']:,} bytes = {info['bytes']:,} bytes, in blocks of "
        f"{info['block_rows']:,}",
    ]
    for name, tap in info["taps"].items():
        shape = "x".join(map(str, tap["shape"])) or "1"
        scale = f" with a scale per {tap['scale']}" if tap["scale"] else ""
        scale += f", the {tap['top']} largest" if tap["top"] else ""
        lines.append(
            f"  {name:<9}{shape:>14} {tap['dtype']}{scale}, {tap['bytes_per_record']:,} B per "
            f"record, {tap['bytes']:,} B in total"
        )
    state = "complete" if info["complete"] else f"{100 * info['fraction_done']:.1f} % done"
    lines.append(f"state      {state}")
    others = {k: v for k, v in info["measured"].items() if k not in info["certificate"]}
    lines += [f"{name:<22} {value:.4g}" for name, value in others.items()]
    lines += filter(None, [certificate_text(info["certificate"])])
    if info["evaluations"]:
        lines.append("evaluation " + ", ".join(info["evaluations"]))
    lines.append("made with  " + ", ".join(f"{k} {v}" for k, v in info["versions"].items()))
    return "\n".join(lines)


def _flat(mapping: Mapping[str, Any], prefix: str = "  ") -> list[str]:
    lines: list[str] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{one_line(key)}.")
        else:
            lines.append(f"{prefix}{one_line(key)}: {one_line(value)}")
    return lines
