"""Fills a cache: every pending block of every view through the teacher, written behind the compute.

Everything random about a view comes from `views`, so neither batch size, nor block order, nor how
often the pass was interrupted changes what is stored, beyond the float rounding of the teacher.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console

from nets.error_rates import count_errors
from nets.taps import Tap, taps_stored
from nets.teacher import Teacher, load_teacher_network
from precompute.background import QUEUED_BLOCKS, BackgroundWriter
from precompute.carry import carry_over
from precompute.plan import Plan, free_bytes, pending_of
from precompute.setup import Setup
from runtime.cost import Memory, measured_rate, memory_with
from runtime.errors import Stopped
from runtime.locks import Job
from runtime.progress import Progress
from runtime.signals import StopRequest
from store import CacheContent, CacheFull, CacheWriter, TapSpec, TeacherCache
from store.content import draft_manifest
from store.errors import SamplesChanged
from store.layout import SAMPLE_CRC
from store.look import agreement
from store.manifest import Manifest
from store.work import Work
from views.canary import pixel_canary
from views.pixels import calibration_batches, evaluation_pixels, open_pixels
from views.preview import preview_views
from views.splits import DatasetError

_BATCH_SIZE = 256
_SMALLEST_BATCH = 64
_TRIAL_RECORDS = 20_000  # a shorter pass would not repay the trial
_MOST_VIEWS_PER_READING = 8  # more would gain little and hold more blocks in memory
_GROUP_SECONDS = 60.0
_SECONDS_TO_FINISH = 10.0  # a block that needs longer is given up when the pass is to stop


@dataclass(frozen=True)
class PassOptions:
    """What decides the speed of a pass and none of its bytes."""

    device: torch.device
    batch_size: int | None = None  # images per forward pass; default: what a trial finds fastest
    block_rows: int | None = None
    num_workers: int | None = None  # that read images, where they are not kept on the device
    check_every_byte: bool = True
    job: Job = field(default_factory=Job)
    carried_from: TeacherCache | None = None  # of another state of the dataset


class TeacherPass:
    """The teacher and its dataset's views, ready to give the records of any samples."""

    def __init__(self, setup: Setup, options: PassOptions) -> None:
        self.setup, self.options = setup, options
        self.batch_size = options.batch_size or _BATCH_SIZE
        config, dataset, device = setup.config, setup.dataset, options.device
        self._normalisation = config.dataset.normalisation
        self.pixels = open_pixels(
            dataset.train, config.views, self._normalisation, device, options.num_workers
        )
        self.teacher: Teacher = load_teacher_network(
            config.teacher,
            setup.stages,
            num_classes=dataset.num_classes,
            in_channels=self.pixels.shape[2],
            device=device,
            calibration=calibration_batches(self.pixels),
        )

    def tap_specs(self) -> dict[str, TapSpec]:
        """Tap name -> shape and how it is stored."""
        taps = self.setup.taps
        shapes = self.teacher.tap_shapes(self.pixels.shape, taps)
        return {tap.name: self.setup.tap_spec(tap, shapes[tap.name]) for tap in taps}

    def batches(
        self, numbers: Sequence[int], sample_ids: np.ndarray, taps: Sequence[Tap]
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Taps, name -> (B, ...) on the device, batch by batch, each with its view.

        With them the samples' checksums as "sample_crc32c", (B,) int64 on the host.
        All views `numbers` of a batch of samples come one after the other.
        """
        for batch in self.pixels.batches(numbers, sample_ids, self.batch_size):
            values = self.teacher.outputs(batch.inputs, batch.labels, taps)
            assert batch.checksums is not None
            yield (
                batch.view,
                {**values, SAMPLE_CRC: torch.from_numpy(batch.checksums.astype(np.int64))},
            )

    def records(
        self, view: int, sample_ids: np.ndarray, taps: Sequence[Tap]
    ) -> dict[str, torch.Tensor]:
        """The taps of some samples, on the device: name -> (M, ...)."""
        parts = [found for _, found in self.batches([view], sample_ids, taps)]
        return {tap: torch.cat([part[tap] for part in parts]) for tap in parts[0]}

    def test_errors(self) -> dict[str, float]:
        """The teacher's error (%) on the test split."""
        test = evaluation_pixels(
            self.setup.dataset.test,
            self.setup.config.views,
            self._normalisation,
            self.options.device,
            self.options.num_workers,
        )
        every = np.arange(len(test))
        errors = count_errors(
            (
                self.teacher.outputs(batch.inputs, batch.labels, [Tap("logits")])["logits"],
                batch.labels,
            )
            for batch in test.batches([0], every, self.batch_size)
        )
        return {"test_top1_error": errors.top1, "test_top5_error": errors.top5}


def fill_cache(setup: Setup, options: PassOptions, console: Console) -> TeacherCache | None:
    """Create or continue the cache until it is complete, and return it opened.

    None if other ranks of the same job are still running when this one has finished its share.
    Raises CacheError, Stopped.
    """
    running = TeacherPass(setup, options)
    content = content_of(running)
    plan = _plan(running, content)
    if options.batch_size is None and plan.pending_records >= _TRIAL_RECORDS:
        running.batch_size, rate = fastest_batch(running)
        plan = dataclasses.replace(plan, images_per_second=rate)
        console.print(f"batches of {running.batch_size} images were the fastest")
    console.print(f"{setup.path}: {plan.summary()}; images {running.pixels.where}")
    if plan.bytes_to_write > plan.free_bytes:
        raise CacheFull(
            f"the disk of {setup.path} is too full: {plan.bytes_to_write:,} bytes are "
            f"needed, {plan.free_bytes:,} are free",
            fix="free some space, lower views.count, or choose another folder with --caches DIR",
        )
    with (
        StopRequest() as stop,
        CacheWriter.open(
            setup.path,
            content,
            block_rows=options.block_rows,
            check_every_byte=options.check_every_byte,
            job=options.job,
        ) as writer,
    ):
        started, images = time.perf_counter(), 0
        with _naming_changed_files(setup):
            images += run_blocks(
                running, writer, _not_carried(setup, options, writer, console), stop, console
            )
            while left := writer.left_over():
                images += run_blocks(running, writer, left, stop, console)
        if left is None:
            return None
        cache = _opened(setup)
        rate = images / (time.perf_counter() - started)
        kept = writer.manifest.measured.get("images_per_second", 0.0)
        writer.record_measured(
            {
                **running.test_errors(),
                "train_agreement": agreement(cache, cache.num_views),
                "views": cache.num_views,
                "images_per_second": rate if images else kept,
            }
        )
    return _opened(setup)


def _opened(setup: Setup) -> TeacherCache:
    """The cache, as far as the config asks for it."""
    views = setup.config.views.num_views
    return TeacherCache.open(setup.path, num_views=views, taps=setup.tap_names)


def _not_carried(
    setup: Setup, options: PassOptions, writer: CacheWriter, console: Console
) -> list[Work]:
    """The writer's work, without what another cache has of it, which is committed."""
    if options.carried_from is None:
        return writer.work
    left = carry_over(setup, options.carried_from, writer)
    done, old = len(writer.work) - len(left), options.carried_from.path
    console.print(f"copied {done:,} of {len(writer.work):,} blocks from {old}")
    return left


@contextmanager
def _naming_changed_files(setup: Setup) -> Iterator[None]:
    """The store knows samples by their numbers only."""
    try:
        yield
    except SamplesChanged as error:
        names = list(map(setup.dataset.train.name_of, error.samples[:5]))
        raise DatasetError(
            f"samples have changed since {setup.path} was begun, {len(error.samples)} in all: "
            f"{', '.join(names)}{', ...' if len(error.samples) > 5 else ''}\n  fix: restore them; "
            f"or, if they are right as they are: rm -r {setup.path}, and run again"
        ) from None


def plan_pass(setup: Setup, options: PassOptions) -> Plan:
    """What `fill_cache` would do; writes nothing."""
    running = TeacherPass(setup, options)
    return _plan(running, content_of(running))


def content_of(running: TeacherPass) -> CacheContent:
    import PIL
    import zarr

    setup = running.setup
    train, views = setup.dataset.train, setup.config.views
    return CacheContent(
        teacher=setup.config.name,
        identity=setup.identity,
        taps=running.tap_specs(),
        labels=train.labels,
        num_views=views.num_views,
        class_names=setup.dataset.class_names,
        canary=pixel_canary(train, views),
        preview=preview_views(train, views),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "zarr": zarr.__version__,
            "pillow": PIL.__version__,
        },
        sample_crc32c=True,
    )


def _plan(running: TeacherPass, content: CacheContent) -> Plan:
    draft = draft_manifest(content, running.options.block_rows)
    manifest, records, num_bytes = pending_of(running.setup.path, draft)
    num_samples = manifest.num_samples
    return Plan(
        manifest=manifest,
        device=str(running.options.device),
        pending_records=records,
        bytes_to_write=num_bytes,
        free_bytes=free_bytes(running.setup.path),
        images_per_second=measured_rate(_trial(running, num_samples)) if records else 0.0,
        memory=_memory(running, manifest),
    )


def _memory(running: TeacherPass, manifest: Manifest) -> Memory:
    """What has been taken so far, the trial's batches included, and what is still to come.

    To come: the blocks that are computed, wait or are written, as float32 and as stored; and the
    test images.
    """
    blocks = QUEUED_BLOCKS + 2
    if running.pixels.is_streamed:
        blocks += _MOST_VIEWS_PER_READING
    of_blocks = blocks * manifest.block_rows * manifest.record_bytes * 4
    test = running.setup.dataset.test
    of_tests = len(test) * int(np.prod(running.pixels.shape))
    return memory_with(of_blocks + of_tests, running.options.device)


def _trial(running: TeacherPass, num_samples: int) -> Iterator[int]:
    """Runs batches of view 0 endlessly, as a pass would; yields the number of images of each."""
    while True:
        for _, found in running.batches([0], np.arange(num_samples), running.setup.taps):
            yield len(found["correct"].cpu())


def fastest_batch(running: TeacherPass) -> tuple[int, float]:
    """The batch size with the highest rate, and that rate in images per second.

    Doubles the size while that gains more than 3 % and the memory of a GPU suffices.
    """
    best, best_rate = _SMALLEST_BATCH, 0.0
    for size in (_SMALLEST_BATCH << step for step in range(8)):
        if size > len(running.pixels) and best_rate:
            break
        running.batch_size = size
        try:
            rate = measured_rate(_trial(running, len(running.pixels)))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if rate < best_rate * 1.03:
            break
        best, best_rate = size, rate
    return best, best_rate


def run_blocks(
    running: TeacherPass,
    writer: CacheWriter,
    work: Sequence[Work],
    stop: StopRequest,
    console: Console,
) -> int:
    """Compute and commit these blocks; returns how many images that were."""
    writer.refuse_if_too_full(work)
    total = sum(item.block.rows for item in work)
    done = 0
    with Progress(total, "images", console) as progress, BackgroundWriter(writer) as behind:

        def refuse_if_stopped(seconds_left: float = math.inf) -> None:
            if stop.signal_number is not None and seconds_left > _SECONDS_TO_FINISH:
                raise Stopped(
                    stop.signal_number,
                    f"stopped after {done:,} of {len(work):,} blocks, which are saved; "
                    f"the same command resumes",
                )

        waiting = list(work)
        while waiting:
            refuse_if_stopped()
            group = next_group(running, waiting, progress.rate)
            records = _group_records(running, writer, group, progress, refuse_if_stopped)
            for item, found in zip(group, records, strict=True):
                behind.write(item.block, found)
                waiting.remove(item)
                done += 1
    return total


def next_group(running: TeacherPass, waiting: Sequence[Work], rate: float) -> list[Work]:
    """The first block of `waiting`; and, where images must be decoded, more views of its samples.

    As many as take about a minute at `rate` images per second, at most eight: so much is lost when
    the pass is killed, and an eighth of the decoding is left.
    """
    first = waiting[0]
    if not running.pixels.is_streamed:
        return [first]
    same = [
        item for item in waiting if (item.block.start, item.taps) == (first.block.start, first.taps)
    ]
    affordable = int(_GROUP_SECONDS * rate / first.block.rows)
    return same[: min(max(affordable, 1), _MOST_VIEWS_PER_READING)]


def _group_records(
    running: TeacherPass,
    writer: CacheWriter,
    group: Sequence[Work],
    progress: Progress,
    refuse_if_stopped: Callable[[float], None],
) -> list[dict[str, torch.Tensor]]:
    """The taps of each block that are to be written, on the device."""
    block, taps, stored = group[0].block, group[0].taps, taps_stored(writer.manifest.taps)
    if writer.manifest.sample_crc32c and SAMPLE_CRC not in taps:
        taps = (*taps, SAMPLE_CRC)  # so that they are compared
    parts: dict[int, list[dict[str, torch.Tensor]]] = {item.block.view: [] for item in group}
    ids = np.arange(block.start, block.start + block.rows)
    left = len(group) * block.rows
    for view, found in running.batches(list(parts), ids, stored):
        parts[view].append({tap: found[tap] for tap in taps})
        left -= len(found["correct"])
        progress.advance(len(found["correct"]))
        refuse_if_stopped(left / max(progress.rate, 1e-9))
    return [
        {tap: torch.cat([part[tap] for part in found]) for tap in taps} for found in parts.values()
    ]
