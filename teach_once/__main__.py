"""teach-once COMMAND ...          from nothing to a result: builds whatever is missing first
teach-once PROGRAM ...          one thing alone: any program of the project, from any folder
teach-once COMMAND --help       what it takes
teach-once --version            the version; `teach-once env` prints more

`teach-once train student NAME` is `python -m train student NAME`, whatever files are in the current
folder. Modules of yours (a loss, a network) are found there, unless an installed one has the name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from teach_once import __version__
from teach_once.runtime.command.make_args import with_words
from teach_once.runtime.machine.resources import num_ranks

# Name -> what it is for. Tables, since reading them from the modules would import these.
COMMANDS = {
    "new-teacher": "Print a file for one of timm's models as a teacher.",
    "new-student": "Print a file for a student of a teacher's file, with the methods that work.",
    "cache-teacher": "Train a teacher's weights if they are missing, and fill its cache.",
    "train-student": "Train one student; builds its teacher's weights and cache first.",
    "ablation": "Train a student with every method and seed, and write the report.",
    "env": "Print versions, processor, GPUs, memory and limits, for a bug report.",
}
PROGRAMS = {
    "configs": "What a cache and a run are, as validated YAML.",
    "nets": "The networks by name, their taps, and the teacher's pass.",
    "precompute": "Stage 1: run the teacher once and fill a cache.",
    "precompute.verify": "Run the teacher again on some records of a cache, and compare.",
    "report": "What came out: the finished runs of a folder as a table, charts and a page.",
    "runtime.launch": "Run a program in several processes of this machine.",
    "store": "The teacher cache: list, check, copy, export, convert, trim.",
    "train": "Stage 2: train students from a cache, and teachers that have no weights.",
    "views": "Datasets of images: pack them, find those that cannot be used.",
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
    """Have Python look in a folder last, so that no file there takes another module's place."""
    if sys.path[:1] in ([""], [folder]):  # as `python -m teach_once` has it
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
        known = ", ".join([*COMMANDS, *PROGRAMS])
        print(f"error: no program {name!r}\n  fix: one of {known}", file=sys.stderr)
        return 2
    if name in COMMANDS and name not in _MODULES:
        rest = [name, *with_words(rest)]
        program, module = "teach-once", "teach_once.commands"
    else:
        program = f"teach-once {name}"
        module = f"teach_once.{_MODULES.get(name, f'{name}.__main__')}"
    status: int
    before, sys.argv = sys.argv, [program, *rest]  # messages print the command from it
    try:
        status = import_module(module).cli(rest)
    finally:
        sys.argv = before
    return status


def run() -> None:
    """Run the command line and end the process.

    What it changes for the process, and for those that it starts, is not undone.
    """
    if not sys.flags.safe_path:
        _put_last(os.getcwd())
        os.environ["PYTHONSAFEPATH"] = "1"  # processes that this one starts get its sys.path
    status = main()
    if num_ranks() > 1:
        from teach_once.runtime.command.frame import end_process

        end_process(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
