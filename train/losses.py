"""Losses, as pure functions of tensors; 16-bit inputs are converted to float32 first.

B is the batch size, K the number of classes, C_l the number of channels of stage l. Every result is
a scalar tensor. The names of tensor parameters define what a run passes, see `train.terms.INPUTS`;
numeric parameters are options that a config may set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from teach_once.configs.schema import Fraction, NonNegativeFloat, PositiveFloat
from teach_once.configs.schema import losses as defaults
from teach_once.train.errors import TrainError
from teach_once.train.terms import loss_term

_TRIPLETS_AT_ONCE = 2**22  # rkd: number of cosines in memory at a time
_TRIPLETS_IN_CACHE = 2**18  # rkd on a CPU: they fit into its cache


@loss_term(per_sample=True)
def ce(
    student_logits: Tensor,
    labels: Tensor,
    other_labels: Tensor | None = None,
    other_shares: Tensor | None = None,
    label_smoothing: Fraction = defaults.CrossEntropy.label_smoothing,
) -> Tensor:
    """Compute cross-entropy: the batch mean of -log softmax(student_logits)[label].

    student_logits: (B, K); labels: (B,) int64. For mixed images also other_labels (B,) int64 and
    other_shares (B,) in [0, 1], the weight of the other label; the first label has the rest.
    label_smoothing: fraction of each label that is spread equally over all classes.
    """

    def per_sample(of_labels: Tensor) -> Tensor:
        return F.cross_entropy(
            _wide(student_logits), of_labels, reduction="none", label_smoothing=label_smoothing
        )

    if other_labels is None or other_shares is None:
        return F.cross_entropy(_wide(student_logits), labels, label_smoothing=label_smoothing)
    return torch.lerp(per_sample(labels), per_sample(other_labels), other_shares).mean()


@loss_term(per_sample=True)
def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: PositiveFloat = defaults.Kd.temperature,
) -> Tensor:
    """Compute T^2 times the batch mean of KL(softmax(teacher / T) || softmax(student / T)).

    Both (B, K). Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """
    return temperature**2 * _kl_per_sample(student_logits, teacher_logits, temperature).mean()


@loss_term()
def gkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    teacher_correct: Tensor,
    temperature: PositiveFloat = defaults.Gkd.temperature,
) -> Tensor:
    """Compute guided KD: mean of `kd` over the samples that the teacher classifies correctly.

    Logits (B, K); teacher_correct (B,) bool or 0/1. Exactly 0, with zero gradient, if the teacher
    classifies none correctly. Source: Zhou et al. 2020, "Channel Distillation".
    """
    right = teacher_correct.to(torch.bool)
    divergence = _kl_per_sample(student_logits, teacher_logits, temperature)
    total = torch.where(right, divergence, torch.zeros_like(divergence)).sum()
    return temperature**2 * total / right.sum().clamp(min=1)


@loss_term(per_sample=True)
def cd(
    student_means: Sequence[Tensor],
    teacher_means: Sequence[Tensor],
    teacher_mean_squares: Sequence[float] = (),
    normalize: bool = defaults.Cd.normalize,
) -> Tensor:
    """Compute channel distillation: per stage the mean squared difference of channel means, summed.

    Lists of (B, C_l), one entry per stage, of equal shapes. normalize: divide each stage's mean by
    its entry of teacher_mean_squares, so that predicting zeros costs 1 per stage for any scale
    of the teacher's features. Source of the plain form: Zhou et al. 2020.

    Raises TrainError if an entry is missing or 0.
    """
    pairs = zip(student_means, teacher_means, strict=True)
    losses = [F.mse_loss(_wide(s), _wide(t)) for s, t in pairs]
    if normalize:
        if len(teacher_mean_squares) != len(losses) or not all(teacher_mean_squares):
            raise TrainError(
                f"cd: normalize needs a mean square above 0 for each of {len(losses)} stages, and "
                f"got {list(teacher_mean_squares)}",
                fix="set normalize: false, or remove the stage from taps.stages and student.stages",
            )
        squares = zip(losses, teacher_mean_squares, strict=True)
        losses = [loss / mean_square for loss, mean_square in squares]
    return torch.stack(losses).sum()


@loss_term(per_sample=True)
def at(student_attention: Sequence[Tensor], teacher_attention: Sequence[Tensor]) -> Tensor:
    """Compute attention transfer: per stage the mean squared difference of attention maps, summed.

    Lists of (B, H_l * W_l), each row with L2 norm 1: see
    `nets.teacher.taps.spatial_attention`. Source: Zagoruyko and Komodakis 2017, "Paying More
    Attention to Attention", as in their code.
    """
    pairs = zip(student_attention, teacher_attention, strict=True)
    return torch.stack([F.mse_loss(_wide(s), _wide(t)) for s, t in pairs]).sum()


@loss_term()
def rkd(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    distance_weight: NonNegativeFloat = defaults.Rkd.distance_weight,
    angle_weight: NonNegativeFloat = defaults.Rkd.angle_weight,
) -> Tensor:
    """Compute relational KD: smooth L1 of pairs' distances and of the cosines of triplets' angles.

    (B, D_s) and (B, D_t). Distances are divided by their mean over pairs of distinct points.
    Source: Park et al. 2019, "Relational Knowledge Distillation". For a single sample the loss is
    0.
    """
    student, teacher = (
        _wide(student_embedding),
        _wide(teacher_embedding).to(student_embedding.device),
    )
    distances = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))
    return distance_weight * distances + angle_weight * _angle_loss(student, teacher)


@loss_term(per_sample=True)
def fitnets(student_hint: Tensor, teacher_hint: Tensor) -> Tensor:
    """Compute the mean squared difference of two feature maps (B, C, H, W).

    The student's map is the output of its regressor. Source: Romero et al. 2015, "FitNets: Hints
    for Thin Deep Nets", in the joint form.
    """
    return F.mse_loss(_wide(student_hint), _wide(teacher_hint))


@loss_term(per_sample=True)
def embedding(student_pre_logits: Tensor, teacher_pre_logits: Tensor) -> Tensor:
    """Compute the batch mean of 1 - cosine similarity of student's and teacher's embeddings.

    Both (B, D), the student's behind a linear connector.
    """
    cosines = F.cosine_similarity(_wide(student_pre_logits), _wide(teacher_pre_logits), dim=1)
    return (1 - cosines).mean()


@loss_term(per_sample=True)
def embedding_mse(student_pre_logits: Tensor, teacher_pre_logits: Tensor) -> Tensor:
    """Compute the mean squared difference of the student's and the teacher's embeddings.

    Both (B, D), the student's behind a linear connector.
    """
    return F.mse_loss(_wide(student_pre_logits), _wide(teacher_pre_logits))


@loss_term(per_sample=True)
def residual(student_part: Tensor, assistant_part: Tensor, teacher_hint: Tensor) -> Tensor:
    """Compute residual KD on feature maps: MSE(S, T) + MSE(A, (T - S).detach()).

    (B, C, H, W) each. The second term does not train the student. Source: Gao et al. 2020,
    "Residual Knowledge Distillation".
    """
    student, assistant, teacher = (
        _wide(each) for each in (student_part, assistant_part, teacher_hint)
    )
    left = teacher - student.detach()
    return F.mse_loss(student, teacher) + F.mse_loss(assistant, left)


@loss_term(per_sample=True)
def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: NonNegativeFloat = defaults.Dkd.alpha,
    beta: NonNegativeFloat = defaults.Dkd.beta,
    temperature: PositiveFloat = defaults.Dkd.temperature,
) -> Tensor:
    """Compute decoupled KD: T^2 times the mean of alpha KL(label, rest) + beta KL(among the rest).

    Logits (B, K), labels (B,) int64. Source: Zhao et al. 2022, "Decoupled Knowledge Distillation".
    """
    student = F.log_softmax(_wide(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(_wide(teacher_logits) / temperature, dim=1)
    pairs = [_label_or_not(student, labels), _label_or_not(teacher, labels)]
    target = F.kl_div(pairs[0], pairs[1], reduction="none", log_target=True).sum(dim=1)
    others = [F.log_softmax(_without_label(each, labels), dim=1) for each in (student, teacher)]
    rest = F.kl_div(others[0], others[1], reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * (alpha * target + beta * rest).mean()


@loss_term()
def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: PositiveFloat = defaults.Dist.temperature,
) -> Tensor:
    """Compute T^2 (2 - mean correlation of rows - mean correlation of columns) of probabilities.

    Both (B, K). A constant row or column has correlation 0. Source: Huang et al.
    2022, "Knowledge Distillation from A Stronger Teacher".
    """
    student = F.softmax(_wide(student_logits) / temperature, dim=1)
    teacher = F.softmax(_wide(teacher_logits) / temperature, dim=1)
    rows = 1 - _correlation(student, teacher).mean()
    columns = 1 - _correlation(student.T, teacher.T).mean()
    return temperature**2 * (rows + columns)


@loss_term(per_sample=True)
def lskd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: PositiveFloat = defaults.Lskd.temperature,
) -> Tensor:
    """Compute `kd` of logits standardized per sample to mean 0 and standard deviation 1.

    Both (B, K), K at least 2. Source: Sun et al. 2024, "Logit Standardization in Knowledge
    Distillation".
    """
    return kd(_standardized(student_logits), _standardized(teacher_logits), temperature)


def _wide(values: Tensor) -> Tensor:
    """Convert to at least float32: in 16 bits, distances and divergences are off by percents."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _standardized(logits: Tensor) -> Tensor:
    logits = _wide(logits)
    deviation = logits.std(dim=1, keepdim=True)
    return (logits - logits.mean(dim=1, keepdim=True)) / (deviation + 1e-7)


def _correlation(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return Pearson's correlation (R,) of the rows of two (R, M) tensors; 0 for a constant row."""
    ours = ours - ours.mean(dim=1, keepdim=True)
    theirs = theirs - theirs.mean(dim=1, keepdim=True)
    # The square of a length may underflow, and the root of 0 has no gradient: clamp it first.
    lengths = ours.square().sum(dim=1).clamp(min=1e-16) * theirs.square().sum(dim=1).clamp(1e-16)
    return (ours * theirs).sum(dim=1) / lengths.sqrt()


def _label_or_not(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return (B, 2): the logarithms of p(label) and 1 - p(label)."""
    own = log_probabilities.gather(1, labels[:, None])
    others = _without_label(log_probabilities, labels).logsumexp(dim=1, keepdim=True)
    return torch.cat([own, others], dim=1)


def _without_label(values: Tensor, labels: Tensor) -> Tensor:
    """Remove the column of its label from each row: (B, K) -> (B, K - 1)."""
    columns = torch.arange(values.shape[1] - 1, device=values.device)[None]
    return values.gather(1, columns + (columns >= labels[:, None]))


def _relative_distances(points: Tensor) -> Tensor:
    """Return (B, B) Euclidean distances, divided by the mean of the nonzero ones."""
    products = points @ points.T
    squares = products.diagonal()
    squared = (squares[:, None] + squares[None] - 2 * products).clamp(min=0)
    same = torch.eye(len(points), dtype=torch.bool, device=points.device) | (squared < 1e-12)
    distances = torch.where(same, torch.ones_like(squared), squared).sqrt()
    distances = torch.where(same, torch.zeros_like(squared), distances)
    mean = distances.sum() / (~same).sum().clamp(min=1)
    return distances / mean.clamp(min=1e-12)


def _angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over all B^3 triplets, a few corners at a time; recomputed for gradients."""
    batch = len(student)
    most = _TRIPLETS_AT_ONCE if student.is_cuda else min(_TRIPLETS_AT_ONCE, _TRIPLETS_IN_CACHE)
    at_once = max(1, most // batch**2)
    relations = (*_products_and_lengths(student), *_products_and_lengths(teacher))
    if at_once >= batch:
        return _angle_sum(*relations, 0, batch) / batch**3
    total = student.new_zeros(())
    for start in range(0, batch, at_once):
        end = min(start + at_once, batch)
        total = total + checkpoint(_angle_sum, *relations, start, end, use_reentrant=False)
    return total / batch**3


def _angle_sum(
    student: Tensor,
    student_lengths: Tensor,
    teacher: Tensor,
    teacher_lengths: Tensor,
    start: int,
    end: int,
) -> Tensor:
    """Return the sum over corners `start` to `end`, from products and inverse lengths (B, B)."""
    ours = _cosines(student, student_lengths, start, end)
    theirs = _cosines(teacher, teacher_lengths, start, end)
    return F.smooth_l1_loss(ours, theirs, reduction="sum")


def _products_and_lengths(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (B, B) inner products and inverse distances, which determine all angles.

    Points are centered on their mean, which minimizes rounding errors. For points closer to each
    other than a thousandth of their spread, the direction is undefined: their inverse distance and
    its gradient are 0, because only few digits of their products are exact.
    """
    centered = points - points.mean(dim=0)
    products = centered @ centered.T
    squares = products.diagonal()
    squared = squares[:, None] + squares[None] - 2 * products
    least = (1e-6 * squares.detach().mean()).clamp(min=1e-12)
    same = torch.eye(len(points), dtype=torch.bool, device=points.device) | (squared < least)
    return products, torch.where(same, 0.0, torch.where(same, 1.0, squared).rsqrt())


def _cosines(products: Tensor, inverse: Tensor, start: int, end: int) -> Tensor:
    """Return (R, B, B), the cosines of the angles at each of R corners between pairs of B points.

    With inner products p and inverse distances s, the cosine at corner i between j and k is s_ij
    s_ik (p_jk - p_ij - p_ik + p_ii): p_jk s_ij s_ik plus a matrix of rank two for each i. Thus no
    product over the points' dimensions is needed.
    """
    scale = inverse[start:end]  # (R, B)
    from_corner = products[start:end]
    half = products.diagonal()[start:end, None] / 2
    shift = scale * (half - from_corner)
    rank_two = torch.stack([shift, scale], dim=2) @ torch.stack([scale, shift], dim=1)
    return torch.addcmul(rank_two, products, scale[:, :, None] * scale[:, None, :])


def _kl_per_sample(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return (B,) KL divergences from log-probabilities, which allow probabilities of zero."""
    student = F.log_softmax(_wide(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(_wide(teacher_logits) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
