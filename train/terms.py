"""From a batch to a loss term: which loss a name means, and what it needs of teacher and student.

A user's own loss is a function of a `Batch` under one line of registration:

    @loss_term(teacher_taps=["logits"])
    def my_loss(batch: Batch, sharpness: float = 1.0) -> Tensor: ...

named in a config as `{loss: my_package.my_module:my_loss, options: {sharpness: 2.0}}`.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from configs.schema import LossTerm
from nets.taps import channel_means, spatial_energy
from train import losses
from train.errors import TrainError

StudentOutput = Literal["logits", "means", "energy", "embedding", "hint"]


@dataclass(frozen=True)
class Batch:
    """What a loss may look at, for one batch; B samples.

    labels: (B,) int64; of mixed images the label of the larger share, and other_labels and
    other_shares (B,) say what else is in them. logits: the student's, (B, K). means: after its
    connectors, per stage (B, C_l). maps: its feature maps, "stageN" -> (B, C, H, W). hint: after
    the regressor, like the teacher's. teacher: name of a tap -> (B, ...), all on one device.
    """

    labels: Tensor
    logits: Tensor
    means: Sequence[Tensor] = ()
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    hint: Tensor | None = None
    teacher: Mapping[str, Tensor] = field(default_factory=dict)
    other_labels: Tensor | None = None
    other_shares: Tensor | None = None

    def of_teacher(self, kind: str) -> list[Tensor]:
        """The taps `kind`1, `kind`2, ... that were read, in order."""
        numbers = sorted(
            int(tap.removeprefix(kind)) for tap in self.teacher if tap.startswith(kind)
        )
        return [self.teacher[f"{kind}{number}"] for number in numbers]

    @property
    def embedding(self) -> Tensor:
        """(B, C): channel means of the student's last stage, without a connector."""
        return channel_means(self.maps[_in_order(self.maps, "stage")[-1]])


def _in_order(names: Iterable[str], kind: str) -> list[str]:
    """`kind`1, `kind`2, ... of the names."""
    found = [name for name in names if name.startswith(kind)]
    return sorted(found, key=lambda name: int(name.removeprefix(kind)))


@dataclass(frozen=True)
class Loss:
    """How a loss is computed from a batch, and what it needs.

    teacher_taps: names of taps; "stages" stands for stage1 ... stageL, "energies" for energy1 ...
    energyL, "embedding" for the last stage. student: what it looks at; "logits" also says that its
    gradient reaches the classifier.
    """

    compute: Callable[..., Tensor]
    teacher_taps: frozenset[str] = frozenset()
    student: frozenset[StudentOutput] = frozenset({"logits"})


def loss_term(
    teacher_taps: Collection[str] = (), student: Collection[StudentOutput] = ("logits",)
) -> Callable[[Callable[..., Tensor]], Loss]:
    """Make a loss of a function of a `Batch` (and keyword options); see `Loss` for what to name."""
    return lambda compute: Loss(compute, frozenset(teacher_taps), frozenset(student))


def expanded_taps(loss: Loss, stages: Sequence[str]) -> set[str]:
    """The names of the taps that a loss needs of a cache with these stages."""
    groups = {
        "stages": set(stages),
        "energies": {stage.replace("stage", "energy") for stage in stages},
        "embedding": {stages[-1]},
    }
    return set().union(*(groups.get(tap, {tap}) for tap in loss.teacher_taps))


def taps_of(terms: Iterable[LossTerm], stages: Sequence[str]) -> set[str]:
    """The names of the taps that a method needs of a cache with these stages."""
    return {tap for term in terms for tap in expanded_taps(loss_named(term.loss), stages)}


def options_of(term: LossTerm) -> dict[str, float]:
    """The keyword arguments that a term gives its loss; what is not set is the loss's default."""
    named = ("temperature", "alpha", "beta", "distance_weight", "angle_weight")
    given = {name: getattr(term, name) for name in named}
    return {**{k: v for k, v in given.items() if v is not None}, **term.options}


@functools.cache
def loss_named(name: str) -> Loss:
    """One of `LOSSES`, or the user's own `package.module:name`. Raises TrainError."""
    if name in LOSSES:
        return LOSSES[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise TrainError(f"loss {name!r} cannot be imported: {error}") from None
    if not isinstance(found, Loss):
        raise TrainError(
            f"loss {name!r} is not registered: put @train.terms.loss_term(...) above it"
        )
    return found


def _dkd(batch: Batch, **options: float) -> Tensor:
    return losses.dkd(batch.logits, batch.teacher["logits"], batch.labels, **options)


def _gkd(batch: Batch, **options: float) -> Tensor:
    taps = batch.teacher
    return losses.gkd(batch.logits, taps["logits"], taps["correct"], **options)


def _of_logits(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda batch, **options: loss(batch.logits, batch.teacher["logits"], **options)


def _ce(batch: Batch) -> Tensor:
    return losses.ce(batch.logits, batch.labels, batch.other_labels, batch.other_shares)


def _cd(batch: Batch) -> Tensor:
    return losses.cd(batch.means, batch.of_teacher("stage")[: len(batch.means)])


def _at(batch: Batch) -> Tensor:
    pairs = [
        _same_size(spatial_energy(batch.maps[stage]), energy, batch.maps[stage])
        for stage, energy in zip(
            _in_order(batch.maps, "stage"), batch.of_teacher("energy"), strict=True
        )
    ]
    return losses.at([ours for ours, _ in pairs], [theirs for _, theirs in pairs])


def _same_size(ours: Tensor, theirs: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Energies of one size: where maps differ, the larger is averaged to the size of the smaller.

    Teacher maps are taken to have the proportions of the student's, as both see the same images.
    """
    if ours.shape == theirs.shape:
        return ours, theirs
    height, width = maps.shape[2:]
    size = size_like(height, width, theirs.shape[1])
    assert size is not None  # checked before the run: `train.connectors`
    smaller = min(height, size[0]), min(width, size[1])
    pooled = []
    for energy, shape in ((ours, (height, width)), (theirs, size)):
        map_ = F.adaptive_avg_pool2d(energy.float().unflatten(1, shape)[:, None], smaller)
        pooled.append(F.normalize(map_.flatten(1), dim=1, eps=1e-12))
    return pooled[0], pooled[1]


def size_like(height: int, width: int, positions: int) -> tuple[int, int] | None:
    """(height, width) of a map of so many positions, with the proportions of `height` x `width`.

    Both sides may be off by less than one position, as strides round; None where none is so near,
    or two are equally near.
    """
    ideal = (positions * height / width) ** 0.5
    found = sorted(
        (abs(rows - ideal), rows)
        for rows in range(max(1, math.ceil(ideal) - 1), math.floor(ideal) + 2)
        if positions % rows == 0 and abs(positions / rows - positions / ideal) < 1
    )
    if not found or found[0][0] >= 1 or (len(found) > 1 and found[1][0] - found[0][0] < 0.1):
        return None
    return found[0][1], positions // found[0][1]


def _rkd(batch: Batch, **options: float) -> Tensor:
    stages = batch.of_teacher("stage")
    return losses.rkd(batch.embedding, stages[-1], **options)


def _fitnets(batch: Batch) -> Tensor:
    assert batch.hint is not None
    ours, theirs = batch.hint, batch.teacher["hint"]
    if ours.shape != theirs.shape:  # the larger is averaged to the size of the smaller
        smaller = min(tuple(ours.shape[2:]), tuple(theirs.shape[2:]))
        ours, theirs = (F.adaptive_avg_pool2d(each.float(), smaller) for each in (ours, theirs))
    return losses.fitnets(ours, theirs)


def _loss(
    compute: Callable[..., Tensor], taps: Sequence[str], student: Sequence[StudentOutput]
) -> Loss:
    return Loss(compute, frozenset(taps), frozenset(student))


LOSSES: dict[str, Loss] = {
    "ce": _loss(_ce, [], ["logits"]),
    "kd": _loss(_of_logits(losses.kd), ["logits"], ["logits"]),
    "gkd": _loss(_gkd, ["logits", "correct"], ["logits"]),
    "cd": _loss(_cd, ["stages"], ["means"]),
    "at": _loss(_at, ["energies"], ["energy"]),
    "rkd": _loss(_rkd, ["embedding"], ["embedding"]),
    "fitnets": _loss(_fitnets, ["hint"], ["hint"]),
    "dkd": _loss(_dkd, ["logits"], ["logits"]),
    "dist": _loss(_of_logits(losses.dist), ["logits"], ["logits"]),
    "lskd": _loss(_of_logits(losses.lskd), ["logits"], ["logits"]),
}
