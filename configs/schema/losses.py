"""The built-in losses by name: their formulas and their options, which are keys of a term.

A config is checked against these blocks without loading torch. The functions are in `train.losses`;
a test checks that their defaults are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import get_type_hints

from pydantic import StrictBool
from pydantic.dataclasses import dataclass

from teach_once.configs.schema.scalars import BLOCK, Fraction, NonNegativeFloat, PositiveFloat


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class CrossEntropy:
    """Cross-entropy: the batch mean of -log softmax(student_logits)[label]."""

    label_smoothing: Fraction = 0.0
    """Fraction of each label that is spread over all classes."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Kd:
    """T^2 times the batch mean of KL(softmax(teacher / T) || softmax(student / T))."""

    temperature: PositiveFloat = 4.0
    """Temperature T that divides the logits."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Gkd:
    """Guided KD: mean of `kd` over the samples that the teacher classifies correctly."""

    temperature: PositiveFloat = 1.0
    """Temperature T that divides the logits."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Cd:
    """Channel distillation: per stage the mean squared difference of channel means, summed."""

    normalize: StrictBool = False
    """Divide each stage by the mean square of the teacher's channel means."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class AttentionTransfer:
    """Attention transfer: per stage the mean squared difference of attention maps, summed."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Rkd:
    """Relational KD: smooth L1 of pairs' distances and of the cosines of triplets' angles."""

    distance_weight: NonNegativeFloat = 25.0
    """Weight of the distances."""
    angle_weight: NonNegativeFloat = 50.0
    """Weight of the angles."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class FitNets:
    """The mean squared difference of two feature maps (B, C, H, W)."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Embedding:
    """The batch mean of 1 - cosine similarity of student's and teacher's embeddings."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class EmbeddingMse:
    """The mean squared difference of the student's and the teacher's embeddings."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ResidualKd:
    """Residual KD on feature maps: MSE(S, T) + MSE(A, (T - S).detach())."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Dkd:
    """Decoupled KD: T^2 times the mean of alpha KL(label, rest) + beta KL(among the rest)."""

    alpha: NonNegativeFloat = 1.0
    """Weight of the KL divergence of label against other classes."""
    beta: NonNegativeFloat = 8.0
    """Weight of the KL divergence among the other classes."""
    temperature: PositiveFloat = 4.0
    """Temperature T that divides the logits."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Dist:
    """T^2 (2 - mean correlation of rows - mean correlation of columns) of probabilities."""

    temperature: PositiveFloat = 1.0
    """Temperature T that divides the logits."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class Lskd:
    """`kd` of logits standardized per sample to mean 0 and standard deviation 1."""

    temperature: PositiveFloat = 2.0
    """Temperature T that divides the standardized logits."""


BUILT_IN_LOSSES: Mapping[str, type] = {
    "ce": CrossEntropy,
    "kd": Kd,
    "gkd": Gkd,
    "cd": Cd,
    "at": AttentionTransfer,
    "rkd": Rkd,
    "fitnets": FitNets,
    "embedding": Embedding,
    "embedding_mse": EmbeddingMse,
    "residual": ResidualKd,
    "dkd": Dkd,
    "dist": Dist,
    "lskd": Lskd,
}


@functools.cache
def option_types(loss: str) -> Mapping[str, object]:
    """Return {option: type, as checked by pydantic} of a built-in loss."""
    return get_type_hints(BUILT_IN_LOSSES[loss], include_extras=True)
