"""Fills a cache: every pending block of every view through the teacher, written behind the compute.

Everything random about a view comes from `views`, so neither batch size, nor block order, nor how
often the pass was interrupted changes what is stored, beyond the float rounding of the teacher.
"""

from __future__ import annotations

import platform
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console

from nets.errors import count_errors
from nets.teacher import Teacher, load_teacher_network
from precompute.plan import Plan, free_bytes, measured_rate, pending_of
from precompute.progress import Progress
from precompute.setup import Setup
from precompute.stop import Stopped, StopRequest
from store import CacheContent, CacheFull, CacheWriter, TapSpec, TeacherCache
from store.content import draft_manifest
from store.layout import Block
from store.lock import Job
from store.writer import Work
from views.augment import (
    calibration_batches,
    check_augmentable,
    normalise,
    pixel_canary,
    preview_views,
    render,
    view_parameters,
)

_QUEUED_BLOCKS = 2  # so many finished blocks may wait for the disk before the teacher waits too


@dataclass(frozen=True)
class PassOptions:
    """What decides the speed of a pass and none of its bytes."""

    device: torch.device
    batch_size: int = 256
    block_rows: int | None = None
    check_every_byte: bool = True
    job: Job = field(default_factory=Job)


class TeacherPass:
    """The teacher with its dataset on the device, ready to give the records of any samples."""

    def __init__(self, setup: Setup, options: PassOptions) -> None:
        self.setup, self.options = setup, options
        images = setup.dataset.train.images
        self.image_shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        check_augmentable(self.image_shape, setup.config.views.augment)
        self._images = torch.from_numpy(images).to(options.device)
        self._labels = torch.from_numpy(setup.dataset.train.labels).to(options.device)
        self.teacher: Teacher = load_teacher_network(
            setup.config.teacher,
            setup.stages,
            num_classes=setup.dataset.num_classes,
            in_channels=self.image_shape[2],
            device=options.device,
            calibration=calibration_batches(
                self._images, setup.config.views, setup.config.dataset.normalisation
            ),
        )

    def tap_specs(self) -> dict[str, TapSpec]:
        """Tap name -> shape and how it is stored."""
        shapes = self.teacher.tap_shapes(self.image_shape, self.setup.extra_outputs)
        shapes = {_tap_name(output): shape for output, shape in shapes.items()}
        return {name: self.setup.tap_spec(name, shapes[name]) for name in self.setup.tap_names}

    def records(
        self, view: int, sample_ids: np.ndarray, outputs: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """The taps of one batch of samples, on the device: name -> (B, ...)."""
        views = self.setup.config.views
        drawn = view_parameters(views, view, len(self._labels))[sample_ids]
        parameters = torch.from_numpy(drawn).to(self.options.device)
        ids = torch.from_numpy(sample_ids).to(self.options.device)
        pixels = render(self._images.index_select(0, ids), parameters, views.augment)
        inputs = normalise(pixels, self.setup.config.dataset.normalisation)
        found = self.teacher.outputs(inputs, self._labels.index_select(0, ids), outputs)
        return {_tap_name(output): values for output, values in found.items()}

    def test_errors(self) -> dict[str, float]:
        """The teacher's error (%) on the test split."""
        test, normalisation = self.setup.dataset.test, self.setup.config.dataset.normalisation
        images = torch.from_numpy(test.images).to(self.options.device)
        labels = torch.from_numpy(test.labels).to(self.options.device)

        def logits_of(rows: slice) -> torch.Tensor:
            inputs = normalise(images[rows], normalisation)
            return self.teacher.outputs(inputs, labels[rows])["logits"]

        errors = count_errors(logits_of, labels, self.options.batch_size)
        return {"test_top1_error": errors.top1, "test_top5_error": errors.top5}


def fill_cache(setup: Setup, options: PassOptions, console: Console) -> TeacherCache | None:
    """Create or continue the cache until it is complete, and return it opened.

    None where other processes of the same job are still at work when this one's share is done.
    Raises CacheError, Stopped.
    """
    running = TeacherPass(setup, options)
    content = _content(running)
    plan = _plan(running, content)
    console.print(f"{setup.path}: {plan.summary()}")
    if plan.bytes_to_write > plan.free_bytes:
        raise CacheFull(
            f"the disk of {setup.path} is too full: {plan.bytes_to_write:,} bytes are to be "
            f"written, {plan.free_bytes:,} are free",
            mend="make room, or set fewer views.count, or choose another folder with --caches DIR",
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
        _run_blocks(running, writer, writer.work, stop, console)
        while left := writer.left_over():
            _run_blocks(running, writer, left, stop, console)
        if left is None:
            return None
        cache = TeacherCache.open(setup.path)
        writer.record_measured({**running.test_errors(), "train_agreement": agreement(cache)})
    return TeacherCache.open(setup.path)


def plan_pass(setup: Setup, options: PassOptions) -> Plan:
    """What `fill_cache` would do; writes nothing."""
    running = TeacherPass(setup, options)
    return _plan(running, _content(running))


def agreement(cache: TeacherCache) -> float:
    """How often the teacher is right on the cached views: a fraction."""
    right = sum(
        int(cache.read_view(view, ["correct"])["correct"].sum()) for view in range(cache.num_views)
    )
    return right / (cache.num_views * cache.num_samples)


def _content(running: TeacherPass) -> CacheContent:
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
        },
    )


def _plan(running: TeacherPass, content: CacheContent) -> Plan:
    draft = draft_manifest(content, running.options.block_rows)
    manifest, records, num_bytes = pending_of(running.setup.path, draft)
    num_samples = manifest.num_samples
    size = min(running.options.batch_size, num_samples)
    outputs = running.setup.extra_outputs

    def run_batch(number: int) -> int:
        ids = np.arange(number * size, (number + 1) * size) % num_samples
        running.records(0, ids, outputs)["correct"].cpu()
        return len(ids)

    return Plan(
        manifest=manifest,
        device=str(running.options.device),
        pending_records=records,
        bytes_to_write=num_bytes,
        free_bytes=free_bytes(running.setup.path),
        images_per_second=measured_rate(run_batch) if records else 0.0,
    )


def _run_blocks(
    running: TeacherPass,
    writer: CacheWriter,
    work: Sequence[Work],
    stop: StopRequest,
    console: Console,
) -> None:
    writer.refuse_if_too_full(work)
    outputs = extra_outputs(writer.manifest.taps)
    total = sum(item.block.rows for item in work)
    with Progress(total, "images", console) as progress, BackgroundWriter(writer) as behind:
        for done, item in enumerate(work):
            if stop.signal_number is not None:
                raise Stopped(
                    stop.signal_number,
                    f"stopped after {done:,} of {len(work):,} blocks, which are kept; "
                    f"the same command goes on from there",
                )
            behind.write(item.block, _block_records(running, item, outputs, progress))


def extra_outputs(taps: Mapping[str, TapSpec]) -> list[str]:
    """The outputs of the teacher that give the opt-in taps of a cache."""
    hints = [f"hint:{spec.stage}" for spec in taps.values() if spec.stage]
    return [*(name for name in taps if name.startswith("energy")), *hints]


def _block_records(
    running: TeacherPass, item: Work, outputs: Sequence[str], progress: Progress
) -> dict[str, np.ndarray]:
    """The taps of one block that are to be written, on the host."""
    parts = []
    for start, stop in _batches(item.block.rows, running.options.batch_size):
        ids = np.arange(item.block.start + start, item.block.start + stop)
        found = running.records(item.block.view, ids, outputs)
        parts.append({tap: found[tap] for tap in item.taps})
        progress.advance(stop - start)
    return {tap: torch.cat([part[tap] for part in parts]).cpu().numpy() for tap in item.taps}


def _batches(num_rows: int, batch_size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, batch_size):
        yield start, min(start + batch_size, num_rows)


def _tap_name(output: str) -> str:
    return "hint" if output.startswith("hint:") else output


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
