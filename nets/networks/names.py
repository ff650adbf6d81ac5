"""Check the name of a network and find the modules that end its stages.

Loads torch for timm's models only, because timm itself must be imported for them.
"""

from __future__ import annotations

from teach_once.nets.networks.archs import (
    DEFAULT_STAGES,
    PYTHON_PREFIX,
    TIMM_PREFIX,
    ArchError,
    known_archs,
    timm_model,
)
from teach_once.runtime.command.program import program_text
from teach_once.runtime.errors import did_you_mean


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
