"""teach-once PROGRAM ...          any program of the project, from any folder
teach-once PROGRAM --help      what it takes

`teach-once train student NAME` is `python -m train student NAME`, whatever files are in the current
folder. Modules of yours (a loss, a network) are found there, unless an installed one has the name.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from teach_once import PACKAGES, ROOT


def programs() -> dict[str, str]:
    """Name -> what it is for, in one line."""
    names = [each for each in PACKAGES if (ROOT / each / "__main__.py").is_file()]
    return {
        **{name: _first_line(ROOT / name / "__init__.py") for name in names},
        "precompute.verify": "Run the teacher again on some records of a cache, and compare.",
        "runtime.launch": "Run a program in several processes of this machine.",
    }


def _first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]


def _usage() -> str:
    lines = [f"  {name:<20}{purpose}" for name, purpose in programs().items()]
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
    if name not in programs():
        print(f"error: no program {name!r}\n  fix: one of {', '.join(programs())}", file=sys.stderr)
        return 2
    if not sys.flags.safe_path:
        _put_last(os.getcwd())
        os.environ["PYTHONSAFEPATH"] = "1"  # processes that this one starts get its sys.path
    module = f"{name}.__main__" if name in PACKAGES else name
    sys.argv = [f"teach-once {name}", *rest]
    status: int = import_module(module).cli(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
