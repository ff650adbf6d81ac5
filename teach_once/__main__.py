"""teach-once PROGRAM ...          any program of the project, from any folder
teach-once PROGRAM --help      what it takes

`teach-once train student NAME` is `python -m train student NAME`, whatever files are in the current
folder. Modules of yours (a loss, a network) are found there, unless an installed one has the name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

# Name -> what it is for. A table, since reading it from the modules would import them.
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
_MODULES = {"precompute.verify": "precompute.verify", "runtime.launch": "runtime.launch"}


def _usage() -> str:
    lines = [f"  {name:<20}{purpose}" for name, purpose in PROGRAMS.items()]
    return "\n".join([str(__doc__), "Programs:", *lines])


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
    name, *rest = words
    if name not in PROGRAMS:
        print(f"error: no program {name!r}\n  fix: one of {', '.join(PROGRAMS)}", file=sys.stderr)
        return 2
    if not sys.flags.safe_path:
        _put_last(os.getcwd())
        os.environ["PYTHONSAFEPATH"] = "1"  # processes that this one starts get its sys.path
    sys.argv = [f"teach-once {name}", *rest]
    module = import_module(f"teach_once.{_MODULES.get(name, f'{name}.__main__')}")
    status: int = module.cli(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
