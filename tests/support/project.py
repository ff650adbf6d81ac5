"""A copy of the project's files, and `make` in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import cache_from_source
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# Settings that make a run of digits-resnet8 short.
QUICK_RUN = [
    "training.epochs=3",
    "training.schedule.milestones=[2]",
    "methods.cd+gkd+edt.0.start_epoch=2",
    "methods.cd+gkd+edt.1.start_epoch=2",
]
QUICK_ARGS = "ARGS=" + " ".join([*QUICK_RUN, "teacher.training.epochs=1"])


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def makefile_targets() -> set[str]:
    """Return the targets printed by `make help`."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    return {line.partition(":")[0] for line in lines if ":" in line and " ## " in line}


def copy_project(target: Path) -> Path:
    """Copy the files that git tracks or would add to a new folder, with this environment."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
        _copy_bytecode(ROOT / name, target / name)
    environment = target / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (environment / "bin" / "python").chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", environment / "installed.txt")
    return target


def _copy_bytecode(source: Path, target: Path) -> None:
    """Copy bytecode; otherwise the first program of each copy compiles the whole project."""
    compiled = Path(cache_from_source(str(source)))
    if source.suffix == ".py" and compiled.is_file():
        (target.parent / "__pycache__").mkdir(exist_ok=True)
        shutil.copy2(compiled, target.parent / "__pycache__")
