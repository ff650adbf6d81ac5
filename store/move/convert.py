"""Make a smaller cache from a full one without the teacher: fewer logits, coarser means.

The new cache's identity contains its origin, because its records may differ from those of a pass:
the values were first rounded to the old cache's dtypes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from teach_once.store.errors import CacheError, fixes_spelled_by
from teach_once.store.format.certificate import RANGES, Comparison, certified_blocks
from teach_once.store.format.content import CacheContent
from teach_once.store.format.manifest import MAX_CUT_CLASSES
from teach_once.store.format.spec import SAMPLE_DIGEST, TapSpec, kind_of
from teach_once.store.identity import CONVERTED_FROM, Identity
from teach_once.store.read.reader import TeacherCache
from teach_once.store.write.writer import CacheWriter

_COARSER = {"float32": ("float16", "uint8"), "float16": ("uint8",), "uint8": ()}


def convert_cache(
    path: Path,
    dest: Path,
    *,
    logits: str | None = None,
    channel_means: str | None = None,
    on_block: Callable[[int], None] = lambda rows: None,
) -> TeacherCache:
    """Convert the complete cache at `path` into the folder `dest` and return it opened.

    logits: "float16", "uint8" or "top:32"; means: "float16" or "uint8"; None: unchanged. on_block:
    called with the number of rows of each written block. Resumes an interrupted conversion. Raises
    CacheError.
    """
    old = TeacherCache.open(path)
    old.spell = partial(_pass_of, old)
    taps = converted_taps(old, logits, channel_means)
    if taps == old.taps:
        raise CacheError(
            f"{path} has these types already", fix="--logits top:32, --channel-means uint8 or both"
        )
    block_rows = old.manifest.block_rows
    with (
        fixes_spelled_by(_run_again),
        CacheWriter.open(dest, _content(old, taps), block_rows=block_rows) as writer,
    ):
        for item in writer.work:
            records = old.read_block(item.block, [tap for tap in item.taps if tap != SAMPLE_DIGEST])
            records[SAMPLE_DIGEST] = old.sample_digest[item.block.start : item.block.stop]
            writer.write_block(item.block, records)
            on_block(item.block.rows)
        measured = {key: each for key, each in old.measured.items() if key not in RANGES}
        writer.finish({**measured, **_certificate(old, TeacherCache.open(dest))})
    return TeacherCache.open(dest)


def _pass_of(old: TeacherCache, overrides: Sequence[str]) -> str:
    """Return the command that repairs the original cache."""
    fix = old.source.fix
    return fix if isinstance(fix, str) else str(dataclasses.replace(fix, full_check=False))


def _run_again(overrides: list[str]) -> str:
    """Return the command that resumes a conversion, which no pass of the teacher can do."""
    return "run the same command again"


def converted_taps(old: TeacherCache, logits: str | None, means: str | None) -> dict[str, TapSpec]:
    """Return the taps of the new cache. Raises CacheError if the old one lacks their source."""
    return {
        name: _logits_as(spec, logits)
        if name == "logits" and logits
        else _coarser(name, spec, means, "block")
        if kind_of(name) == "stage" and means
        else spec
        for name, spec in old.taps.items()
    }


def _logits_as(spec: TapSpec, asked: str) -> TapSpec:
    if not asked.startswith("top:"):
        return _coarser("logits", spec, asked, "row")
    digits, (num_classes,) = asked.removeprefix("top:"), spec.shape
    top = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 7 else 0
    if not 0 < top < num_classes <= MAX_CUT_CLASSES or (spec.top or num_classes) < top:
        most = spec.top or num_classes - 1
        raise CacheError(
            f"--logits {asked}: the cache has {num_classes:,} classes", fix=f"1 to {most:,}"
        )
    return TapSpec(spec.shape, "float16", top=top)


def _coarser(name: str, spec: TapSpec, asked: str, scale: str) -> TapSpec:
    if spec.top or asked not in (spec.dtype, *_COARSER[spec.dtype]):
        known = ", ".join(_COARSER[spec.dtype]) or "nothing smaller"
        raise CacheError(f"{name} is stored as {spec.dtype}, and cannot become {asked}", fix=known)
    return TapSpec(spec.shape, asked, scale if asked == "uint8" else None)


def converted_identity(old: Identity, taps: Mapping[str, TapSpec]) -> Identity:
    """Return the identity of a cache with these taps, made from one with the identity `old`."""
    types = dict(old["taps"])
    for name, spec in taps.items():
        kind = {"logits": "logits", "stage": "channel_means"}.get(kind_of(name))
        if kind:
            types[kind] = {"top_k": spec.top} if spec.top else spec.dtype
    origin = old.get(CONVERTED_FROM, old["taps"])
    return {**old, "taps": types, CONVERTED_FROM: origin}


def _content(old: TeacherCache, taps: Mapping[str, TapSpec]) -> CacheContent:
    m = old.manifest
    return CacheContent(
        teacher=m.teacher,
        identity=converted_identity(m.identity, taps),
        taps=taps,
        num_samples=m.num_samples,
        labels=old.labels,
        num_views=m.num_views,
        class_names=m.class_names,
        canary=m.canary,
        preview=old.preview,
        versions=m.versions,
    )


def _certificate(old: TeacherCache, new: TeacherCache) -> dict[str, float]:
    """Measure the loss of the conversion on some of the records."""
    taps = [tap for tap in new.taps if new.taps[tap] != old.taps[tap]]
    comparison = Comparison()
    for block in certified_blocks(old.manifest.blocks()):
        whole = old.manifest.block(block.view, block.index)
        full, stored = (cache.read_block(whole, taps) for cache in (old, new))
        first = slice(block.rows)
        comparison.add(
            {tap: values[first] for tap, values in full.items()},
            {tap: values[first] for tap, values in stored.items()},
        )
    return comparison.figures()
