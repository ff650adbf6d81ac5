"""python -m train.certify STUDENT --reduced CACHE [--full CACHE] [--record] [key=value ...]

Measures how a reduced cache changes losses: the relative change of CD, KD and GKD between the full
and the reduced cache, on up to 4,096 samples of view 0. It is measured for a student before its
first step, and again after --steps steps of --method on the full cache, because small losses change
most. --record writes the result into the reduced cache's certificate.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from teach_once.nets.teacher.draws import seeded
from teach_once.nets.teacher.taps import in_order
from teach_once.runtime.command.frame import new_app, new_console, run_command
from teach_once.runtime.command.options import Caches, Device, Overrides, StudentName, Workers
from teach_once.runtime.formats import counted
from teach_once.runtime.machine.devices import pick_device
from teach_once.store import TeacherCache
from teach_once.store.errors import CacheMismatch
from teach_once.store.format.certificate import LOSSES, STEPS, certified_blocks
from teach_once.store.identity import CONVERTED_FROM, differences
from teach_once.store.move.trim import record_figures
from teach_once.train.cli.options import Method, Seed, StudyStorage
from teach_once.train.cli.plan import open_named_study
from teach_once.train.engine.step import (
    ActiveTerm,
    TrainContext,
    active_terms,
    compute_losses,
    epoch_steps,
    start_epoch,
)
from teach_once.train.engine.train_state import capture_maps
from teach_once.train.errors import TrainError
from teach_once.train.losses import cd
from teach_once.train.outputs.teacher_outputs import Ids
from teach_once.train.runs.study import Run
from teach_once.train.sessions.student import open_context
from teach_once.train.terms import loss_named

app = new_app()


@app.command()
def main(
    name: StudentName,
    reduced: Annotated[Path, typer.Option(help="path of the reduced cache")],
    overrides: Overrides = None,
    full: Annotated[
        Path | None, typer.Option(help="path of the full cache; default: the teacher's in --caches")
    ] = None,
    method: Method = "cd+gkd",
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(min=1, help="maximum number of training steps")] = 1000,
    record: Annotated[
        bool, typer.Option("--record", help="write the result into the reduced cache")
    ] = False,
    caches: Caches = Path("caches"),
    device: Device = "auto",
    workers: Workers = None,
) -> None:
    """Print how losses change from a full cache to a reduced one."""
    study = open_named_study(name, overrides, StudyStorage(caches=caches, cache=full))
    run, cache = study.run(method, seed), TeacherCache.open(reduced, num_views=1, taps=())
    check_reduced(study.cache, cache)
    context = open_context(run, pick_device(device), num_workers=workers)
    try:
        figures = loss_changes(run, context, cache, steps)
    finally:
        context.teacher.close()
    console = new_console()
    console.print(f"{cache.path} against {study.cache.path}, {method}, seed {seed}")
    for student, when in (
        ("untrained", "before the first step"),
        ("trained", f"after {counted(int(figures[STEPS]), 'step')}"),
    ):
        changes = (f"{loss} {100 * figures[f'{loss}_change_{student}']:+.3f} %" for loss in LOSSES)
        console.print(f"{when}: {', '.join(changes)}")
    if record:
        record_figures(reduced, figures)


def check_reduced(full: TeacherCache, reduced: TeacherCache) -> None:
    """Raise CacheMismatch unless the caches differ only in how taps are stored."""
    of_teacher = [
        each
        for each in differences(full.identity, reduced.identity)
        if each.field.partition(".")[0] not in ("taps", CONVERTED_FROM)
    ]
    if of_teacher:
        raise CacheMismatch(
            f"{reduced.path} is not a reduced form of {full.path}", differences=of_teacher
        )


def loss_changes(
    run: Run, context: TrainContext, reduced: TeacherCache, steps: int
) -> dict[str, float]:
    """Train the context's student and return the relative changes of its losses.

    Names are those of `store.format.certificate`. Raises TrainError if the method has no connectors
    for CD or a cache lacks a tap.
    """
    if not any(loss_named(term.loss).function is cd for term in run.terms):
        raise TrainError(f"the method {run.method} has no term cd", fix="use --method cd+gkd")
    if len(run.study.teachers) > 1:
        raise TrainError("a student of several teachers has no single full cache")
    taps = [*in_order(run.study.cache.taps, "stage"), "logits", "correct"]
    blocks = certified_blocks(run.study.cache.manifest.blocks(1))
    ids = np.concatenate([np.arange(block.start, block.stop) for block in blocks])
    device = context.train_state.device
    both = [
        {tap: torch.from_numpy(rows).to(device) for tap, rows in cache.read(ids, 0, taps).items()}
        for cache in (run.study.cache, reduced)
    ]
    terms = active_terms(run.terms, run.training.epochs)
    steps = min(steps, context.num_steps * run.training.epochs)
    with capture_maps(context.train_state, context.data.train, run.training.batch_size):
        untrained = _changes(context, both, ids)
        _train(context, terms, steps)
        trained = _changes(context, both, ids)
    return {
        **{f"{loss}_change_untrained": change for loss, change in untrained.items()},
        **{f"{loss}_change_trained": change for loss, change in trained.items()},
        STEPS: steps,
    }


def _train(context: TrainContext, terms: Sequence[ActiveTerm], steps: int) -> None:
    context.train_state.train()
    for epoch in itertools.count(1):
        for _ in epoch_steps(context, epoch, start_epoch(context, epoch), terms):
            steps -= 1
            if steps == 0:
                return


@torch.no_grad()
def _changes(
    context: TrainContext, both: Sequence[dict[str, Tensor]], ids: Ids
) -> dict[str, float]:
    """Return each loss with the second cache's outputs, relative to the first cache's, minus 1.

    ids: the records' samples. The student is in training mode, as when losses are computed, and
    both caches are read with the same random draws.
    """
    terms, done = [ActiveTerm(loss, 1.0, {}) for loss in LOSSES], 0
    sums = [dict.fromkeys(LOSSES, 0.0) for _ in both]
    context.train_state.train()
    for batch in context.data.train.batches([0], ids, context.run.training.batch_size):
        rows = slice(done, done + len(batch.ids))
        done = rows.stop
        if len(batch.ids) == 1:  # batch norm rejects a single sample
            continue
        for records, total in zip(both, sums, strict=True):
            outputs = {tap: values[rows] for tap, values in records.items()}
            with seeded(0):
                losses = compute_losses(context.train_state, outputs, batch, terms)
            context.train_state.maps.clear()
            for loss in LOSSES:
                total[loss] += losses[loss].item() * len(batch.ids)
    return {loss: sums[1][loss] / sums[0][loss] - 1 for loss in LOSSES}


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(cli())
