"""What of a cache's identity says which network computed the teacher's outputs, and how."""

from __future__ import annotations

from typing import Any

from teach_once.configs.schema import TeacherConfig, TopLogits
from teach_once.nets.networks.archs import PYTHON_PREFIX, has_stem
from teach_once.nets.teacher.taps import teacher_stages
from teach_once.nets.weights.source import is_downloadable, known_sha256
from teach_once.runtime.command.user_code import module_sha256


def arch_source(arch: str) -> dict[str, str | None]:
    """{module: sha256 of its file} for a `python:module:function` network, {} for any other."""
    if not arch.startswith(PYTHON_PREFIX):
        return {}
    module = arch.removeprefix(PYTHON_PREFIX).partition(":")[0]
    return {module: module_sha256(module)}


def teacher_identity(config: TeacherConfig) -> dict[str, Any]:
    """The blocks "teacher" and "taps" of a cache's identity.

    `weights_sha256` is None, or the first digits, where the weights file is missing; see
    `nets.weights.source.known_sha256`. A stem that changes nothing counts as unset. Only a network
    of the user's own has a "source": {module: sha256 of its file}. Raises ArchError, TapError.
    """
    teacher, taps = config.teacher, config.taps
    logits = taps.logits
    source = arch_source(teacher.arch)
    return {
        "teacher": {
            "arch": teacher.arch,
            "stem": teacher.stem if has_stem(teacher.arch) else "cifar",
            "stages": teacher_stages(config),
            "weights_sha256": known_sha256(teacher.weights),
            **({"source": source} if source else {}),
            **({"options": dict(teacher.options)} if teacher.options else {}),
            "bn": teacher.bn,
            "precision": teacher.precision,
        },
        "taps": {
            "logits": {"top_k": logits.top_k} if isinstance(logits, TopLogits) else logits,
            "channel_means": taps.channel_means,
        },
    }


def init_identity(weights: str | None) -> dict[str, Any]:
    """{"init": what decides the weights that a training starts from}, {} where there are none.

    That is the name which a library gives them, or the sha256 of their file; None of a file that is
    missing.
    """
    if weights is None:
        return {}
    return {"init": weights if is_downloadable(weights) else known_sha256(weights)}
