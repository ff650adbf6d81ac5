"""How a user starts this project's programs: what the commands in messages begin with.

In the repository's folder `make` and `python -m` work, with the Python of the environment that
`make env` built. Anywhere else the project is installed, and its one command is `teach-once`:
`python -m train` would run a `train.py` of that folder. A message names them so that the user's
shell finds them: by their path where no environment is activated.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[3]  # the folder that holds the package `teach_once`


def in_repository() -> bool:
    """Return True if the current folder is the repository of this code, with its Makefile."""
    return (PROJECT / "Makefile").is_file() and Path.cwd().resolve() == PROJECT.resolve()


def program(name: str) -> list[str]:
    """The first words of a command that the user's shell can run now."""
    return [interpreter(), "-m", name] if in_repository() else [installed_command(), name]


def program_text(name: str) -> str:
    """The same as text."""
    return shlex.join(program(name))


def portable_program(name: str) -> list[str]:
    """The same for other readers, such as a report's: `python -m NAME`, or `teach-once NAME`."""
    return ["python", "-m", name] if in_repository() else ["teach-once", name]


def interpreter() -> str:
    """`python` if the shell finds this environment's under that name; else this one's path."""
    return _command("python", Path(sys.executable))


def installed_command() -> str:
    """`teach-once` if the shell finds this environment's, or there is none; else its path."""
    beside = Path(sys.executable).with_name("teach-once")
    return _command("teach-once", beside) if beside.exists() else "teach-once"


def pip_install(package: str) -> str:
    """The command that installs a package into this environment."""
    return shlex.join([interpreter(), "-m", "pip", "install", package])


def _command(name: str, file: Path) -> str:
    """`name` if the shell finds it where `file` is; else the path of `file`, relative if below."""
    found = shutil.which(name)
    # Not the files: a virtual environment's `python` is a link to one that lacks its packages.
    if found and Path(found).parent.resolve() == file.parent.resolve():
        return name
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)
