"""python -m precompute NAME|PATH [--caches DIR] [--plan] [key=value ...]

Runs the teacher over every (sample, view) that the cache does not hold yet. A complete cache is
recognised by its identity and left alone, without loading torch.

Several processes that are started as one job share the work: under torchrun they find each other
by its environment variables, otherwise by --job NAME --rank R --world W.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from configs.commands import cache_command
from configs.load import ConfigError
from configs.schema import TeacherConfig
from nets.archs import stem_hint
from precompute.carry import reason_against, refuse_unless_carriable
from precompute.setup import Setup, at_hand, described
from runtime.commands import new_app, new_console, run_command
from runtime.limits import Share, sharing_machine
from runtime.locks import Job
from store.errors import (
    CacheAmbiguous,
    CacheDamaged,
    CacheError,
    CacheIncomplete,
    CacheMissing,
    UnknownTap,
    UnknownView,
    fixes_spelled_by,
)
from store.identity import knows_weights
from store.layout import MANIFEST
from store.look import committed_bytes
from store.reader import TeacherCache, find_cache, open_source, other_dataset_state
from views.augment import pixel_canary, view_shape
from views.changes import describe_change

app = new_app()

# A finished cache up to this size has every byte checked before it is called finished; a larger one
# only the presence and size of its files, unless --recheck asks for more.
_CHECKED_BYTES = 4 * 2**30
_FAR_PERCENT = 5.0  # from the published error


@app.command()
def main(
    name: Annotated[
        str, typer.Argument(help="configs/teacher/NAME.yaml, or a path to a YAML file")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    caches: Annotated[Path, typer.Option(help="folder of the caches")] = Path("caches"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="images per forward pass; default: by trial")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="processes that read images")] = None,
    block_rows: Annotated[
        int | None, typer.Option(min=1, help="records per block, if new: a power of two")
    ] = None,
    recheck: Annotated[bool, typer.Option(help="check every byte of a large cache too")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="say what it would cost; do nothing")
    ] = False,
    carry_from: Annotated[
        Path | None, typer.Option("--from", help="an older dataset's cache")
    ] = None,
    job: Annotated[str, typer.Option(help="name shared by the processes of one job")] = "",
    rank: Annotated[int, typer.Option(min=0, envvar="RANK", help="of this process")] = 0,
    world: Annotated[int, typer.Option(min=1, envvar="WORLD_SIZE", help="processes")] = 1,
) -> None:
    """Fill the cache of one teacher."""
    console = new_console()
    _check_block_rows(block_rows)
    setup = described(name, overrides or [], caches)
    if not knows_weights(setup.identity):
        cache, problem = _without_weights(setup, caches)
        if cache is not None and not plan:
            console.print(
                f"{cache.path} is complete: nothing to do. {_measured(cache, setup.config)}"
            )
            return
        console.print(f"{setup.config.teacher.weights} is needed: {problem}")
        setup = at_hand(setup)
    cache = _if_complete(setup, recheck, console)
    if cache is not None and not plan:
        console.print(f"{setup.path} is complete: nothing to do. {_measured(cache, setup.config)}")
        return

    if (old := _carried_from(carry_from, setup)) is not None:
        block_rows = block_rows or old.manifest.block_rows
    else:
        _tell_of_another_state(setup, caches, [name, *(overrides or [])], console)
    shape = view_shape(setup.dataset.train.first_shape, setup.config.views.augment)
    net = setup.config.teacher
    if hint := stem_hint(net.arch, net.stem, shape, "teacher.stem"):
        console.print(hint)

    from precompute.run import PassOptions, fill_cache, plan_pass
    from runtime.devices import pick_device

    full_check = recheck or cache_bytes(setup.path) <= _CHECKED_BYTES
    this_job = _job(job, rank, world)
    with (
        sharing_machine(_share(this_job)),
        fixes_spelled_by(lambda more: cache_command(setup.config, caches_dir=caches, more=more)),
    ):
        options = PassOptions(
            pick_device(device), batch_size, block_rows, workers, full_check, this_job, old
        )
        if plan:
            found = plan_pass(setup, options)
            console.print(f"{setup.path}: {found.summary()}\n{found.table()}")
            return
        cache = fill_cache(setup, options, console)
    if cache is None:
        console.print(f"rank {rank} of {world} is done; others of the job are still at work")
    else:
        console.print(f"{setup.path} is complete. {_measured(cache, setup.config)}")


def _check_block_rows(block_rows: int | None) -> None:
    if block_rows is not None and block_rows.bit_count() != 1:
        below = 1 << (block_rows.bit_length() - 1)
        raise ConfigError(
            f"--block-rows {block_rows} is not a power of two; use {below} or {2 * below}"
        )


def _carried_from(path: Path | None, setup: Setup) -> TeacherCache | None:
    if path is None:
        return None
    old = TeacherCache.open(path)
    refuse_unless_carriable(setup, old)
    return old


def _tell_of_another_state(
    setup: Setup, caches: Path, words: Sequence[str], console: Console
) -> None:
    """Before a new cache is begun: how its dataset differs from that of one which is there."""
    if (setup.path / MANIFEST).exists():
        return
    if (old := other_dataset_state(caches, setup.identity)) is None:
        return
    change = describe_change(setup.dataset.train, old.labels, old.sample_crc32c)
    console.print(f"the dataset has changed since {old.path} was made: {change}")
    if (reason := reason_against(setup, old)) is not None:
        console.print(f"  none of its records can be carried over: {reason}")
    else:
        again = shlex.join(["--caches", str(caches), *words, "--from", str(old.path)])
        console.print(f"  to carry unchanged records over: python -m precompute {again}")


def cache_bytes(path: Path) -> int:
    """What the journal of the cache at `path` says is committed; 0 where there is none."""
    try:
        return committed_bytes(open_source(path))
    except CacheError:
        return 0


def _job(name: str, rank: int, world: int) -> Job:
    if not name and world > 1:
        keys = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
        name = "-".join(os.environ.get(key, "") for key in keys)
        if not name.strip("-"):
            raise ConfigError("several processes need a name in common: add --job NAME")
    if rank >= world:
        raise ConfigError(f"--rank {rank} is not below --world {world}")
    return Job(name, rank, world)


def _share(job: Job) -> Share:
    """Of this machine: as LOCAL_RANK and LOCAL_WORLD_SIZE say; else as if all ranks ran here."""
    if job.world == 1 or "LOCAL_RANK" in os.environ or "LOCAL_WORLD_SIZE" in os.environ:
        return Share.of_this_process()
    return Share(job.rank, job.world)


def _if_complete(setup: Setup, recheck: bool, console: Console) -> TeacherCache | None:
    """The cache, if it holds all views and taps asked for and is sound; None if there is work.

    More that it was to hold, and does not, is no work: that growth was given up.
    """
    train, views = setup.dataset.train, setup.config.views
    try:
        cache = TeacherCache.open(setup.path, num_views=views.num_views, taps=setup.tap_names)
    except (CacheMissing, CacheIncomplete, UnknownTap, UnknownView):
        return None
    except CacheDamaged as error:
        console.print(f"{error.problem}\n  its damaged blocks will be computed again")
        return None
    cache.refuse_unless(cache.identity, labels=train.labels, canary=pixel_canary(train, views))
    if cache.manifest.measured_views < views.num_views or not setup.is_held_by(cache.taps):
        return None
    every_byte = recheck or cache_bytes(setup.path) <= _CHECKED_BYTES
    if faults := cache.source.faults(read=every_byte):
        shown = "\n".join(f"  {fault}" for fault in faults[:5])
        console.print(f"damaged, and to be computed again:\n{shown}")
        return None
    return cache


def _without_weights(setup: Setup, caches: Path) -> tuple[TeacherCache | None, str]:
    """The cache that needs no pass although the weights are not at hand; else why there is none.

    Raises CacheMismatch where its labels or pixels are not this dataset's, CacheAmbiguous.
    """
    train, views = setup.dataset.train, setup.config.views
    try:
        cache = find_cache(
            caches,
            setup.config.name,
            setup.identity,
            num_views=views.num_views,
            taps=setup.tap_names,
        )
    except CacheAmbiguous:
        raise
    except CacheError as error:
        return None, error.problem
    cache.refuse_unless(setup.identity, labels=train.labels, canary=pixel_canary(train, views))
    if not setup.is_held_by(cache.taps):
        wanted = ", ".join(setup.tap_names)
        return None, f"{cache.path} has not all of the taps {wanted}, stored as the config asks"
    return cache, ""


def _measured(cache: TeacherCache, config: TeacherConfig) -> str:
    found = cache.measured
    if not found:
        return "Its teacher's errors were not measured."
    has_top5 = len(cache.manifest.class_names) > 5
    top5 = f", {found['test_top5_error']:.2f} % top-5" if has_top5 else ""
    return (
        f"Teacher: test error {found['test_top1_error']:.2f} % top-1{top5}; right on "
        f"{100 * found['train_agreement']:.2f} % of the cached views."
        f"{_unexpected_error(config, found['test_top1_error'])}"
    )


def _unexpected_error(config: TeacherConfig, measured: float) -> str:
    """A warning where the teacher's test error is far from the one that its file names."""
    expected = config.teacher.expected_error
    if expected is None or config.teacher.bn != "eval":
        return ""
    if abs(measured - expected) <= _FAR_PERCENT:
        return ""
    return (
        f"\nWARNING: {config.name} names teacher.expected_error: {expected:.2f} %, and "
        f"{measured:.2f} % were measured. Most often this is one of two mistakes:\n"
        f"  dataset.normalisation is not that of the teacher's training\n"
        f"  the classes of the weights are in another order than the dataset's"
    )


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line; a mistake of the user's is one message and exit status 2."""
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(cli())
