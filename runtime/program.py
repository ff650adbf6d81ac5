"""How a user starts this project's programs: what the commands in messages begin with.

In the repository's folder `make` and `python -m` work. Anywhere else the project is installed, and
its one command is `teach-once`: `python -m train` would run a `train.py` of that folder.
"""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parent.parent


def in_repository() -> bool:
    """Whether the current folder is the repository that this code is in, with its Makefile."""
    return (_ROOT / "Makefile").is_file() and Path.cwd().resolve() == _ROOT.resolve()


def program(name: str) -> list[str]:
    """The first words of a command: `python -m NAME`, or `teach-once NAME`."""
    return ["python", "-m", name] if in_repository() else ["teach-once", name]


def program_text(name: str) -> str:
    """The same as text."""
    return " ".join(program(name))
