"""python -m report FOLDER [RUN ...] [--method M] [--cache PATH] [--asked TEXT] [--command TEXT]

Reads the finished runs of one student (runs/digits-resnet8), prints their table and writes
report.html, ablation.md, ablation.csv and ablation.png beside them. Chosen runs, several settings,
and settings other than those of report.html get other names, as in report-all.html.
`python -m train ablation` calls it at its end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from teach_once.runtime.command.frame import new_app, new_console, run_command
from teach_once.runtime.safe.text import visible

app = new_app()


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="one student's runs, such as runs/digits-resnet8")],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="folder names of the runs to report, in this order; default: all finished runs, "
            "where runs with other settings are other rows",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="report this method alone; may be given several times"),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="read the teacher's errors here if the runs lack them")
    ] = None,
    asked: Annotated[str, typer.Option(help="say that these runs were asked for")] = "",
    command: Annotated[
        list[str] | None, typer.Option(help="print this command; the first made the report")
    ] = None,
) -> None:
    """Write the report of a folder of runs and print its table."""
    from teach_once.report.write import write_report

    console = new_console()
    written = write_report(
        folder,
        names or (),
        methods=method or (),
        cache=cache,
        asked=asked,
        commands=command or (),
    )
    console.print(written.table)
    for line in written.left_out:
        print(visible(line), file=sys.stderr)
    end = written.suffix
    console.print(f"written to {folder}/report{end}.html, ablation{end}.md, .csv and .png")


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)
