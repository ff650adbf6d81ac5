"""Trainable connectors from the student's feature maps to the teacher's channel counts.

Per stage: a 1x1 convolution without bias, batch norm, ReLU, then the spatial mean, even if channel
counts agree. The ReLU is omitted if the teacher's means can be negative, see
`train.method.connector_ends`. Connectors are used only in training and are not part of the saved
student. The mean is last because batch norm and ReLU do not commute with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from teach_once.configs.schema import LossTerm, StudentNet
from teach_once.nets.networks.archs import ArchError
from teach_once.nets.networks.classifier import classifiers_of, embedding_read, read_embedding
from teach_once.nets.networks.layout import TapError, size_like
from teach_once.nets.teacher.taps import (
    Tap,
    as_is,
    channel_means,
    in_order,
    read_stages,
    stage_modules,
)
from teach_once.store.format.spec import TapSpec
from teach_once.train.errors import TrainError
from teach_once.train.method.ensemble_taps import EnsembleTaps
from teach_once.train.method.residual import PARTS, is_pair, thinner
from teach_once.train.terms import looked_at


class StageMismatch(TrainError):
    """The student's stages do not match the taps of the cache."""


class Connectors(nn.Module):
    """One connector per stage: {"stage1": (B, C_s, H, W), ...} -> list of (B, C_t) float32.

    hint: the stage whose whole map is needed, and the teacher's channels there; its own connector
    is the regressor of FitNets. ensemble: the taps of several teachers, each with its own
    connectors. embedding: sizes of the student's and the teacher's embeddings, mapped by a linear
    layer. parts: channels of the maps of student and assistant, and of the teacher's hint; see
    `parts_of`. linear: stages, and "hint", whose connectors end without ReLU.
    """

    def __init__(
        self,
        student_channels: Mapping[str, int],
        teacher_channels: Mapping[str, int],
        kind: str,
        hint: tuple[str, int] | None = None,
        ensemble: EnsembleTaps | None = None,
        embedding: tuple[int, int] | None = None,
        parts: tuple[int, int] | None = None,
        linear: Collection[str] = (),
    ) -> None:
        super().__init__()
        ours = ensemble.student_stage if ensemble else {stage: stage for stage in teacher_channels}
        self._student_stage, self._scale = ours, ensemble.scale if ensemble else {}
        if teacher_channels:
            _check_stages(student_channels, teacher_channels, kind, ours)
        self.stages = nn.ModuleDict(
            {
                stage: _connector(
                    student_channels[ours[stage]], channels, kind, has_relu=stage not in linear
                )
                for stage, channels in teacher_channels.items()
            }
        )

        self.hint_stage = hint[0] if hint else ""
        self.regressor: nn.Module | None = None
        if hint is not None:
            if hint[0] not in student_channels:
                raise StageMismatch(f"the cache's hint is {hint[0]}, which the student lacks")
            ours_there, has_relu = student_channels[hint[0]], "hint" not in linear
            self.regressor = _connector(ours_there, hint[1], "auto", has_relu=has_relu)
        self.projector: nn.Module | None = None
        if embedding is not None:
            self.projector = _projector(*embedding, kind)
        self.projection = nn.Conv2d(*parts, 1, bias=False) if parts else None

    def parts_of(self, maps: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return the maps of student and assistant in the teacher's channels, (B, C_t, H, W) each.

        Both use the same linear projection, which therefore also applies to their sum.
        """
        if self.projection is None:
            return None
        return self.projection(maps["student"]), self.projection(maps["assistant"])

    def hint(self, maps: Mapping[str, Tensor]) -> Tensor | None:
        """Return the regressor's output (B, C_t, H, W) for the student's map."""
        return self.regressor(maps[self.hint_stage]) if self.regressor else None

    def pre_logits(self, maps: Mapping[str, Tensor]) -> Tensor | None:
        """Return the linear layer's output (B, D_t) for the student's embedding."""
        return self.projector(maps["embedding"]) if self.projector else None

    def forward(self, maps: Mapping[str, Tensor]) -> list[Tensor]:
        means = {
            stage: channel_means(connect(maps[self._student_stage[stage]]))
            for stage, connect in self.stages.items()
        }
        return [values * self._scale.get(stage, 1) for stage, values in means.items()]


def build_connectors(
    student_channels: Mapping[str, int],
    teacher_channels: Mapping[str, int],
    kind: str,
    seed: int,
    hint: tuple[str, int] | None = None,
    ensemble: EnsembleTaps | None = None,
    embedding: tuple[int, int] | None = None,
    parts: tuple[int, int] | None = None,
    linear: Collection[str] = (),
) -> Connectors:
    """Build connectors whose initial weights depend on `seed` alone. Raises StageMismatch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Connectors(
            student_channels, teacher_channels, kind, hint, ensemble, embedding, parts, linear
        )


def student_stages(student: StudentNet, terms: Sequence[LossTerm]) -> dict[str, str]:
    """Return the student's stages, {"stage1": module, ...}; {} if no loss needs its maps."""
    if not looked_at(terms) - {"logits", "pre_logits"}:
        return {}
    if not is_pair(terms):
        return stage_modules(student.arch, student.stages, key="student.stages")
    stages = stage_modules(thinner(student).arch, student.stages, key="student.stages")
    return {stage: f"student.{module}" for stage, module in stages.items()} | PARTS


def student_classifiers(
    network: nn.Module, terms: Sequence[LossTerm], image_shape: tuple[int, int, int]
) -> tuple[str, ...]:
    """Return the modules that take the student's embedding; () if no loss reads it.

    Raises TapError if the network has none.
    """
    if "pre_logits" not in looked_at(terms):
        return ()
    try:
        return classifiers_of(network, image_shape)
    except TapError as error:
        raise TapError(f"student.arch: {error.problem}", fix=error.fix) from None


def connectors_for(
    network: nn.Module,
    student: StudentNet,
    terms: Sequence[LossTerm],
    taps: Mapping[str, TapSpec],
    image_shape: tuple[int, int, int],
    seed: int,
    ensemble: EnsembleTaps | None = None,
    linear: Collection[str] = (),
) -> Connectors | None:
    """Build the connectors that these losses need, from this network to a cache's taps.

    ensemble: combined taps of several teachers, in which case `taps` are theirs. linear: the taps
    whose connectors end without ReLU.

    Raises StageMismatch or TapError if they do not fit, and ArchError if the network cannot process
    images of shape (H, W, C).
    """
    outputs = looked_at(terms)
    every = student_shapes(network, student_stages(student, terms), image_shape)
    shapes = {stage: shape for stage, shape in every.items() if stage not in PARTS}
    wanted = {tap: taps[tap].shape[0] for tap in in_order(taps, "stage")}
    if "attention" in outputs:
        _check_count(shapes, wanted)
        _check_sizes(shapes, taps)
    if not outputs & {"means", "hint", "pre_logits", "parts"}:
        return None
    channels = {stage: shape[0] for stage, shape in shapes.items()}
    hint = (str(taps["hint"].stage), taps["hint"].shape[0]) if "hint" in outputs else None
    parts = (every["student"][0], taps["hint"].shape[0]) if "parts" in outputs else None
    embedding = None
    if classifiers := student_classifiers(network, terms, image_shape):
        embedding = _embedding_size(network, classifiers, image_shape), taps["embedding"].shape[0]
    return build_connectors(
        channels,
        wanted if "means" in outputs else {},
        student.connector,
        seed,
        hint,
        ensemble,
        embedding,
        parts,
        linear,
    )


def student_shapes(
    network: nn.Module, stages: Mapping[str, str], image_shape: tuple[int, int, int]
) -> dict[str, tuple[int, ...]]:
    """Return (C, H, W) of each stage's map, from a forward pass over a blank (H, W, C) image.

    Raises TapError, or ArchError if the network cannot process such an image.
    """
    height, width, channels = image_shape
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad(), read_stages(network, stages, as_is, (height, width)) as maps:
            network(torch.zeros(1, channels, height, width))
            shapes = {stage: tuple(maps[stage].shape[1:]) for stage in stages}
    except TapError as error:
        raise TapError(f"student.stages: {error.problem}", fix=error.fix) from None
    except RuntimeError as error:
        raise ArchError(
            f"student.arch: the network cannot process images of {height}x{width} pixels and "
            f"{channels} channels: {str(error).splitlines()[0]}"
        ) from error
    network.train(was_training)
    return shapes


@torch.no_grad()
def _embedding_size(
    network: nn.Module, classifiers: Sequence[str], image_shape: tuple[int, int, int]
) -> int:
    height, width, channels = image_shape
    was_training, values = network.training, dict[str, Tensor]()
    network.eval()
    with read_embedding(network, classifiers, values):
        network(torch.zeros(1, channels, height, width))
    network.train(was_training)
    return embedding_read(values, classifiers).shape[1]


def _projector(in_features: int, out_features: int, kind: str) -> nn.Module:
    if kind != "none":
        return nn.Linear(in_features, out_features)
    if in_features != out_features:
        raise StageMismatch(
            f"student.connector is none, but the student's embedding has {in_features} numbers and "
            f"the teacher's {out_features}",
            fix="student.connector=auto",
        )
    return nn.Identity()


def _connector(in_channels: int, out_channels: int, kind: str, *, has_relu: bool) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    end = [nn.ReLU()] if has_relu else []
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *end)


def _check_stages(
    student: Mapping[str, int], teacher: Mapping[str, int], kind: str, ours: Mapping[str, str]
) -> None:
    """Raise StageMismatch unless the student has a stage for each stage of the teacher.

    ours: the student's stage for each stage of the teacher, or of several teachers in order.
    """
    uses = Counter(ours.values())
    if set(uses) != set(student) or len(set(uses.values())) > 1:
        _check_count(student, teacher)
        raise StageMismatch(
            f"the student has {len(student)} stages, so each of its teachers needs as many",
            fix=f"list {len(student)} modules in taps.stages of each teacher's file",
        )
    different = [stage for stage in teacher if student[ours[stage]] != teacher[stage]]
    if kind == "none" and different:
        stage = different[0]
        raise StageMismatch(
            f"student.connector is none, but {ours[stage]} has {student[ours[stage]]} channels in "
            f"the student and {teacher[stage]} in the teacher",
            fix="student.connector=auto",
        )


def _check_count(student: Mapping[str, object], teacher: Mapping[str, object]) -> None:
    if len(student) != len(teacher):
        raise StageMismatch(
            f"the student has {len(student)} stages and the cache {len(teacher)} "
            f"({', '.join(teacher)})",
            fix=f"list {len(teacher)} modules in student.stages",
        )


def _check_sizes(shapes: Mapping[str, tuple[int, ...]], taps: Mapping[str, TapSpec]) -> None:
    """Raise StageMismatch if two attention maps differ in shape.

    A cache contains the number of positions of a map, not its height and width.
    """
    for stage, (_, height, width) in shapes.items():
        positions = taps[Tap("attention", stage).name].shape[0]
        if size_like(height, width, positions) is None:
            raise StageMismatch(
                f"at: {stage} is {height}x{width} in the student and has {positions} positions in "
                f"the teacher, which do not form a map of the same aspect ratio",
                fix="list other modules in student.stages",
            )
