"""Command-line arguments and options shared by several programs, each explained once.

Options that belong together are fields of a dataclass, such as `CacheStorage` or `Compute`, which
is passed on as a whole. A command with the decorator `takes_option_groups` takes such a dataclass
as a parameter.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from teach_once.runtime.command.help import DATA, MACHINE, RUN
from teach_once.runtime.command.program import program_text
from teach_once.runtime.errors import UserError
from teach_once.runtime.machine.devices import check_device_name
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
    typer.Argument(metavar="KEY=VALUE", help="new values for keys of the config"),
]


def _folder(text: str | Path) -> Path:
    if isinstance(path := path_or_url(text), ObjectUrl):
        copy = f"{program_text('store')} copy"
        raise UserError(
            f"{path}: this command takes a folder of caches, not a URL",
            fix=f"{copy} CACHE {path} and {copy} {path}/CACHE caches",
        )
    return path


Caches = Annotated[Path, typer.Option(metavar="PATH", help="folder of the caches", parser=_folder)]
CachesOrUrl = Annotated[
    Path,
    typer.Option(
        metavar="PATH",
        help="folder or s3://bucket/prefix of the caches",
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
    Path, typer.Option("--mirror", help="local folder for data fetched from S3")
]
MirrorSize = Annotated[
    float, typer.Option("--mirror-gb", min=0, help="maximum size of that folder in 10^9 bytes")
]
MIRROR, MIRROR_GB = Path("mirror"), 50.0

SPOOL = Path("spool")
SpoolFolder = Annotated[
    Path,
    typer.Option(
        "--spool",
        help="with a URL: local folder for records of unfinished blocks",
    ),
]


def _known_device(name: str) -> str:
    check_device_name(name)
    return name


Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda, cuda:1, ...", callback=_known_device, rich_help_panel=MACHINE
    ),
]
Workers = Annotated[int | None, typer.Option(min=0, help="worker processes that read images")]
OfStudent = Annotated[
    bool,
    typer.Option(
        "--of-student",
        help="NAME is a student: use its teacher, with overrides as teacher.KEY=VALUE",
    ),
]
ClusterAddress = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="auto|local|ADDRESS",
        rich_help_panel=MACHINE,
        help="Ray cluster; auto: a running one, otherwise this machine; local: this machine",
    ),
]


_QUIET, _PLAN = "quiet", "plan"
_BY_NAME = inspect.Parameter.KEYWORD_ONLY
_Quiet = Annotated[bool, typer.Option("--quiet", help="print errors only", rich_help_panel=RUN)]


@dataclass(frozen=True)
class CacheStorage:
    """Location of the caches, and for a URL the local mirror with its size in 10^9 bytes."""

    panel: ClassVar = DATA
    caches: CachesOrUrl = Path("caches")
    mirror: MirrorFolder = MIRROR
    mirror_gb: MirrorSize = MIRROR_GB


@dataclass(frozen=True)
class Compute:
    """The device, and the number of worker processes that read images."""

    panel: ClassVar = MACHINE
    device: Device = "auto"
    workers: Workers = None


def takes_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses as parameters: each field becomes an option or an argument.

    Fields that are dataclasses are option groups too. A dataclass's `panel` is the heading of its
    options in the help.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters = list(signature.parameters.values())
    groups = {each.name: each.annotation for each in parameters if _is_group(each.annotation)}
    options: list[inspect.Parameter] = []
    for each in parameters:
        options += _options_of(groups[each.name]) if each.name in groups else [each]
    options = [each.replace(kind=_BY_NAME) for each in options]

    @functools.wraps(command)
    def with_groups(**given: object) -> None:
        is_quiet = given.pop(_QUIET, False) and not given.get(_PLAN)  # a plan is what was requested
        with _discard_output(bool(is_quiet)):
            command(**{name: _take(group, given) for name, group in groups.items()}, **given)

    return _with_options(with_groups, options)


def can_be_quiet(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option --quiet, which discards what it prints; errors go to stderr."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [each.replace(kind=_BY_NAME) for each in signature.parameters.values()]
    parameters.append(inspect.Parameter(_QUIET, _BY_NAME, default=False, annotation=_Quiet))
    if hasattr(command, "__wrapped__"):  # by `takes_option_groups`, which takes it: a frame less
        return _with_options(command, parameters)

    @functools.wraps(command)
    def with_quiet(*, quiet: bool, **given: object) -> None:
        with _discard_output(quiet):
            command(**given)

    return _with_options(with_quiet, parameters)


@contextmanager
def _discard_output(is_quiet: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if is_quiet:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def _with_options(
    command: Callable[..., None], options: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """Let typer read a command's options from `options`."""
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in options}
    return command


def _is_group(annotation: object) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _options_of(group: type) -> list[inspect.Parameter]:
    """Return the options for the fields of a group, in order."""
    hints = get_type_hints(group, include_extras=True)
    options: list[inspect.Parameter] = []
    for field in dataclasses.fields(group):
        if _is_group(hint := hints[field.name]):
            options += _options_of(hint)
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        kind, annotation = inspect.Parameter.KEYWORD_ONLY, _in_panel(hint, group)
        options.append(inspect.Parameter(field.name, kind, default=default, annotation=annotation))
    return options


def _in_panel(hint: object, group: type) -> object:
    """Return an option's annotation, in the group's panel unless it has its own."""
    value, info = get_args(hint)
    if isinstance(info, OptionInfo) and not info.rich_help_panel:
        info = copy.copy(info)
        info.rich_help_panel = getattr(group, "panel", None)
    return Annotated[value, info]


def _take(group: type, given: dict[str, object]) -> object:
    """Build a group from its options' values, and remove them from `given`."""
    hints = get_type_hints(group, include_extras=True)
    names = [field.name for field in dataclasses.fields(group)]
    return group(
        **{
            name: _take(hints[name], given) if _is_group(hints[name]) else given.pop(name)
            for name in names
        }
    )
