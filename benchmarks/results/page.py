"""python -m benchmarks.results keep STUDY RUNS_FOLDER [RUN ...] --command "make ablation ..."
python -m benchmarks.results write

docs/results.md rests on docs/results/STUDY.json: what finished runs say of themselves, and the
commands that trained them. `keep` puts a folder of runs into such a file; --label names them where
their methods do not ("{method}, 4 views"), and --cache reads how large a record is. `write`
computes every table of the page from these files again, between the marks

    <!-- table: STUDY errors -->  ...  <!-- end -->

and draws every picture that is asked for by

    <!-- picture: STUDY curves FILE.png -->

Of a study's methods, those to be shown may follow after a colon, in this order; names with spaces
in quotes: <!-- table: STUDY paired: cd "cd, 4 views" -->.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks.results.kept import KEPT, LabelledResult, ResultsError, keep, load_kept
from benchmarks.results.pictures import PICTURES
from benchmarks.results.tables import TABLES
from teach_once.report.table import in_markdown
from teach_once.runtime.errors import UserError
from teach_once.runtime.safe.files import write_atomically

PAGE = Path("docs/results.md")
_METHODS = r"(?:: (?P<methods>[^>]*?))?"
_TABLE = re.compile(
    rf"<!-- table: (?P<study>[\w.+-]+) (?P<kind>\w+){_METHODS} -->\n.*?<!-- end -->", re.DOTALL
)
_PICTURE = re.compile(
    rf"<!-- picture: (?P<study>[\w.+-]+) (?P<kind>\w+) (?P<file>[\w.+-]+\.png){_METHODS} -->"
)
_Made = TypeVar("_Made")


def page_with_tables(text: str, folder: Path = KEPT) -> str:
    """The page with every marked table computed from the kept files. Raises ResultsError."""

    def table(mark: re.Match[str]) -> str:
        opening = mark[0].partition("\n")[0]
        make = _of_kind(TABLES, mark, opening)
        return f"{opening}\n{in_markdown(make(_runs(mark, opening, folder)))}<!-- end -->"

    return _TABLE.sub(table, text)


def pictures_of(text: str, folder: Path = KEPT) -> dict[str, bytes]:
    """{file name: PNG bytes} of every marked picture of the page. Raises ResultsError."""
    return {
        mark["file"]: _of_kind(PICTURES, mark, mark[0])(_runs(mark, mark[0], folder))
        for mark in _PICTURE.finditer(text)
    }


def _of_kind(known: Mapping[str, _Made], mark: re.Match[str], opening: str) -> _Made:
    if mark["kind"] not in known:
        what = opening.split()[1].rstrip(":")
        raise ResultsError(f"{opening}: unknown {what}; known: {', '.join(known)}")
    return known[mark["kind"]]


def _runs(mark: re.Match[str], opening: str, folder: Path) -> Sequence[LabelledResult]:
    """Of a mark's study, or of those of its methods that it names."""
    runs = load_kept(folder / f"{mark['study']}.json")
    methods = shlex.split(mark["methods"] or "")
    found = {run.result.method for run in runs}
    if unknown := [method for method in methods if method not in found]:
        raise ResultsError(f"{opening}: no run of {', '.join(unknown)} is kept")
    return [r for method in methods for r in runs if r.result.method == method] or runs


def write(page: Path = PAGE, folder: Path = KEPT) -> None:
    """Raises ResultsError, before anything is written."""
    text = page.read_text()
    written, pictures = page_with_tables(text, folder), pictures_of(text, folder)
    write_atomically(page, written.encode())
    for name, png in pictures.items():
        write_atomically(page.parent / name, png)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="do", required=True)
    keeping = commands.add_parser("keep", help="put finished runs into docs/results/STUDY.json")
    keeping.add_argument("study")
    keeping.add_argument("folder", type=Path)
    keeping.add_argument("runs", nargs="*")
    keeping.add_argument("--command", required=True, help="that trained them")
    keeping.add_argument("--jobs", type=int, default=1, help="how many were trained side by side")
    keeping.add_argument("--label", default="{method}", help="of a run, on the page")
    keeping.add_argument("--cache", type=Path, help="that they read")
    commands.add_parser("write", help="compute the tables and pictures of docs/results.md again")
    options = parser.parse_args(arguments)
    try:
        if options.do == "keep":
            file = keep(
                options.study,
                options.folder,
                options.runs,
                options.command,
                jobs=options.jobs,
                label=options.label,
                cache=options.cache,
            )
            print(file)
        else:
            write()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
