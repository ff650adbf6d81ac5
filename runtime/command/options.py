"""Command-line arguments and options that several programs share, explained once.

Options that travel together are fields of a dataclass, which the command line fills in once and
functions hand on whole: `CacheStorage`, `Compute`. A command takes one as a parameter whose default
is such a dataclass, below `takes_option_groups`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

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


@dataclass(frozen=True)
class CacheStorage:
    """Where the caches are, and the mirror of those at a URL with its size in 10^9 bytes."""

    caches: CachesOrUrl = Path("caches")
    mirror: MirrorFolder = MIRROR
    mirror_gb: MirrorSize = MIRROR_GB


@dataclass(frozen=True)
class Compute:
    """The device that computes, and the number of worker processes that read images."""

    device: Device = "auto"
    workers: Workers = None


def takes_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command have dataclasses of options as parameters: each field becomes an option.

    A parameter is such a group if its default is a dataclass; the fields have their own defaults.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, type[Any]] = {
        name: type(each.default)
        for name, each in signature.parameters.items()
        if dataclasses.is_dataclass(each.default)
    }
    options: list[inspect.Parameter] = []
    for name, each in signature.parameters.items():
        if (group := groups.get(name)) is None:
            options.append(each)
            continue
        hints = get_type_hints(group, include_extras=True)
        options += [
            each.replace(name=one.name, default=one.default, annotation=hints[one.name])
            for one in dataclasses.fields(group)
        ]

    @functools.wraps(command)
    def with_groups(**given: object) -> None:
        for name, group in groups.items():
            names = [each.name for each in dataclasses.fields(group)]
            given[name] = group(**{each: given.pop(each) for each in names})
        command(**given)

    with_groups.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    with_groups.__annotations__ = {each.name: each.annotation for each in options}
    return with_groups
