"""Build the commands in messages so that the user's shell can run them.

In the repository's folder, `make` and `python -m` work with the Python of the environment built by
`make env`. Elsewhere the project is installed and its only command is `teach-once`, because
`python -m train` would run a `train.py` in the current folder. If no environment is activated,
commands are given by path.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[3]  # the folder of the package `teach_once`


def in_repository() -> bool:
    """Return True if the current folder is the repository of this code, with its Makefile."""
    return (PROJECT / "Makefile").is_file() and Path.cwd().resolve() == PROJECT.resolve()


def program(name: str) -> list[str]:
    """Return the first words of a command that the user's shell can run now."""
    return [interpreter(), "-m", name] if in_repository() else [installed_command(), name]


def program_text(name: str) -> str:
    """Return `program(name)` as text."""
    return shlex.join(program(name))


def portable_program(name: str) -> list[str]:
    """Return the words for other readers, as in reports: `python -m NAME` or `teach-once NAME`."""
    return ["python", "-m", name] if in_repository() else ["teach-once", name]


def interpreter() -> str:
    """Return `python` if the shell finds this environment's under that name, otherwise its path."""
    return _command("python", Path(sys.executable))


def installed_command() -> str:
    """Return `teach-once` if the shell finds it or it is not installed, otherwise its path."""
    beside = Path(sys.executable).with_name("teach-once")
    return _command("teach-once", beside) if beside.exists() else "teach-once"


def pip_install(package: str) -> str:
    """Return the command that installs a package into this environment."""
    return shlex.join([interpreter(), "-m", "pip", "install", package])


def _command(name: str, file: Path) -> str:
    """Return `name` if the shell finds `file` under it, otherwise the path of `file`."""
    found = shutil.which(name)
    # Compare paths, not files: a virtual environment's `python` links to one without its packages.
    if found and Path(found).parent.resolve() == file.parent.resolve():
        return name
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)
