"""Fill a cache: run every pending block of every view through the teacher."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from teach_once.nets.metrics import count_errors
from teach_once.precompute.compute.blocks import run_blocks
from teach_once.precompute.compute.queue import Rounds
from teach_once.precompute.compute.setup import (
    EvaluatedImages,
    Setup,
    evaluated_images,
    evaluation_setup,
    open_evaluated,
)
from teach_once.precompute.compute.spool import remove_spools
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.precompute.compute.trial import certificate, fastest_batch
from teach_once.precompute.plan import Plan, memory_of, planned
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.formats import counted
from teach_once.runtime.safe.locks import Job
from teach_once.store import CacheFull, TeacherCache
from teach_once.store.errors import SamplesChanged
from teach_once.store.inspect.inspect import agreement
from teach_once.store.place.open import place_at
from teach_once.store.write.destination import Destination, open_destination
from teach_once.store.write.pending_blocks import Work
from teach_once.views.splits import DatasetError, count_copies

TRIAL_RECORDS = 20_000  # the trial does not pay for a shorter pass
_NAMED_SAMPLES = 5


def plan_pass(setup: Setup, options: PassOptions) -> Plan:
    """Plan the work of `fill_cache`, including the trial; writes nothing."""
    teacher_pass = TeacherPass(setup, options)
    plan = planned(teacher_pass, teacher_pass.content())
    if not _repays_trial(plan, options):
        return plan
    started = time.perf_counter()
    plan = _with_fastest_batch(teacher_pass, plan)
    return dataclasses.replace(plan, trial_hours=(time.perf_counter() - started) / 3600)


def _repays_trial(plan: Plan, options: PassOptions) -> bool:
    return options.batch_size is None and plan.pending_records >= TRIAL_RECORDS


def _with_fastest_batch(teacher_pass: TeacherPass, plan: Plan) -> Plan:
    """Find and set the fastest batch size; returns the plan with its rate and memory."""
    teacher_pass.batch_size, rate = fastest_batch(teacher_pass)
    memory = memory_of(teacher_pass, plan.manifest)
    return dataclasses.replace(plan, images_per_second=rate, memory=memory)


def fill_cache(setup: Setup, options: PassOptions, console: Console) -> TeacherCache | None:
    """Create, resume and complete the cache; returns it open.

    Returns None if other ranks of the job are still running when this rank has finished its share.
    Raises CacheError, DatasetError or Stopped.
    """
    teacher_pass = TeacherPass(setup, options)
    content = teacher_pass.content()
    plan = planned(teacher_pass, content)
    if _repays_trial(plan, options):
        plan = _with_fastest_batch(teacher_pass, plan)
        console.print(f"batches of {teacher_pass.batch_size} images were the fastest")
    teacher_pass.images_per_second = plan.images_per_second
    console.print(plan.table(setup.path, teacher_pass.pixels.where))
    check_disk_space(plan, setup)
    with (
        StopRequest() as stop,
        open_destination(
            setup.path,
            content,
            spool_folder=teacher_pass.folder,
            block_rows=options.block_rows,
            check_every_byte=options.check_every_byte,
            job=options.job,
        ) as writer,
        naming_changed_files(setup),
    ):
        images_per_second = _run_pending(teacher_pass, writer, stop, console)
        if images_per_second is None:
            return None
        last = writer.manifest.measured.get("images_per_second", 0.0)
        writer.finish(measured(teacher_pass, images_per_second or last, stop, console))
        for folder in writer.unused_spool_folders():
            remove_spools(folder)
    cache = open_filled(setup)
    if copies := count_copies(cache.sample_digest):
        total = cache.num_samples
        console.print(f"note: {copies:,} of {total:,} images are exact copies of other images")
    return cache


def _run_pending(
    teacher_pass: TeacherPass, writer: Destination, stop: StopRequest, console: Console
) -> float | None:
    """Do this rank's work, then work left by other ranks; returns images per second.

    Returns None if other ranks are still running.
    """
    started = time.perf_counter()
    own = without_carried(teacher_pass, writer, console)
    rounds = Rounds(teacher_pass.setup.path, writer, own)
    images = sum(run_blocks(teacher_pass, writer, work, stop, console) for work in rounds)
    return images / (time.perf_counter() - started) if rounds.is_complete else None


def measured(
    teacher_pass: TeacherPass, images_per_second: float, stop: StopRequest, console: Console
) -> dict[str, float]:
    """Fill the evaluation cache and return the measurements for the manifest.

    These are the teacher's test metrics, the pass's rate and the certificate of reduced taps.
    """
    cache = open_filled(teacher_pass.setup)
    has_logits, test = "correct" in cache.taps, fill_evaluation(teacher_pass, stop, console)
    return {
        **{f"test_{name}": value for name, value in test.items()},
        **({"train_agreement": agreement(cache, cache.num_views)} if has_logits else {}),
        "views": cache.num_views,
        "images_per_second": images_per_second,
        **certificate(teacher_pass, cache, console),
    }


def fill_evaluation(
    teacher_pass: TeacherPass, stop: StopRequest, console: Console
) -> Mapping[str, float]:
    """Complete the evaluation caches inside the cache; returns the teacher's test metrics by name.

    They contain the teacher's outputs of the test images and of the probe's, one view each, with
    which students are compared without running the teacher. Each is a cache of its own, so the same
    code writes, resumes, checks and copies it. Its name contains the digest of its identity, so
    other images or another transform get another one. A complete one is only read. Without logits
    or labels there are no metrics. Raises CacheError, DatasetError or Stopped.
    """
    tested, *_ = [
        open_evaluated(teacher_pass.setup, images, every_byte=True)
        or _new_evaluation(teacher_pass, images, stop, console)
        for images in evaluated_images(teacher_pass.setup)
    ]
    return _test_metrics(tested)


def _new_evaluation(
    teacher_pass: TeacherPass, images: EvaluatedImages, stop: StopRequest, console: Console
) -> TeacherCache:
    setup = evaluation_setup(teacher_pass.setup, images)
    options = dataclasses.replace(teacher_pass.options, job=Job(), carried_from=None)
    evaluation = TeacherPass(setup, options, teacher=teacher_pass.teacher)
    evaluation.batch_size = teacher_pass.batch_size
    with open_destination(
        setup.path,
        evaluation.content(),
        spool_folder=evaluation.folder,
        check_every_byte=True,
    ) as writer:
        run_blocks(evaluation, writer, writer.work, stop, console)
        writer.finish({})
    return TeacherCache.open(setup.path, num_views=1, taps=setup.tap_names)


def _test_metrics(cache: TeacherCache) -> Mapping[str, float]:
    if "logits" not in cache.taps or cache.labels is None:
        return {}
    logits = torch.from_numpy(cache.read_view(0, ["logits"])["logits"])
    return count_errors([(logits, torch.from_numpy(cache.labels))])


def open_filled(setup: Setup) -> TeacherCache:
    """Open the requested views and taps of the cache."""
    views = setup.config.views.num_views
    return TeacherCache.open(setup.path, num_views=views, taps=setup.tap_names)


def check_disk_space(plan: Plan, setup: Setup) -> None:
    needed = plan.disk_bytes
    if needed > plan.free_bytes:
        what = "the records of unfinished blocks" if plan.is_remote else setup.path
        raise CacheFull(
            f"the disk of {what} is too full: {needed:,} bytes needed, "
            f"{plan.free_bytes:,} bytes free",
            fix="free disk space, lower views.count, or choose another folder with "
            f"{'--spool' if plan.is_remote else '--caches'} DIR",
        )


def without_carried(teacher_pass: TeacherPass, writer: Destination, console: Console) -> list[Work]:
    """Copy the blocks that another cache has; returns the writer's remaining work."""
    carrier = teacher_pass.carrier
    if carrier is None:
        return writer.work
    left = carrier.carry_over(writer)
    copied = len(writer.work) - len(left)
    console.print(f"copied {copied:,} of {len(writer.work):,} blocks from {carrier.old.path}")
    return left


@contextmanager
def naming_changed_files(setup: Setup) -> Iterator[None]:
    """Add file names to an error about samples, which the store identifies by number."""
    try:
        yield
    except SamplesChanged as error:
        names = list(map(setup.dataset.train.name_of, error.samples[:_NAMED_SAMPLES]))
        more = ", ..." if len(error.samples) > len(names) else ""
        raise DatasetError(
            f"{counted(len(error.samples), 'sample')} changed since {setup.path} was started: "
            f"{', '.join(names)}{more}",
            fix=f"restore them; or, if the changes are intended: {_remove(setup.path)}, and run "
            f"again",
        ) from None


def _remove(path: Path) -> str:
    return f"rm -r {path}" if place_at(path).is_local else f"remove everything in {path}"
