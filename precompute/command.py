"""python -m precompute NAME|PATH [--caches DIR|s3://bucket/prefix] [--plan] [key=value ...]

Runs the teacher over every (sample, view) that the cache lacks. A complete cache is recognized by
its identity and left unchanged, without loading torch.

Several processes started as one job share the work. Under runtime.launch or torchrun they find each
other through its environment variables, otherwise through --job NAME --rank R --world-size W. With
--cluster ADDRESS, the nodes of a Ray cluster do the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from teach_once.configs.commands import cache_command
from teach_once.configs.load import ConfigError, load_teacher, teachers_of
from teach_once.configs.schema import TeacherConfig
from teach_once.nets.networks.archs import stem_hint
from teach_once.nets.networks.names import check_arch
from teach_once.precompute.compute.reuse import format_dataset_change, opened_to_carry
from teach_once.precompute.compute.setup import (
    Setup,
    describe_setup,
    evaluated_images,
    require_weights,
)
from teach_once.precompute.job import JobOptions, WorkerOptions, job_of, share_of
from teach_once.precompute.pending import (
    checks_every_byte,
    format_measured,
    if_complete,
    without_weights,
    write_missing_indexes,
)
from teach_once.runtime.command.frame import new_app, new_console, run_command
from teach_once.runtime.command.options import (
    SPOOL,
    CacheStorage,
    ClusterAddress,
    Compute,
    OfStudent,
    Overrides,
    SpoolFolder,
    TeacherName,
    can_be_quiet,
    takes_option_groups,
)
from teach_once.runtime.command.program import program_text
from teach_once.runtime.machine.resources import sharing_machine
from teach_once.runtime.machine.urls import path_or_url, spool_folder
from teach_once.runtime.safe.locks import Job
from teach_once.store.errors import fixes_spelled_by
from teach_once.store.identity import knows_weights
from teach_once.store.read.mirror import choose_mirror
from teach_once.store.read.reader import TeacherCache
from teach_once.views.augment.augment import view_shape
from teach_once.views.images.listing import forget_listings

if TYPE_CHECKING:
    from teach_once.precompute.compute.teacher_pass import PassOptions
    from teach_once.precompute.filling import CacheFiller
    from teach_once.precompute.plan import Plan

app = new_app()


@app.command()
@can_be_quiet
@takes_option_groups
def main(
    name: TeacherName,
    overrides: Overrides = None,
    of_student: OfStudent = False,
    storage: CacheStorage = CacheStorage(),
    spool: SpoolFolder = SPOOL,
    compute: Compute = Compute(),
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="images per forward pass; default: the fastest in a trial"),
    ] = None,
    block_rows: Annotated[
        int | None, typer.Option(min=1, help="records per block of a new cache: a power of two")
    ] = None,
    full_check: Annotated[bool, typer.Option(help="check every byte of a large cache too")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="print the cost of the pass and exit")
    ] = False,
    samples: Annotated[
        int | None, typer.Option(min=1, help="with --plan: number of images, which need not exist")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, help="number of classes, with --samples")
    ] = None,
    image_px: Annotated[
        int | None, typer.Option(min=1, help="with --samples: side of images that keep their size")
    ] = None,
    reuse_from: Annotated[
        Path | None,
        typer.Option(
            "--reuse-from",
            metavar="PATH",
            help="copy unchanged records from this cache of an older dataset",
            parser=path_or_url,
        ),
    ] = None,
    job: JobOptions = JobOptions(),
    cluster: ClusterAddress = None,
    workers: WorkerOptions = WorkerOptions(),
) -> None:
    """Fill the cache of a teacher, or of each teacher of a student."""
    _check_block_rows(block_rows)
    if (samples, classes, image_px) != (None, None, None):
        for teacher, changes in teachers_of(name, overrides, of_student=of_student):
            _print_estimate(load_teacher(teacher, changes), plan, samples, classes, image_px)
        return
    request = CacheRequest(
        storage,
        compute,
        spool,
        batch_size,
        block_rows,
        full_check,
        plan,
        reuse_from,
        job,
        cluster,
        workers,
    )
    fill_caches(teachers_of(name, overrides, of_student=of_student), request, new_console())


@dataclass(frozen=True)
class CacheRequest:
    """The options of a command line for its caches. plan: print the cost and exit."""

    storage: CacheStorage
    compute: Compute
    spool: Path = SPOOL
    batch_size: int | None = None
    block_rows: int | None = None
    full_check: bool = False
    plan: bool = False
    reuse_from: Path | None = None
    job: JobOptions = field(default_factory=JobOptions)
    cluster: str | None = None  # address
    workers: WorkerOptions = field(default_factory=WorkerOptions)


def fill_caches(
    teachers: Sequence[tuple[str, list[str]]], request: CacheRequest, console: Console
) -> None:
    """Fill the cache of each teacher; a complete one is skipped, without loading torch.

    teachers: name and overrides of each, from `teachers_of`. Raises CacheError, ConfigError,
    DatasetError, ArchError, TapError, DeviceError, ClusterError or Stopped.
    """
    choose_mirror(request.storage.mirror, request.storage.mirror_gb)
    for name, changes in teachers:
        _fill_cache(name, changes, request, console)


def open_fillers(
    teachers: Sequence[tuple[str, list[str]]], request: CacheRequest, console: Console
) -> list[CacheFiller]:
    """Return a filler for the cache of each teacher, with view 0 computed; [] if all are complete.

    It replaces `fill_caches` for a training student and raises the same errors.
    """
    found = [_described(name, changes, request, console) for name, changes in teachers]
    complete = [(cache, setup) for setup, cache in found if cache is not None]
    if len(complete) == len(found):
        for cache, setup in complete:
            _finish_complete(cache, setup, console)
        return []
    return [_open_filler(require_weights(setup), request, console) for setup, _ in found]


def _open_filler(setup: Setup, request: CacheRequest, console: Console) -> CacheFiller:
    from teach_once.precompute.filling import CacheFiller

    _print_hints(setup, console)
    setup.dataset.check_headers()
    caches = request.storage.caches
    with fixes_spelled_by(lambda more: cache_command(setup.config, caches_dir=caches, more=more)):
        filler = CacheFiller(setup, _pass_options(setup, request, Job(), None), console)
        filler.start()
    return filler


def _print_estimate(
    config: TeacherConfig, plan: bool, samples: int | None, classes: int | None, px: int | None
) -> None:
    if not plan or samples is None or classes is None:
        raise ConfigError(
            "--samples, --classes and --image-px require --plan",
            fix=f"{program_text('precompute')} NAME --plan --samples 1281167 --classes 1000",
        )
    check_arch(config.teacher.arch)
    from teach_once.precompute.estimate import estimate_lines

    new_console().print("\n".join(estimate_lines(config, samples, classes, px)))


def _fill_cache(name: str, changes: list[str], request: CacheRequest, console: Console) -> None:
    """Fill the cache of one teacher."""
    setup, cache = _described(name, changes, request, console)
    if cache is not None and not request.plan:
        if request.job.job or request.job.rank == 0:  # ranks without a job share a terminal
            _finish_complete(cache, setup, console)
        return
    caches, setup = request.storage.caches, require_weights(setup)
    if (old := opened_to_carry(request.reuse_from, setup)) is None and (
        change := format_dataset_change(setup, caches, [name, *changes])
    ):
        console.print(change)
    _print_hints(setup, console)
    job = job_of(request.job.job, request.job.rank, request.job.world_size)
    if job.rank == 0 and not request.plan:
        for images in evaluated_images(setup):
            images.dataset.check_headers()
    with (
        sharing_machine(share_of(job)),
        fixes_spelled_by(lambda more: cache_command(setup.config, caches_dir=caches, more=more)),
    ):
        options = _pass_options(setup, request, job, old)
        if request.cluster:
            _fill_on_cluster(setup, options, request, console)
        else:
            _fill_here(setup, options, request, console)


def _pass_options(
    setup: Setup, request: CacheRequest, job: Job, old: TeacherCache | None
) -> PassOptions:
    from teach_once.precompute.compute.teacher_pass import PassOptions
    from teach_once.runtime.machine.devices import pick_device

    every_byte = checks_every_byte(setup.path, request.full_check)
    return PassOptions(
        pick_device("cpu" if request.cluster else request.compute.device),
        request.batch_size,
        request.block_rows or (None if old is None else old.manifest.block_rows),
        request.compute.workers,
        every_byte,
        job,
        old,
        request.spool,
    )


def _fill_here(setup: Setup, options: PassOptions, request: CacheRequest, console: Console) -> None:
    from teach_once.precompute.run_pass import fill_cache, plan_pass

    if request.plan:
        _print_plan(plan_pass(setup, options), setup, console)
    else:
        _print_outcome(fill_cache(setup, options, console), setup, options.job, console)


def _fill_on_cluster(
    setup: Setup, options: PassOptions, request: CacheRequest, console: Console
) -> None:
    from teach_once.precompute.ray_driver import ClusterFill
    from teach_once.runtime.command.ray import Cluster

    if options.job.world > 1:
        raise ConfigError("--cluster excludes --world-size (or NPROC=N, or torchrun)")
    assert request.cluster is not None
    cpus, gpus = request.workers.cpus_per_worker, request.workers.gpus_per_worker
    with Cluster(request.cluster, console, cpus=cpus, gpus=gpus) as cluster:
        fill = ClusterFill(setup, options, cluster, request.compute.device, console)
        if request.plan:
            _print_plan(fill.plan(), setup, console)
        else:
            _print_outcome(fill.run(), setup, options.job, console)


def _print_plan(cost: Plan, setup: Setup, console: Console) -> None:
    console.print(f"{cost.table(setup.path)}\n\n{cost.tap_table()}")


def _check_block_rows(block_rows: int | None) -> None:
    if block_rows is not None and block_rows.bit_count() != 1:
        below = 1 << (block_rows.bit_length() - 1)
        raise ConfigError(
            f"--block-rows {block_rows} is not a power of two; use {below} or {2 * below}"
        )


def _described(
    name: str, overrides: list[str], request: CacheRequest, console: Console
) -> tuple[Setup, TeacherCache | None]:
    """Return the setup of a config, and its cache if it is complete."""
    caches, full_check = request.storage.caches, request.full_check
    if full_check:
        forget_listings(spool_folder(caches, request.spool))
    setup = describe_setup(name, overrides, caches, request.spool)
    if not knows_weights(setup.identity):
        cache, problem = without_weights(setup, caches)
        if cache is not None:
            return setup, cache
        console.print(f"the weights {setup.config.teacher.weights} are needed, because {problem}")
        setup = require_weights(setup)
    return setup, if_complete(setup, full_check, console)


def _print_hints(setup: Setup, console: Console) -> None:
    shape = view_shape(setup.dataset.train.first_shape, setup.config.views.augment)
    net = setup.config.teacher
    hints = [stem_hint(net.arch, net.stem, shape, "teacher.stem"), *setup.dataset.hints]
    if setup.config.training is None:  # trained elsewhere, perhaps with another order of classes
        hints.append(setup.dataset.order_hint)
    for hint in filter(None, hints):
        console.print(hint)


def _finish_complete(cache: TeacherCache, setup: Setup, console: Console) -> None:
    """Write what a killed pass left out of a complete cache, and print that it is complete."""
    write_missing_indexes(cache, setup)
    measured = format_measured(cache, setup.config)
    console.print(f"{cache.path} is complete: nothing to do. {measured}")


def _print_outcome(cache: TeacherCache | None, setup: Setup, job: Job, console: Console) -> None:
    if cache is None:
        console.print(f"rank {job.rank} of {job.world} is done; other ranks are still running")
    else:
        console.print(f"{setup.path} is complete. {format_measured(cache, setup.config)}")


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)
