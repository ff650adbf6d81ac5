"""Train or resume a requested run and print its result.

Loads torch only if there is something to train.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from teach_once.runtime.command.frame import new_console
from teach_once.runtime.command.options import Compute
from teach_once.runtime.command.program import program
from teach_once.runtime.machine.resources import num_ranks
from teach_once.store.read.mirror import shown_path
from teach_once.train.cli.plan import RunRequest
from teach_once.train.recording.options import Recording
from teach_once.train.recording.tracking import check_trackers
from teach_once.train.runs.folder import format_finished, format_probe, format_result
from teach_once.train.runs.probes import probe_of
from teach_once.train.runs.retrain import begin_again
from teach_once.train.runs.study import Run

if TYPE_CHECKING:
    from teach_once.train.engine.ranks import Ranks
    from teach_once.train.outputs.filling_teacher import ViewFiller


def train_single(
    request: RunRequest,
    compute: Compute,
    recording: Recording,
    *,
    retrain: bool = False,
    fillers: Sequence[ViewFiller] = (),
) -> None:
    """Train or resume a run and print its result.

    retrain: train a finished run again. fillers: one per teacher, if their caches may lack views.
    With several processes each calls this, and rank 0 prints and writes. Raises as
    `train.sessions.student.train_run` does. With several processes only the first one to fail
    raises, and the others end with its exit status.
    """
    check_trackers(recording.loggers)
    with joined(compute.device) as ranks:
        console, is_first = console_of(ranks), ranks is None or ranks.is_first
        run = request.open_run(reads_outputs=not fillers)
        if retrain and is_first:
            begin_again([run], compute.device)
        if ranks is not None:
            ranks.barrier()  # other ranks read the run's files, which rank 0 may have moved
        if run.is_finished and (summary := run.summary):
            console.print(format_finished(summary, run.folder))
            if is_first:
                print_probe(run, compute, console)
            return
        _announce(run, console)
        from teach_once.train.engine.ranks import ALONE  # these load torch
        from teach_once.train.sessions.student import train_run

        recording = replace(recording, console=console)
        summary = train_run(run, compute, recording, ranks or ALONE, fillers)
        if is_first:
            console.print(format_result(summary, run.folder))
            print_probe(run, compute, console)
            console.print(_format_next(request, run))


def print_probe(run: Run, compute: Compute, console: Console) -> None:
    """Print the probe of a finished run, if the teacher's file has one; measures it once."""
    if (result := _probed(run, compute)) is not None:
        console.print(format_probe(result))


def measure_missing_probes(runs: Sequence[Run], compute: Compute) -> None:
    """Measure the probes that finished runs lack. Raises as `measure_probe` does, or BadFile."""
    for run in runs:
        _probed(run, compute)


def _probed(run: Run, compute: Compute) -> Mapping[str, Any] | None:
    if (probe := probe_of(run)) is None:
        return None
    if (result := probe.result) is not None:
        return result
    from teach_once.train.sessions.probing import measure_probe

    return measure_probe(probe, compute)


def _format_next(request: RunRequest, run: Run) -> str:
    """Return the next commands for a trained student; only students of a cache can be exported."""
    caches, runs = request.storage.caches, request.storage.runs
    words = [*program("train"), "export", request.name, f"exported/{run.study.config.name}"]
    words += ["--method", run.method, "--seed", str(run.seed)]
    words += [] if caches == Path("caches") else ["--caches", str(caches)]
    words += ["--cache", str(request.storage.cache)] if request.storage.cache else []
    words += [] if runs == Path("runs") else ["--runs", str(runs)]
    compare = [*program("train"), "runs", run.study.config.name]
    compare += [] if runs == Path("runs") else ["--runs", str(runs)]
    if run.live_teacher:
        return f"  next: {shlex.join(compare)}"
    export = shlex.join([*words, *(request.overrides or ())])
    return f"  next: {export}\n  or:   {shlex.join(compare)}"


def _announce(run: Run, console: Console) -> None:
    if changes := run.changes():
        console.print("\n  ".join([f"differs from the last run of {run}:", *changes]))
    again = ", whose finished result is replaced at the end" if run.repetition else ""
    caches_read = " and ".join(str(shown_path(each.path)) for each in run.study.caches)
    console.print(f"{run}, from {caches_read} into {run.folder}{again}")


def joined(device: str) -> AbstractContextManager[Ranks | None]:
    """Yield the processes started by a launcher; None for one process, without loading torch."""
    if num_ranks() == 1:
        return nullcontext(None)
    # Otherwise every rank would warn that a step happened to reach all parameters.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from teach_once.train.engine.ranks import init_process_group

    return init_process_group(device)


def console_of(ranks: Ranks | None) -> Console:
    """Return a console that prints on rank 0 only."""
    return new_console() if ranks is None or ranks.is_first else Console(quiet=True)
