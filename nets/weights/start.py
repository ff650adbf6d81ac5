"""Initialize a network from pretrained weights, and freeze its first stages.

Only a classifier for another number of classes may differ between file and network. It starts with
random weights and the full learning rate.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from teach_once.configs.schema import StudentConfig, Training
from teach_once.nets.networks.archs import ArchError, timm_model
from teach_once.nets.networks.classifier import classifiers_of
from teach_once.nets.networks.names import listed_until, stage_modules
from teach_once.nets.weights.files import load_weights
from teach_once.nets.weights.source import fetched_weights


@dataclass(frozen=True)
class Start:
    """A network's pretrained start.

    parameters: loaded parameters, including frozen ones. frozen: modules whose parameters are not
    trained and which stay in evaluation mode, so that batch norms keep their statistics and dropout
    is off. said: description of the start.
    """

    parameters: Sequence[nn.Parameter]
    frozen: Sequence[nn.Module]
    said: str


def start_from(
    network: nn.Module,
    arch: str,
    init: str | None,
    training: Training,
    *,
    key: str,
    stages: Sequence[str] | None,
    image_shape: tuple[int, int, int],
) -> Start | None:
    """Load the config's initial weights into the network, and freeze its first stages.

    init: a source of weights, see `nets.weights.source`; None: nothing is done. key: the config's
    key for messages. stages: the config's stages. image_shape: (H, W, C). Raises ArchError if the
    weights are missing or do not fit, or if there are fewer stages than are to be frozen; TapError
    if there are none.
    """
    if init is None:
        return None
    try:
        file = fetched_weights(init)
        if not file.is_file():
            raise ArchError(f"file {file} not found", fix=f"set {key}=PATH")
        fresh = _filled(network, file, arch, image_shape)
    except ArchError as error:
        problem = error.problem.removeprefix("teacher.weights: ")
        raise ArchError(f"{key}: {problem}", fix=error.fix) from None
    new = tuple(f"{name}." for name in fresh)
    filled = [each for name, each in network.named_parameters() if not name.startswith(new)]
    count = training.frozen_stages
    frozen = freeze(network, stage_modules(arch, stages), count) if count else []
    classes = f"; a new classifier in place of its own: {', '.join(fresh)}" if fresh else ""
    still = f"; the first {count} stages are frozen" if frozen else ""
    return Start(filled, frozen, f"starts from {file}{classes}{still}")


def start_student(
    network: nn.Module, config: StudentConfig, image_shape: tuple[int, int, int]
) -> Start | None:
    """Apply `start_from` to a student's config."""
    net = config.student
    return start_from(
        network,
        net.arch,
        net.init,
        config.training,
        key="student.init",
        stages=net.stages,
        image_shape=image_shape,
    )


def _filled(
    network: nn.Module, file: Path, arch: str, image_shape: tuple[int, int, int]
) -> Sequence[str]:
    """Load a file; returns the classifiers that it does not fit, which are unchanged."""
    convert = None
    if model := timm_model(arch):
        from teach_once.nets.weights.timm_weights import converted

        convert = functools.partial(converted, model, num_classes=0, image_size=image_shape[:2])
    try:
        load_weights(network, file, convert=convert)
    except ArchError:
        classifiers = classifiers_of(network, image_shape)
        load_weights(network, file, convert=convert, without=classifiers)
        names = {name for name, _ in network.named_parameters()}
        has_one = any(name.startswith(tuple(f"{c}." for c in classifiers)) for name in names)
        return classifiers if has_one else ()
    return ()


def freeze(network: nn.Module, stages: Mapping[str, str], count: int) -> list[nn.Module]:
    """Freeze the first `count` (from 1) stages and all modules listed before them.

    stages: "stageN" -> module. The order is the order in which the network's constructor added its
    modules. Returns the modules that must stay in evaluation mode. Raises ArchError if there are
    fewer stages.
    """
    if count > len(stages):
        raise ArchError(
            f"training.frozen_stages is {count}, but the network has {len(stages)} stages",
            fix=f"set training.frozen_stages={len(stages)}",
        )
    last = stages[f"stage{count}"]
    named, end = list(network.named_modules()), listed_until(network, last)
    after = [name for name, _ in named[end:]]
    for _, module in named[:end]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    return [
        module
        for name, module in named[:end]
        if name and not any(other.startswith(f"{name}.") for other in after)
    ]
