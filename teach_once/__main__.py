"""teach-once COMMAND ...          builds whatever is missing, up to a result
teach-once PROGRAM ...          runs one program of the project, from any folder
teach-once COMMAND --help       prints the options of a command
teach-once --version            prints the version; `teach-once env` prints more

`teach-once train student NAME` is `python -m train student NAME`, independent of the files in the
current folder. Your own modules (a loss, a network) are found in the current folder, unless an
installed module has the same name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from teach_once import __version__
from teach_once.runtime.command.make_args import with_words
from teach_once.runtime.errors import did_you_mean
from teach_once.runtime.machine.resources import num_ranks
from teach_once.runtime.safe.text import one_line

# Name -> description. Reading descriptions from the modules would import the modules.
COMMANDS = {
    "new-teacher": "Print a config file for one of timm's models as a teacher.",
    "new-student": "Print a config file for a student of a teacher, with the methods that work.",
    "cache-teacher": "Train a teacher's weights if they are missing, and fill its cache.",
    "train-student": "Train one student; builds its teacher's weights and cache first.",
    "ablation": "Train a student with every method and seed, and write the report.",
    "env": "Print versions, processor, GPUs, memory and limits, for a bug report.",
}
PROGRAMS = {
    "configs": "Print configs with defaults and overrides applied.",
    "nets": "List the available networks.",
    "precompute": "Stage 1: run the teacher once and fill a cache.",
    "precompute.verify": "Run the teacher again on some records of a cache, and compare.",
    "report": "Summarize finished runs as a table, charts and a page.",
    "runtime.launch": "Run a program in several processes of this machine.",
    "store": "List, check, copy, export, convert and trim caches.",
    "train": "Stage 2: train students from a cache, and teachers that have no weights.",
    "views": "Pack datasets of images, and find images that cannot be used.",
}
_MODULES = {
    **{"precompute.verify": "precompute.verify", "runtime.launch": "runtime.launch"},
    **{"new-teacher": "new_teacher", "new-student": "new_student", "env": "environment"},
}


def _usage() -> str:
    commands, programs = (
        [f"  {name:<20}{purpose}" for name, purpose in table.items()]
        for table in (COMMANDS, PROGRAMS)
    )
    return "\n".join([str(__doc__), "Commands:", *commands, "", "Programs:", *programs])


def _put_last(folder: str) -> None:
    """Move a folder to the end of Python's path, so that its files do not hide other modules."""
    if sys.path[:1] in ([""], [folder]):  # as set by `python -m teach_once`
        del sys.path[0]
    if folder not in sys.path:
        sys.path.append(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if words == ["--version"]:
        print(f"teach-once {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS and name not in PROGRAMS:
        near = did_you_mean(name, [*COMMANDS, *PROGRAMS], most=3)
        problem = f"error: command {one_line(name)!r} not found{near}"
        print(f"{problem}\n  fix: teach-once --help", file=sys.stderr)
        return 2
    if name in COMMANDS and name not in _MODULES:
        rest = [name, *with_words(rest)]
        program, module = "teach-once", "teach_once.commands"
    else:
        program = f"teach-once {name}"
        module = f"teach_once.{_MODULES.get(name, f'{name}.__main__')}"
    status: int
    before, sys.argv = sys.argv, [program, *rest]  # messages print the command from sys.argv
    try:
        status = import_module(module).cli(rest)
    finally:
        sys.argv = before
    return status


def run() -> None:
    """Run the command line and end the process.

    Its changes to this process and to child processes are not undone.
    """
    if not sys.flags.safe_path:
        _put_last(os.getcwd())
        os.environ["PYTHONSAFEPATH"] = "1"  # child processes get the same sys.path
    status = main()
    if num_ranks() > 1:
        from teach_once.runtime.command.frame import end_process

        end_process(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
