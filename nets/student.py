"""A student's network, and what losses read of it: its stages, their shapes, its embedding.

One network, or the pair of Residual KD: a student and an assistant, each a thinner copy of the
plain student. At one stage, the student's map is trained to match the teacher's map, and the
assistant's map to match the remaining difference. Their sum is passed to the rest of the student.
The stage is that of the cache's hint.

    images -> student up to the stage   -> F_S --+
    images -> assistant up to the stage -> F_A --+-> the rest of the student -> logits

Source: Gao, Shen, Loy et al. 2020, "Residual Knowledge Distillation"; docs/how-to/methods.md
explains the choices that the paper leaves open.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teach_once.configs.schema import StudentNet, ThinNet
from teach_once.nets.networks.archs import CIFAR_RESNETS, ArchError
from teach_once.nets.networks.classifier import (
    classifiers_of,
    embedding_read,
    read_embedding,
    remove_classifier,
)
from teach_once.nets.networks.layout import TapError
from teach_once.nets.networks.names import listed_until, stage_modules
from teach_once.nets.networks.zoo import build_net
from teach_once.nets.teacher.taps import as_is, read_stages

_THINNER = (
    0.7  # fraction of the channels, so half of the products: two such networks cost as much as one
)
_ASSISTANT = 0x9E3779B9  # offset of its seed; torch uses the lowest 32 bits of a seed
# Modules at which both maps are read, by their names in a train state's maps.
PARTS = {"student": "of_student", "assistant": "of_assistant"}


class StudentAndAssistant(nn.Module):
    """Student and assistant as one network: images (B, C, H, W) -> logits (B, K).

    stage: the module, in both networks, at which their maps are added. Modules that the assistant
    lists after it are removed. `of_student` and `of_assistant` are identities through which the two
    maps pass, so that they can be read.
    """

    def __init__(self, student: nn.Module, assistant: nn.Module, stage: str) -> None:
        super().__init__()
        self.student, self.assistant = student, assistant
        self.of_student, self.of_assistant = nn.Identity(), nn.Identity()
        self._stage = stage
        _cut_behind(assistant, stage)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the two networks, like timm's, exclude from weight decay."""
        parts = {"student": self.student, "assistant": self.assistant}
        return {
            f"{name}.{parameter}"
            for name, network in parts.items()
            for parameter in getattr(network, "no_weight_decay", set)()
        }

    def forward(self, images: Tensor) -> Tensor:
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: object, features: Tensor) -> None:
            found.append(self.of_assistant(features))

        def add(module: nn.Module, inputs: object, features: Tensor) -> Tensor:
            of_student: Tensor = self.of_student(features)
            return of_student + found.pop()

        theirs = self.assistant.get_submodule(self._stage).register_forward_hook(keep)
        # Before other hooks, which must receive the sum.
        ours = self.student.get_submodule(self._stage).register_forward_hook(add, prepend=True)
        with theirs, ours:
            self.assistant(images)
            logits: Tensor = self.student(images)
        return logits


@dataclass(frozen=True)
class StudentParts:
    """The parts of a student's network that losses read.

    modules: {"stage1": module, ...}; {} if no loss reads a map. shapes: (C, H, W) of their maps.
    classifiers: the modules that the embedding enters; () if no loss reads it. embedding: its size.
    """

    modules: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    classifiers: tuple[str, ...] = ()
    embedding: int = 0

    @property
    def stages(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the stages, without the two maps of a pair."""
        return {stage: shape for stage, shape in self.shapes.items() if stage not in PARTS}


def build_student(
    net: StudentNet,
    outputs: Collection[str],
    hint_stage: str | None,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    seed: int = 0,
) -> nn.Module:
    """Build the network that a method trains: the config's, or Residual KD's pair of thinner ones.

    outputs: the parts of the student that the losses read. hint_stage: of the cache, as "stage2";
    None: it has none. num_classes: 0 for a network that returns its embedding (B, D).
    image_shape: (H, W, C). The weights depend on `seed` alone. Raises ArchError, TapError.
    """
    network = _with_classifier(
        net, outputs, hint_stage, num_classes=num_classes or 1, image_shape=image_shape, seed=seed
    )
    if not num_classes:
        remove_classifier(network, image_shape)
    return network


def _with_classifier(
    net: StudentNet,
    outputs: Collection[str],
    hint_stage: str | None,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    seed: int,
) -> nn.Module:
    if not is_pair(outputs):
        return build_net(net, num_classes=num_classes, image_shape=image_shape, seed=seed)
    if net.init is not None:
        raise ArchError(
            "student.init is for one network, but the loss residual trains two thinner ones",
            fix="set student.init=null",
        )
    thin = thinner(net)
    stages = stage_modules(thin.arch, net.stages, key="student.stages")
    if hint_stage not in stages:
        raise TapError(f"residual: the cache's hint is {hint_stage}, which the student lacks")

    student, assistant = (
        build_net(thin, num_classes=num_classes, image_shape=image_shape, seed=own)
        for own in (seed, seed ^ _ASSISTANT)
    )
    return StudentAndAssistant(student, assistant, stages[hint_stage])


def describe_student(
    network: nn.Module,
    net: StudentNet,
    outputs: Collection[str],
    image_shape: tuple[int, int, int],
) -> StudentParts:
    """Find the modules that losses read, and the shapes there, by one pass over a blank image.

    outputs: the parts of the student that the losses read. image_shape: (H, W, C). Raises TapError
    if the network lacks one, ArchError if it cannot take such an image.
    """
    stages: dict[str, str] = {}
    if set(outputs) - {"logits", "pre_logits"}:
        arch = thinner(net).arch if is_pair(outputs) else net.arch
        stages = stage_modules(arch, net.stages, key="student.stages")
    if is_pair(outputs):
        stages = {stage: f"student.{module}" for stage, module in stages.items()} | PARTS
    return _read_parts(network, stages, image_shape, has_embedding="pre_logits" in outputs)


@torch.no_grad()
def _read_parts(
    network: nn.Module,
    stages: Mapping[str, str],
    image_shape: tuple[int, int, int],
    *,
    has_embedding: bool = False,
) -> StudentParts:
    """Return the parts with these modules; the network stays in its mode."""
    height, width, channels = image_shape
    values: dict[str, Tensor] = {}
    was_training = network.training
    network.eval()
    key = "student.stages"
    try:
        with read_stages(network, stages, as_is, (height, width)) as maps:
            network(torch.zeros(1, channels, height, width))
            shapes = {stage: tuple(maps[stage].shape[1:]) for stage in stages}
        key = "student.arch"
        classifiers = classifiers_of(network, image_shape) if has_embedding else ()
        with read_embedding(network, classifiers, values):
            if classifiers:
                network(torch.zeros(1, channels, height, width))
        size = embedding_read(values, classifiers).shape[1] if classifiers else 0
    except TapError as error:
        raise TapError(f"{key}: {error.problem}", fix=error.fix) from None
    except RuntimeError as error:
        raise ArchError(
            f"student.arch: the network cannot process images of {height}x{width} pixels and "
            f"{channels} channels: {str(error).splitlines()[0]}"
        ) from error
    network.train(was_training)
    return StudentParts(stages, shapes, classifiers, size)


def is_pair(outputs: Collection[str]) -> bool:
    """Return True if the losses read the two maps of student and assistant."""
    return "parts" in outputs


def thinner(net: StudentNet) -> ThinNet:
    """Return the network of student and assistant. Raises ArchError if it cannot be derived."""
    if net.thinner is not None:
        return net.thinner
    if net.arch not in CIFAR_RESNETS:
        raise ArchError(
            f"residual: no thinner copy of {net.arch} is known; choose a network of half its cost",
            fix="set student.thinner.arch=NETWORK",
        )
    width = float(net.options.get("width", 1.0)) * _THINNER
    return ThinNet(arch=net.arch, stem=net.stem, options={**net.options, "width": width})


def _cut_behind(network: nn.Module, stage: str) -> None:
    """Replace each module that the network lists after a stage by an identity."""
    names = [name for name, _ in network.named_modules()]
    cut: list[str] = []
    for name in names[listed_until(network, stage) :]:
        if not any(name.startswith(f"{other}.") for other in cut):
            cut.append(name)
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, nn.Identity())
