"""Command-line arguments and options that several programs share, explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teach_once.runtime.command.program import program_text
from teach_once.runtime.errors import UserError
from teach_once.runtime.machine.devices import refuse_unknown_device
from teach_once.runtime.machine.urls import ObjectUrl, path_or_url

TeacherName = Annotated[
    str,
    typer.Argument(
        metavar="NAME|PATH", help="configs/teacher/NAME.yaml, or the path of a YAML file"
    ),
]
StudentName = Annotated[
    str,
    typer.Argument(
        metavar="NAME|PATH", help="configs/student/NAME.yaml, or the path of a YAML file"
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="other values for keys of the config"),
]


def _folder(text: str | Path) -> Path:
    if isinstance(path := path_or_url(text), ObjectUrl):
        copy = f"{program_text('store')} copy"
        raise UserError(
            f"{path}: this command takes a folder of caches, not a URL",
            fix=f"{copy} CACHE {path} and {copy} {path}/CACHE caches",
        )
    return path


Caches = Annotated[
    Path, typer.Option(metavar="PATH", help="folder that holds the caches", parser=_folder)
]
CachesOrUrl = Annotated[
    Path,
    typer.Option(
        metavar="PATH",
        help="folder, or s3://bucket/prefix, that holds the caches",
        parser=path_or_url,
    ),
]
CacheOrUrl = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="PATH",
        help="the cache to use: its folder, .h5 file, or s3://bucket/prefix/cache",
        parser=path_or_url,
    ),
]
MirrorFolder = Annotated[
    Path, typer.Option("--mirror", help="folder that holds what was read of s3://bucket/prefix")
]
MirrorSize = Annotated[
    float, typer.Option("--mirror-gb", min=0, help="how large that folder may become, in 10^9 B")
]
MIRROR, MIRROR_GB = Path("mirror"), 50.0

SPOOL = Path("spool")
SpoolFolder = Annotated[
    Path,
    typer.Option(
        "--spool",
        help="with a URL: folder on this machine for records of unfinished blocks",
    ),
]


def _known_device(name: str) -> str:
    refuse_unknown_device(name)
    return name


Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", callback=_known_device)]
Workers = Annotated[int | None, typer.Option(min=0, help="worker processes that read images")]
OfStudent = Annotated[
    bool,
    typer.Option(
        "--of-student",
        help="NAME is a student; take its teacher, and overrides as teacher.KEY=VALUE",
    ),
]
ClusterAddress = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="auto|local|ADDRESS",
        help="Ray cluster to work on; auto: the one running here, else, as local, this machine",
    ),
]
