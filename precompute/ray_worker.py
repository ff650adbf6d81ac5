"""The work of a cluster's worker in a pass: build the teacher once, then compute blocks.

Chunks are written into the cache's folder under temporary names, and the driver commits them
(`store.write.staging`). With a cache on an object store the worker commits its own blocks
(`store.place.bucket_log`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from teach_once.configs.commands import cache_command
from teach_once.configs.schema import TeacherConfig
from teach_once.precompute.compute.blocks import run_blocks
from teach_once.precompute.compute.setup import require_weights, setup_of
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.precompute.compute.trial import fastest_batch, pass_rate
from teach_once.precompute.run_pass import measured, naming_changed_files
from teach_once.runtime.command.options import SPOOL
from teach_once.runtime.command.ray import ClusterError
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.machine.devices import pick_device
from teach_once.runtime.machine.urls import spool_folder
from teach_once.runtime.safe.locks import WriterLock, numbered_folder
from teach_once.store.errors import fixes_spelled_by
from teach_once.store.identity import Identity
from teach_once.store.place.mirror_folder import MirrorFolder, use_mirror, used_mirror
from teach_once.store.place.open import place_at
from teach_once.store.write.destination import Handout, writer_on_node
from teach_once.store.write.pending_blocks import Work
from teach_once.store.write.staging import AsideWriter, Written
from teach_once.views.datasets import load_dataset


@dataclass(frozen=True)
class PassRecipe:
    """Settings with which a worker builds the same pass as the driver."""

    config: TeacherConfig
    caches: Path
    identity: Identity
    device: str
    num_workers: int | None
    spool: Path = SPOOL
    mirror: MirrorFolder = field(default_factory=used_mirror)


class Pace(NamedTuple):
    """Rate of one worker. images_per_second: 0 if it was not measured."""

    batch_size: int
    images_per_second: float = 0.0


class _Worker:
    """The pass that this worker process has built, and its spool folders, which it locks."""

    def __init__(self) -> None:
        self._built: tuple[PassRecipe, TeacherPass] | None = None
        self._spool_folders: dict[Path, tuple[Path, WriterLock]] = {}

    def teacher_pass(self, recipe: PassRecipe) -> TeacherPass:
        """Build the pass once per process; only the rate changes. Raises ClusterError."""
        if self._built is None or self._built[0] != recipe:
            self._built = None  # free its memory before building the next pass
            self._built = recipe, _build_pass(recipe)
        return self._built[1]

    def spool_folder(self, teacher_pass: TeacherPass) -> Path:
        """Return this process's spool folder: the cache's folder, if it is local."""
        if place_at(teacher_pass.setup.path).is_local:
            return teacher_pass.folder
        if teacher_pass.folder not in self._spool_folders:
            self._spool_folders[teacher_pass.folder] = numbered_folder(teacher_pass.folder)
        return self._spool_folders[teacher_pass.folder][0]


_worker = _Worker()  # Ray calls functions of this module, which keep their work here


def compute(
    recipe: PassRecipe, handout: Handout, pace: Pace, work: Sequence[Work]
) -> list[Written]:
    """Compute and write blocks of the same samples; returns those that the driver must commit.

    Raises CacheError or DatasetError.
    """
    teacher_pass = _worker.teacher_pass(recipe)
    teacher_pass.batch_size, teacher_pass.images_per_second = pace
    setup, quiet = teacher_pass.setup, Console(file=io.StringIO())
    writer = writer_on_node(handout, work, _worker.spool_folder(teacher_pass))
    with (
        naming_changed_files(setup),
        fixes_spelled_by(
            lambda more: cache_command(setup.config, caches_dir=recipe.caches, more=more)
        ),
    ):
        run_blocks(teacher_pass, writer, work, StopRequest(), quiet)
    return writer.written if isinstance(writer, AsideWriter) else []


def measured_pace(recipe: PassRecipe, batch_size: int | None) -> Pace:
    """Measure the rate at `batch_size`; None: at the fastest batch size."""
    teacher_pass = _worker.teacher_pass(recipe)
    if batch_size is None:
        return Pace(*fastest_batch(teacher_pass))
    teacher_pass.batch_size = batch_size
    return Pace(batch_size, pass_rate(teacher_pass))


def measured_of_pass(recipe: PassRecipe, images_per_second: float) -> dict[str, float]:
    """Return `precompute.run_pass.measured` for a pass whose blocks are all committed."""
    quiet = Console(file=io.StringIO())
    return measured(_worker.teacher_pass(recipe), images_per_second, StopRequest(), quiet)


def _build_pass(recipe: PassRecipe) -> TeacherPass:
    kept_in = spool_folder(recipe.caches, recipe.spool)
    use_mirror(recipe.mirror)
    dataset = load_dataset(recipe.config.dataset, kept_in)
    setup = require_weights(setup_of(recipe.config, dataset, recipe.caches))
    if setup.identity != recipe.identity:
        raise ClusterError(
            f"this node would compute another cache, {setup.path.name}: its images or weights "
            f"differ from the head node's",
            fix="use a folder that all nodes share, or copy the same files to all of them",
        )
    device = pick_device(recipe.device)
    return TeacherPass(
        setup, PassOptions(device, num_workers=recipe.num_workers, spool=recipe.spool)
    )
