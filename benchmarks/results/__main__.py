"""python -m benchmarks.results train [PART ...] [--study FILE] [--jobs 2]
python -m benchmarks.results write
python -m benchmarks.results half-size FOLDER DEST

The results page is computed from docs/results/STUDY.json: the results of finished runs, and the
commands that trained them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from benchmarks.results import page
from benchmarks.results.long_study import STUDY, LongStudy
from teach_once.runtime.command.frame import new_app, run_command
from teach_once.runtime.command.options import Device
from teach_once.runtime.errors import UserError

app = new_app(__doc__)
_ENDINGS = (".jpg", ".jpeg", ".png")


@app.command()
def train(
    parts: Annotated[list[str] | None, typer.Argument(help="default: all of the study")] = None,
    study: Annotated[Path, typer.Option(help="lists caches, parts and runs")] = STUDY,
    jobs: Annotated[int, typer.Option(help="number of runs trained in parallel")] = 2,
    device: Device = "auto",
) -> None:
    """Train the runs behind the results page, and keep them; see `results.long_study`."""
    long_study = LongStudy(study, jobs, device)
    known = long_study.parts
    if unknown := [part for part in parts or () if part not in known]:
        raise UserError(f"unknown part {', '.join(unknown)}", fix=f"one of {', '.join(known)}")
    for part in parts or known:
        long_study.train(part)


@app.command()
def write() -> None:
    """Compute the tables and pictures of the results page again."""
    for each in page.PAGES:
        page.write(each)


@app.command()
def half_size(folder: Path, dest: Path) -> None:
    """Write every image of a folder at half its width and height into DEST, as PNG.

    Each pixel is the mean of four. Networks take a quarter of the time for them. Images of DEST
    that exist are kept.
    """
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS)
    if not images:
        raise UserError(f"{folder} contains no images")
    for path in images:
        half = (dest / path.relative_to(folder)).with_suffix(".png")
        if not half.exists():
            half.parent.mkdir(parents=True, exist_ok=True)
            aside = half.with_suffix(".tmp")
            with Image.open(path) as image:
                image.convert("RGB").reduce(2).save(aside, format="PNG")
            aside.rename(half)
    print(f"{dest}: {len(images):,} images")


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(cli())
