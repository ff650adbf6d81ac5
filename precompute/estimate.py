"""Estimate the disk space of a cache from a teacher's config, without data or weights.

The network is built with fresh weights and run on a blank image to find the shapes of its outputs.
Time and memory are not estimated, because they must be measured on images; see `precompute.plan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from teach_once.configs.load import ConfigError
from teach_once.configs.schema import TapsConfig, TeacherConfig, TopLogits
from teach_once.nets.teacher.taps import Tap, taps_asked, teacher_stages
from teach_once.precompute.compute.setup import tap_spec
from teach_once.runtime.formats import format_size, format_table
from teach_once.store.format.manifest import MAX_CUT_CLASSES
from teach_once.store.format.spec import TapSpec, default_block_rows
from teach_once.views.augment.augment import view_shape

_TOP = 32
Shapes = dict[Tap, tuple[int, ...]]


def estimate_lines(
    config: TeacherConfig, num_samples: int, num_classes: int, image_px: int | None
) -> list[str]:
    """Return a table of the size of records, for the config's taps and for other dtypes.

    image_px: side of the dataset's images, if the views have the images' size. Raises ConfigError,
    ArchError or TapError.
    """
    shape = _view_shape(config, image_px)
    shapes = _tap_shapes(config, num_classes, shape)
    views, records = config.views.num_views, config.views.num_views * num_samples
    rows = [("stored", "bytes of a record", "one view", f"{views:,} views", "files")]
    for name, taps in _choices(config.taps, num_classes):
        asked = dataclasses.replace(config, taps=taps)
        specs = {
            tap.name: tap_spec(taps, tap, found)
            for tap in taps_asked(taps, teacher_stages(asked))
            for found in [shapes[tap]]
        }
        size = sum(spec.bytes_per_record for spec in specs.values())
        files = _num_files(specs, num_samples) * views
        totals = format_size(size * num_samples), format_size(size * records)
        rows.append((name, f"{size:,}", *totals, f"{files:,}"))
    height, width, channels = shape
    return [
        f"{config.name}: {num_samples:,} samples of {num_classes:,} classes, views of "
        f"{height}x{width}x{channels}; time and memory need the images",
        format_table(rows),
    ]


def _view_shape(config: TeacherConfig, image_px: int | None) -> tuple[int, int, int]:
    channels, augment = len(config.dataset.normalization.mean), config.views.augment
    if image_px is None and augment.output_px is None:
        raise ConfigError(
            "the views have the size of the images, which is unknown without them",
            fix="add --image-px with the side of the images, such as --image-px 32",
        )
    return view_shape((image_px or 0, image_px or 0, channels), augment)


def _tap_shapes(
    config: TeacherConfig, num_classes: int, image_shape: tuple[int, int, int]
) -> Shapes:
    """Return the shape of each tap in the config or added by `_choices`."""
    from teach_once.nets.teacher.teacher import fresh_teacher

    stages = teacher_stages(config)
    taps = list(
        dict.fromkeys(
            tap
            for _, choice in _choices(config.taps, num_classes)
            for tap in taps_asked(choice, stages)
        )
    )
    teacher = fresh_teacher(
        config.teacher,
        stages,
        num_classes=num_classes,
        image_shape=image_shape,
        has_embedding=bool(config.taps.embedding),
    )
    found = teacher.tap_shapes(image_shape, taps)
    return {tap: found[tap.name] for tap in taps}


def _choices(taps: TapsConfig, num_classes: int) -> Iterator[tuple[str, TapsConfig]]:
    """Yield choices of taps: the override to type, and the resulting taps."""
    yield "as configured", taps
    cut = TopLogits(top_k=_TOP) if _TOP < num_classes <= MAX_CUT_CLASSES else None
    has_logits, has_means = taps.logits is not None, taps.channel_means is not None
    if has_logits and cut:
        yield f"taps.logits={{top_k: {_TOP}}}", dataclasses.replace(taps, logits=cut)
    if has_logits:
        yield "taps.logits=uint8", dataclasses.replace(taps, logits="uint8")
    if has_means:
        yield "taps.channel_means=uint8", dataclasses.replace(taps, channel_means="uint8")
    if has_logits and has_means:
        both = dataclasses.replace(taps, logits=cut or "uint8", channel_means="uint8")
        yield "both of the above", both
        bare = dataclasses.replace(taps, channel_means=None, attention=None, hint=None)
        yield "taps.channel_means=null, without stages", bare


def _num_files(specs: dict[str, TapSpec], num_samples: int) -> int:
    """Return the number of chunks in one view."""
    blocks = -(-num_samples // default_block_rows(specs, num_samples))
    return blocks * sum(len(spec.arrays(name)) for name, spec in specs.items())
