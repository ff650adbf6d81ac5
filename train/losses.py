"""The losses, as pure functions of tensors; each computes in float32 whatever it is given.

B is the batch, K the number of classes, C_l the channels of stage l. Every result is a scalar
tensor. `LOSSES` at the end says which taps of the teacher each needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def ce(
    student_logits: Tensor,
    labels: Tensor,
    other_labels: Tensor | None = None,
    other_shares: Tensor | None = None,
) -> Tensor:
    """Cross-entropy: the batch mean of -log softmax(student_logits)[label].

    student_logits: (B, K); labels: (B,) int64. Of mixed images also other_labels (B,) int64 and
    other_shares (B,) in [0, 1], the weight of the other label; the first one has the rest.
    """
    if other_labels is None or other_shares is None:
        return F.cross_entropy(student_logits.float(), labels)
    own = F.cross_entropy(student_logits.float(), labels, reduction="none")
    other = F.cross_entropy(student_logits.float(), other_labels, reduction="none")
    return torch.lerp(own, other, other_shares).mean()


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 times the batch mean of KL(softmax(teacher / T) || softmax(student / T)).

    Both (B, K). Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """
    return temperature**2 * _kl_per_sample(student_logits, teacher_logits, temperature).mean()


def gkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    teacher_correct: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Guided KD: `kd` over the samples that the teacher gets right, divided by their number.

    Logits (B, K); teacher_correct (B,) bool or 0/1. Exactly 0, with zero gradient, where the
    teacher gets none right. Source: Zhou et al. 2020, "Channel Distillation".
    """
    right = teacher_correct.to(torch.bool)
    divergence = _kl_per_sample(student_logits, teacher_logits, temperature)
    total = torch.where(right, divergence, torch.zeros_like(divergence)).sum()
    return temperature**2 * total / right.sum().clamp(min=1)


def cd(student_means: Sequence[Tensor], teacher_means: Sequence[Tensor]) -> Tensor:
    """Channel distillation: per stage the mean squared difference of channel means, summed.

    Lists of (B, C_l), one entry per stage, equal shapes. Source: Zhou et al. 2020.
    """
    pairs = zip(student_means, teacher_means, strict=True)
    return torch.stack([F.mse_loss(s.float(), t.float()) for s, t in pairs]).sum()


def _kl_per_sample(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """(B,) KL divergences, from log-probabilities, so that probabilities of zero do no harm."""
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


@dataclass(frozen=True)
class Batch:
    """What a loss term may look at, for one batch.

    teacher: tap name -> tensor on the training device. student_means: after the connectors.
    labels: of mixed images the label of the larger share; other_labels and other_shares (B,) say
    what else is in them.
    """

    labels: Tensor
    student_logits: Tensor
    student_means: Sequence[Tensor]
    teacher: dict[str, Tensor]
    other_labels: Tensor | None = None
    other_shares: Tensor | None = None

    @property
    def teacher_means(self) -> list[Tensor]:
        return [self.teacher[f"stage{n}"] for n in range(1, len(self.student_means) + 1)]


@dataclass(frozen=True)
class Loss:
    """How a loss is computed from a batch, and what it needs.

    teacher_taps: names of taps; "stages" stands for stage1 ... stageL. uses_logits: whether its
    gradient reaches the student's classifier.
    """

    compute: Callable[..., Tensor]
    teacher_taps: tuple[str, ...] = ()
    uses_logits: bool = True

    @property
    def uses_stages(self) -> bool:
        return "stages" in self.teacher_taps


LOSSES: dict[str, Loss] = {
    "ce": Loss(
        lambda batch: ce(batch.student_logits, batch.labels, batch.other_labels, batch.other_shares)
    ),
    "kd": Loss(
        lambda batch, **options: kd(batch.student_logits, batch.teacher["logits"], **options),
        teacher_taps=("logits",),
    ),
    "gkd": Loss(
        lambda batch, **options: gkd(
            batch.student_logits, batch.teacher["logits"], batch.teacher["correct"], **options
        ),
        teacher_taps=("logits", "correct"),
    ),
    "cd": Loss(
        lambda batch: cd(batch.student_means, batch.teacher_means),
        teacher_taps=("stages",),
        uses_logits=False,
    ),
}
