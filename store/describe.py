"""Caches in words: the lines of `python -m store list` and `info`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runtime.formats import format_table
from runtime.text import one_line
from store.certificate import certificate_text
from store.differences import distinguishing
from store.identity import field_of
from store.look import Overview

_HEADER = ["cache", "teacher", "dataset", "views", "samples", "size", "differs in", "state"]
_MOST_SETTINGS = 8  # of a line


def list_text(caches: Iterable[Overview]) -> str:
    """A table with a line per cache, which ends with what tells it from the other caches."""
    caches = list(caches)
    sources = [cache.source for cache in caches if cache.source is not None]
    found = iter(distinguishing([_not_in_columns(each.manifest.identity) for each in sources]))
    settings = [[] if cache.source is None else next(found) for cache in caches]
    return format_table([_HEADER, *map(_row, caches, settings)])


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
    """Return an identity without what the list has columns of."""
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
    """The lines of `python -m store info`. info: from `store.look.details`."""
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
