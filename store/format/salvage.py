"""Recover the content of a cache whose manifest cannot be read, from its zarr.json files.

A new manifest must plan everything that exists: one made from a config with fewer views or taps
would lose the others. Without the manifest a zarr.json has no checksum, so the number of views and
the block size are taken from the majority of the files. Only the manifest contains the stage of a
hint. It follows from the hint's number of channels if exactly one stage has this number; otherwise
it is an error.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from teach_once.runtime.safe.safe_read import BadFile, is_out_of_resources, parse_json
from teach_once.store.errors import CacheMismatch
from teach_once.store.format.spec import (
    CLASS,
    LABELS,
    PREVIEW,
    REST,
    SAMPLE_DIGEST,
    ZARR_GROUP,
    TapSpec,
    next_path,
    tap_of,
)
from teach_once.store.identity import is_tap_name

_MOST_VIEWS, _MOST_ROWS = 10**6, 2**30
_FLOATS = ("float16", "float32")


@dataclass(frozen=True)
class Salvaged:
    """The recovered content. num_views, block_rows: None if no file states them.

    taps: the taps whose form is known.
    """

    num_views: int | None
    block_rows: int | None
    taps: Mapping[str, TapSpec]


class _Array(NamedTuple):
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str


def salvage(
    cache: Path,
    names: Collection[str],
    read: Callable[[str], bytes | None],
    stages: Mapping[str, TapSpec],
    num_samples: int,
    num_classes: int,
) -> Salvaged:
    """Return the form of the arrays `names` of the group.

    read: returns the bytes of a file of the cache; None if it is missing. stages: the requested
    taps. Raises CacheMismatch if the stage of a hint cannot be determined.
    """
    wanted = set(names) - {LABELS, PREVIEW}
    arrays = {n: array for n in sorted(wanted) if (array := _array(cache, n, read)) is not None}
    of_samples = arrays.pop(SAMPLE_DIGEST, None)
    fitting = {n: a for n, a in arrays.items() if len(a.shape) >= 2 and a.chunks[0] == 1}
    rows = [a.chunks[1] for n, a in fitting.items() if not n.endswith(".scale")]
    rows += [of_samples.chunks[0]] if of_samples is not None else []
    taps = {}
    for tap in dict.fromkeys(map(tap_of, fitting)):
        if is_tap_name(tap) and (spec := _tap(tap, fitting, num_samples, num_classes)) is not None:
            taps[tap] = spec if tap != "hint" else _with_stage(cache, spec, stages)
    return Salvaged(
        _most_common(a.shape[0] for a in fitting.values() if a.shape[0] <= _MOST_VIEWS),
        _most_common(r for r in rows if r <= _MOST_ROWS and r.bit_count() == 1),
        taps,
    )


def _most_common(values: Any) -> int | None:
    found = Counter(values).most_common(1)
    return int(found[0][0]) if found else None


def _array(cache: Path, name: str, read: Callable[[str], bytes | None]) -> _Array | None:
    """Return the content of an array's zarr.json, or of its successor."""
    file = Path(ZARR_GROUP, name, "zarr.json")
    for each in (file, next_path(file)):
        try:
            text = read(str(each))
            if text is not None:
                return _parsed(parse_json(text, cache / each))
        except (OSError, BadFile, KeyError, TypeError, ValueError) as error:
            if is_out_of_resources(error):
                raise
    return None


def _parsed(found: Any) -> _Array:
    """Parse the document. Raises KeyError, TypeError or ValueError if it has another form."""
    shape, dtype = found["shape"], found["data_type"]
    chunks = found["chunk_grid"]["configuration"]["chunk_shape"]
    sizes = [*shape, *chunks]
    if any(type(size) is not int or size < 1 for size in sizes) or len(shape) != len(chunks):
        raise ValueError("sizes")
    if type(dtype) is not str or not shape:
        raise ValueError("dtype")
    return _Array(tuple(shape), tuple(chunks), dtype)


def _tap(
    tap: str, arrays: Mapping[str, _Array], num_samples: int, num_classes: int
) -> TapSpec | None:
    """Return the form of a tap; None if its arrays do not fit together."""
    values, scale = arrays.get(tap), arrays.get(f"{tap}.scale")
    if values is None or values.shape[1] != num_samples:
        return None
    shape = values.shape[2:]
    if {tap + CLASS, tap + REST} <= arrays.keys():
        is_cut = values.dtype in _FLOATS and len(shape) == 1 and shape[0] < num_classes
        return TapSpec((num_classes,), values.dtype, top=shape[0]) if is_cut else None
    if scale is not None:
        kind = "row" if scale.shape[1:] == (num_samples, 2) else "block"
        return TapSpec(shape, values.dtype, kind) if values.dtype == "uint8" else None
    plain = ("uint8",) if tap == "correct" else _FLOATS
    return TapSpec(shape, values.dtype) if values.dtype in plain else None


def _with_stage(cache: Path, hint: TapSpec, stages: Mapping[str, TapSpec]) -> TapSpec:
    found = [
        name
        for name, spec in stages.items()
        if name.startswith("stage") and spec.shape == hint.shape[:1]
    ]
    if len(found) != 1:
        folder = cache / ZARR_GROUP / "hint"
        raise CacheMismatch(
            f"the manifest of {cache} is damaged, and only it named the stage of {folder}",
            fix=f"remove it ({shlex.join(['rm', '-r', str(folder)])}), then run again",
        )
    return TapSpec(hint.shape, hint.dtype, stage=found[0])
