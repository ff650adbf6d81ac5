"""Trainable connectors from the student's feature maps to the teacher's channel counts.

Per stage: a 1x1 convolution without bias, batch norm, ReLU, then the spatial mean, even if channel
counts agree. The ReLU is omitted if the teacher's means can be negative, see
`train.method.connector_ends`. Connectors are used only in training and are not part of the saved
student. The mean is last because batch norm and ReLU do not commute with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Set

import torch
from torch import Tensor, nn

from teach_once.nets.networks.layout import size_like
from teach_once.nets.student import StudentParts
from teach_once.nets.teacher.taps import Tap, channel_means
from teach_once.store.format.spec import TapSpec
from teach_once.train.errors import TrainError
from teach_once.train.method.ensemble_taps import EnsembleTaps


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


def hint_stage(taps: Mapping[str, TapSpec]) -> str | None:
    """Return the stage of the hint of a cache with these taps; None if it has no hint."""
    return taps["hint"].stage if "hint" in taps else None


def connectors_for(
    parts: StudentParts,
    kind: str,
    outputs: Set[str],
    teachers: EnsembleTaps,
    seed: int,
    linear: Collection[str] = (),
) -> Connectors | None:
    """Build the connectors that these losses need, from a student's parts to the teachers' taps.

    outputs: the parts of the student that the losses read. linear: the taps whose connectors end
    without ReLU.

    Raises StageMismatch if they do not fit.
    """
    taps = teachers.specs
    wanted = {stage: taps[stage].shape[0] for stage in teachers.student_stage}
    if "attention" in outputs:
        _check_count(parts.stages, wanted)
        _check_sizes(parts.stages, taps)
    if not outputs & {"means", "hint", "pre_logits", "parts"}:
        return None
    return build_connectors(
        {stage: shape[0] for stage, shape in parts.stages.items()},
        wanted if "means" in outputs else {},
        kind,
        seed,
        (str(taps["hint"].stage), taps["hint"].shape[0]) if "hint" in outputs else None,
        teachers,
        (parts.embedding, taps["embedding"].shape[0]) if parts.classifiers else None,
        (parts.shapes["student"][0], taps["hint"].shape[0]) if "parts" in outputs else None,
        linear,
    )


def _projector(in_features: int, out_features: int, kind: str) -> nn.Module:
    if kind != "none":
        return nn.Linear(in_features, out_features)
    if in_features != out_features:
        raise StageMismatch(
            f"student.connector is none, but the student's embedding has {in_features} numbers and "
            f"the teacher's {out_features}",
            fix="set student.connector=auto",
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
            fix="set student.connector=auto",
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
