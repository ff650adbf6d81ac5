"""python -m nets list [PATTERN]    print the available networks with image sizes and weights"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Annotated

import typer

from teach_once.nets.networks.archs import CIFAR_RESNETS, TIMM_PREFIX, ArchError, known_archs
from teach_once.runtime.command.frame import new_app, run_command
from teach_once.runtime.command.program import program_text
from teach_once.runtime.safe.text import visible

app = new_app("List the available networks.")


@app.callback()
def _commands() -> None:
    """List the available networks."""


@app.command("list")
def list_networks(
    pattern: Annotated[str, typer.Argument(help="such as 'timm:*convnext*', quoted")] = "*",
) -> None:
    """Print the names that `arch` accepts: this project's, torchvision's and timm's networks.

    With a pattern, timm's names include their tags (`timm:NAME.TAG`), one for each set of weights.
    """
    lines = [*_lines_without_prefix(pattern), *_lines_of_timm(pattern)]
    if not lines:
        raise ArchError(
            f"no network matches {visible(pattern)}",
            fix=f"{program_text('nets')} list 'timm:*vit*'",
        )
    print(*lines, sep="\n")


def _lines_without_prefix(pattern: str) -> Iterator[str]:
    for name in fnmatch.filter(known_archs(), pattern):
        whose = "small images" if name in CIFAR_RESNETS else "torchvision"
        yield f"{name:<58} {whose}"


def _lines_of_timm(pattern: str) -> Iterator[str]:
    if pattern != "*" and not fnmatch.fnmatch(TIMM_PREFIX, pattern.partition(":")[0] + "*"):
        return  # the pattern excludes names with the prefix
    from teach_once.nets.networks.timm_models import import_timm, pretrained_cfg

    timm = import_timm()
    models = timm.list_models()
    tagged = timm.list_pretrained() if pattern != "*" else []
    names = sorted({*models, *tagged})
    for name in names:
        if fnmatch.fnmatch(TIMM_PREFIX + name, pattern):
            cfg = pretrained_cfg(name)
            weights = "weights" if cfg.has_weights else "no weights"
            size = "x".join(map(str, cfg.input_size[1:]))
            yield f"{TIMM_PREFIX + name:<58} {size:>9} px  {cfg.num_classes:>6,} classes  {weights}"


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)
