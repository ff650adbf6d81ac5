"""One student by a command: alone, or by all processes that a launcher has started.

Loads torch only when there is something to train.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console

from runtime.commands import new_console
from runtime.limits import num_ranks
from store.mirror import shown_path
from train.repeat import begin_again
from train.runs import format_result
from train.study import Run

if TYPE_CHECKING:
    from train.ranks import Ranks


def train_single(
    opened: Callable[[], Run],
    *,
    redo: bool = False,
    device: str = "auto",
    num_workers: int | None = None,
    checkpoint_minutes: float = 10.0,
    track: Sequence[str] = (),
) -> None:
    """Train a run, or resume it, and print its result. redo: train a finished one again.

    opened: opens the run. Several processes all call this; the first one prints and writes. Raises
    as `train.student.train_student` does; of several processes the first one to fail does, and the
    others end with its exit status.
    """
    with joined(device) as ranks:
        console, is_first = console_of(ranks), ranks is None or ranks.is_first
        run = opened()
        if redo and is_first:
            begin_again([run], device)
        if ranks is not None:
            ranks.wait_for_all()  # they look at the run's files, which the first one may have moved
        if run.is_finished and (summary := run.summary):
            console.print(f"{run.folder} is finished: nothing to do.")
        else:
            options: dict[str, Any] = {} if ranks is None else {"ranks": ranks}
            summary = _trained(
                run,
                console,
                device=device,
                num_workers=num_workers,
                checkpoint_minutes=checkpoint_minutes,
                track=track,
                **options,
            )
        if is_first:
            console.print(format_result(summary, run.folder))


def _trained(run: Run, console: Console, **options: Any) -> dict[str, Any]:
    from train.student import train_student

    if changes := run.changes():
        console.print("\n  ".join([f"differs from the last run of {run}:", *changes]))
    again = ", whose finished result is replaced at the end" if run.repetition else ""
    caches_read = " and ".join(str(shown_path(each.path)) for each in run.study.caches)
    console.print(f"{run}, from {caches_read} into {run.folder}{again}")
    return train_student(run, console=console, **options)


def joined(device: str) -> AbstractContextManager[Ranks | None]:
    """The processes that a launcher has started, as `train.ranks`; None, without torch, of one."""
    if num_ranks() == 1:
        return nullcontext(None)
    # Once, as torch is loaded: every rank would warn that a step happened to reach all parameters.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from train.ranks import joined_ranks

    return joined_ranks(device)


def console_of(ranks: Ranks | None) -> Console:
    """Prints nothing but on rank 0."""
    return new_console() if ranks is None or ranks.is_first else Console(quiet=True)
