"""The part of a cache's identity that describes the teacher network and its taps."""

from __future__ import annotations

from typing import Any

from teach_once.configs.schema import TeacherConfig, TopLogits
from teach_once.nets.networks.archs import PYTHON_PREFIX, has_stem
from teach_once.nets.teacher.taps import teacher_stages
from teach_once.nets.weights.source import is_downloadable, known_sha256
from teach_once.runtime.command.user_code import module_sha256


def arch_source(arch: str) -> dict[str, str | None]:
    """Return {module: sha256 of its file} for a `python:module:function` network, otherwise {}."""
    if not arch.startswith(PYTHON_PREFIX):
        return {}
    module = arch.removeprefix(PYTHON_PREFIX).partition(":")[0]
    return {module: module_sha256(module)}


def teacher_identity(config: TeacherConfig) -> dict[str, Any]:
    """Return the blocks "teacher" and "taps" of a cache's identity.

    If the weights file is missing, `weights_sha256` is None or a prefix; see
    `nets.weights.source.known_sha256`. A stem that changes nothing counts as unset. A user's own
    network also has "source": {module: sha256 of its file}.

    Raises ArchError for an unknown network and TapError for an invalid tap.
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
    """Return {"init": identity of the initial weights}, or {} without initial weights.

    The identity is a library's name for the weights, or the sha256 of their file; None if the file
    is missing.
    """
    if weights is None:
        return {}
    return {"init": weights if is_downloadable(weights) else known_sha256(weights)}
