"""Fills a cache: every pending block of every view through the teacher, written behind the compute.

Everything random about a view comes from `views`, so neither batch size, nor block order, nor how
often the pass was interrupted changes what is stored, beyond the float rounding of the teacher.
"""

from __future__ import annotations

import platform
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from configs.schema import TeacherConfig
from nets.errors import count_errors
from nets.teacher import Teacher, load_teacher_network
from precompute.progress import Progress
from store import CacheWriter, TapSpec, TeacherCache
from store.identity import Identity
from store.layout import Block
from views.augment import check_augmentable, normalise, pixel_canary, render, view_parameters
from views.datasets import Dataset

_QUEUED_BLOCKS = 2  # so many finished blocks may wait for the disk before the teacher waits too


@dataclass(frozen=True)
class PassOptions:
    """What decides the speed of a pass and none of its bytes."""

    device: torch.device
    batch_size: int = 256
    block_rows: int | None = None
    check_every_byte: bool = True


def fill_cache(
    path: Path,
    config: TeacherConfig,
    dataset: Dataset,
    identity: Identity,
    stages: dict[str, str],
    options: PassOptions,
    console: Console,
) -> TeacherCache:
    """Create or continue the cache at `path` until it is complete, and return it opened."""
    images = dataset.train.images
    check_augmentable(images.shape[1:], config.views.augment)
    teacher = load_teacher_network(
        config.teacher,
        stages,
        num_classes=dataset.num_classes,
        in_channels=images.shape[3],
        device=options.device,
    )
    with CacheWriter.open(
        path,
        teacher=config.name,
        identity=identity,
        taps=tap_specs(config, teacher, images.shape[1:]),
        labels=dataset.train.labels,
        num_views=config.views.num_views,
        canary=pixel_canary(dataset.train, config.views),
        versions=versions(),
        block_rows=options.block_rows,
    ) as writer:
        pending = writer.pending(check_every_byte=options.check_every_byte)
        console.print(_announcement(writer, pending, options.device))
        _run_blocks(writer, pending, teacher, dataset, config, options, console)
        cache = TeacherCache.open(path)
        writer.record_measured(_measure(cache, teacher, dataset, config, options))
    return TeacherCache.open(path)


def tap_specs(
    config: TeacherConfig, teacher: Teacher, image_shape: tuple[int, int, int]
) -> dict[str, TapSpec]:
    """Tap name -> shape and stored dtype."""
    dtypes = {"logits": config.taps.logits, "correct": "uint8"}
    return {
        name: TapSpec(shape, dtypes.get(name, config.taps.means))
        for name, shape in teacher.tap_shapes(image_shape).items()
    }


def versions() -> dict[str, str]:
    import zarr

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "zarr": zarr.__version__,
    }


def _announcement(writer: CacheWriter, pending: Sequence[Block], device: torch.device) -> str:
    manifest = writer.manifest
    record = sum(spec.bytes_per_record for spec in manifest.taps.values())
    total = manifest.num_views * manifest.num_samples
    todo = sum(block.rows for block in pending)
    return (
        f"{writer.path}: {manifest.num_views} views x {manifest.num_samples:,} samples = "
        f"{total:,} records of {record:,} bytes, {total * record / 1e6:,.1f} MB; "
        f"{todo:,} to compute on {device}"
    )


def _run_blocks(
    writer: CacheWriter,
    pending: Sequence[Block],
    teacher: Teacher,
    dataset: Dataset,
    config: TeacherConfig,
    options: PassOptions,
    console: Console,
) -> None:
    images = torch.from_numpy(dataset.train.images).to(options.device)
    labels = torch.from_numpy(dataset.train.labels).to(options.device)
    total = sum(block.rows for block in pending)
    with Progress(total, "images", console) as progress, BackgroundWriter(writer) as behind:
        for block in pending:
            parameters = torch.from_numpy(
                view_parameters(config.views, block.view, len(labels))[block.start : block.stop]
            ).to(options.device)
            parts = []
            for start, stop in _batches(block.rows, options.batch_size):
                rows = slice(block.start + start, block.start + stop)
                view = render(images[rows], parameters[start:stop], config.views.augment)
                inputs = normalise(view, config.dataset.normalisation)
                parts.append(teacher.outputs(inputs, labels[rows]))
                progress.advance(stop - start)
            behind.write(block, _joined(parts))


def _batches(num_rows: int, batch_size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, batch_size):
        yield start, min(start + batch_size, num_rows)


def _joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


class BackgroundWriter:
    """A thread that commits blocks in the order given, so that the teacher need not wait."""

    def __init__(self, writer: CacheWriter) -> None:
        self._writer = writer
        self._queue: queue.Queue[tuple[Block, dict[str, np.ndarray]] | None] = queue.Queue(
            _QUEUED_BLOCKS
        )
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._commit_all, name="cache-writer")

    def write(self, block: Block, records: dict[str, np.ndarray]) -> None:
        """Queue one block; raises what an earlier one met."""
        if self._error is not None:
            raise self._error
        self._queue.put((block, records))

    def _commit_all(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._writer.write_block(*item)
                except BaseException as error:  # handed to the main thread
                    self._error = error

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait until all that is queued is committed, also when leaving because of an error."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error


def _measure(
    cache: TeacherCache,
    teacher: Teacher,
    dataset: Dataset,
    config: TeacherConfig,
    options: PassOptions,
) -> dict[str, float]:
    """The teacher's test error (%), and how often it is right on the cached views (fraction)."""
    images = torch.from_numpy(dataset.test.images).to(options.device)
    labels = torch.from_numpy(dataset.test.labels).to(options.device)

    def logits_of(rows: slice) -> torch.Tensor:
        inputs = normalise(images[rows], config.dataset.normalisation)
        return teacher.outputs(inputs, labels[rows])["logits"]

    errors = count_errors(logits_of, labels, options.batch_size)
    right = sum(
        int(cache.read_view(v, ["correct"])["correct"].sum()) for v in range(cache.num_views)
    )
    return {
        "test_top1_error": errors.top1,
        "test_top5_error": errors.top5,
        "train_agreement": right / (cache.num_views * cache.num_samples),
    }
