"""Runs `python -m report` for a study: `train` is below `report` and cannot import it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from train.runs import FoundRun, finished_alike, runs_below
from train.study import Study

_ROOT = Path(__file__).parent.parent


def finished_of(study: Study) -> list[FoundRun]:
    """The finished runs of a study, whatever was asked for now: in the order of its methods."""
    own = {method: study.run(method, 0).identity for method in study.config.methods}
    return finished_alike(runs_below(study.runs_dir, study.config.name), own)


def write_report(study: Study, asked: str, commands: Sequence[str], console: Console) -> int:
    """Run `python -m report` on the finished runs of a study; returns its exit status.

    Prints what it prints. asked: which methods and seeds were asked for now. commands: to be
    printed in the report.
    """
    names = [run.folder.name for run in finished_of(study)]
    call = ["report", "--cache", str(study.cache.path), "--asked", asked]
    call += [word for command in commands for word in ("--command", command)]
    # Finds the project's package from any folder; -P ignores a report.py in that folder.
    result = subprocess.run(
        [sys.executable, "-P", "-m", *call, "--", str(study.folder), *names],
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    console.print(result.stdout.rstrip("\n"))
    print(result.stderr, end="", file=sys.stderr)
    return result.returncode
