"""The names of networks and of their modules: which exist, which end a stage, which come first.

Loads torch for timm's models only, because timm itself must be imported for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from teach_once.nets.networks.archs import (
    DEFAULT_STAGES,
    PYTHON_PREFIX,
    TIMM_PREFIX,
    ArchError,
    known_archs,
    timm_model,
)
from teach_once.nets.networks.layout import TapError
from teach_once.runtime.command.program import program_text
from teach_once.runtime.errors import did_you_mean

if TYPE_CHECKING:
    from torch import nn


def default_stages(arch: str) -> tuple[str, ...]:
    """Return the modules that end the network's stages; () if none are known.

    Raises ArchError for an unknown timm model.
    """
    if model := timm_model(arch):
        from teach_once.nets.networks.timm_models import stages_of

        return stages_of(model)
    return DEFAULT_STAGES.get(arch, ())


def check_arch(arch: str) -> None:
    """Raise ArchError, with the nearest names, unless `arch` names a network."""
    if arch in DEFAULT_STAGES:
        return
    if arch.startswith(TIMM_PREFIX):
        from teach_once.nets.networks.timm_models import check_model

        check_model(timm_model(arch))
        return
    if arch.startswith(PYTHON_PREFIX):
        if arch.count(":") == 2 and all(arch.split(":")):
            return
        raise ArchError(f"arch {arch!r} does not have the form python:package.module:function")
    raise ArchError(
        f"unknown arch {arch!r}{did_you_mean(arch, known_archs(), most=3)}",
        fix=f"{program_text('nets')} list",
    )


def stage_modules(
    arch: str, stages: Sequence[str] | None = None, *, key: str = "taps.stages"
) -> dict[str, str]:
    """Return {"stage1": module name, ...}, from `stages` or else the architecture's defaults.

    key: config key of the stages, for the message. Raises TapError if there are no stages.
    """
    modules = default_stages(arch) if stages is None else stages
    if not modules:
        raise TapError(f"arch {arch!r} has no default stages", fix=f"list its modules in {key}")
    return number_modules(modules)


def number_modules(modules: Sequence[str]) -> dict[str, str]:
    """Return {"stage1": first module, "stage2": second module, ...}."""
    return {f"stage{number}": module for number, module in enumerate(modules, start=1)}


def listed_until(network: nn.Module, module: str) -> int:
    """Count the modules that a network lists up to the end of `module`, itself included."""
    names = [name for name, _ in network.named_modules()]
    return max(n for n, name in enumerate(names, start=1) if f"{name}.".startswith(f"{module}."))
