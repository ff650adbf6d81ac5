"""The finished run that is meant where another number of processes has trained it.

Only `training.batch_norm: local` makes that number part of a run's identity. Commands that look at
runs are one process, and take a run by whatever number it was trained.
"""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path

from runtime.reading import BadFile
from train.errors import TrainError
from train.run_files import RUN_FILE, read_run
from train.study import Run


def trained_by_any_number(run: Run) -> Run:
    """The run itself, or the finished one that differs in the number of processes alone.

    Raises TrainError where several numbers have trained it.
    """
    if run.training.batch_norm == "sync" or run.is_finished:
        return run
    files = run.study.folder.glob(f"{glob.escape(run.name)}-*/{RUN_FILE}")
    candidates = {path.parent: replace(run, ranks=_ranks_of(path.parent)) for path in files}
    found = [
        each for folder, each in candidates.items() if each.folder == folder and each.is_finished
    ]
    if len(found) > 1:
        folders = ", ".join(sorted(str(each.folder) for each in found))
        raise TrainError(
            f"{run} was trained by several numbers of processes, each with batch norms of its own: "
            f"{folders}",
            fix="move all but one of them elsewhere",
        )
    return found[0] if found else run


def _ranks_of(folder: Path) -> int:
    """As the run's file says; 1 where it says nothing that can be used."""
    try:
        training = (read_run(folder) or {}).get("training", {})
    except BadFile:
        return 1
    ranks = training.get("ranks")
    return ranks if isinstance(ranks, int) else 1
