"""Compare a student with its teacher on test images, whose teacher outputs are in the cache.

top-1 agreement        how often both networks' largest logits are of the same class
KL from the teacher    the mean of KL(softmax(teacher) || softmax(student)), at temperature 1
embedding cosine       the mean cosine of the teacher's embedding and the student's, behind the
                       connector that the method trains
neighbor disagreement  100 - the mean percentage of an image's 20 nearest neighbors by the teacher's
                       embedding that are also among its 20 nearest by the student's; by cosine

The neighbor disagreement needs neither classes nor a connector, so it compares all methods and
sizes of networks. It is computed over at most 10,000 images, spread evenly over the test images.
With fewer than 81 images, fewer neighbors are compared: a quarter of the other images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from teach_once.nets.metrics import ErrorCount
from teach_once.runtime.metrics import (
    EMBEDDING_COSINE,
    NEIGHBOR_DISAGREEMENT,
    TEACHER_KL,
    TOP1_AGREEMENT,
)
from teach_once.train.engine.ranks import ALONE, Ranks
from teach_once.views.pixels.batches import ViewBatch

_NEIGHBORS = 20
FEWEST_COMPARED = 3  # of two images, each is always the other's neighbor
_MOST_COMPARED = 10_000
_COSINES_AT_ONCE = 2**24


@dataclass(frozen=True)
class TeacherReference:
    """A teacher's outputs of the N test images, in host memory.

    logits: (N, K) float32; None: not in the cache. embedding: (N, D) float32, the teacher's
    embeddings or its last channel means; None: neither is in the cache. is_pre_logits: they are
    embeddings, which a connector of the student is trained to match.
    """

    logits: Tensor | None
    embedding: Tensor | None
    is_pre_logits: bool = False

    @cached_property
    def compared(self) -> Tensor:
        """The images (M,) int64 whose neighbors are compared, in order."""
        assert self.embedding is not None
        num_images = len(self.embedding)
        num_compared = min(num_images, _MOST_COMPARED)
        return torch.arange(num_compared) * num_images // num_compared

    @cached_property
    def neighbors(self) -> Tensor:
        """The neighbors (M, k) of the compared images, as indices into them."""
        assert self.embedding is not None
        return nearest_neighbors(self.embedding[self.compared])


@dataclass(frozen=True)
class Evaluator:
    """The metrics that a run's network has.

    has_labels: of the test images. num_classes: of the network's logits; 0: it has no classifier;
    None: unknown. reference: None: it is not compared with a teacher. classifiers: modules whose
    input is the network's embedding; (): unknown. connect: maps the network's embedding to the
    teacher's.
    """

    has_labels: bool = True
    num_classes: int | None = None
    reference: TeacherReference | None = None
    classifiers: tuple[str, ...] = ()
    connect: Callable[[Tensor], Tensor] | None = None

    @property
    def counts_errors(self) -> bool:
        return self.has_labels and self.num_classes != 0

    @property
    def compares_logits(self) -> bool:
        """True if network and teacher have logits of the same number of classes."""
        logits = self.reference.logits if self.reference is not None else None
        return logits is not None and logits.shape[1] == self.num_classes

    @property
    def compares_cosines(self) -> bool:
        reference = self.reference
        is_trained = reference is not None and reference.is_pre_logits and self.connect is not None
        return is_trained and self.reads_embedding

    @property
    def reads_embedding(self) -> bool:
        """True if metrics need the network's embedding."""
        embedding = self.reference.embedding if self.reference is not None else None
        is_enough = embedding is not None and len(embedding) >= FEWEST_COMPARED
        return is_enough and bool(self.classifiers)


ERRORS_ONLY = Evaluator()


class MetricCount:
    """Metrics of a split, added batch by batch; the device is synchronized once, in `values`."""

    def __init__(self, evaluator: Evaluator, num_samples: int, ranks: Ranks = ALONE) -> None:
        """Count nothing so far. num_samples: samples of the split, on all ranks."""
        self._evaluator, self._ranks, self._num_samples = evaluator, ranks, num_samples
        self._errors = ErrorCount()
        # The names on all ranks, even on one without samples.
        names = [TOP1_AGREEMENT.name, TEACHER_KL.name] if evaluator.compares_logits else []
        names += [EMBEDDING_COSINE.name] if evaluator.compares_cosines else []
        self._sums: dict[str, list[Tensor]] = {name: [] for name in names}
        self._embeddings: list[Tensor] = []

    @torch.no_grad()
    def add(self, batch: ViewBatch, outputs: Tensor, embedding: Tensor | None = None) -> None:
        """Add a batch of B samples.

        outputs: the network's output, (B, K) logits or, without a classifier, (B, D). embedding:
        (B, D); None: not read.
        """
        evaluator, ids = self._evaluator, batch.host_ids
        if evaluator.counts_errors:
            self._errors.add(outputs, batch.labels)
        if (reference := evaluator.reference) is None:
            return
        if evaluator.compares_logits and reference.logits is not None:
            self._compare_logits(outputs, reference.logits[ids].to(outputs.device))
        if embedding is not None and reference.embedding is not None:
            self._embeddings.append(embedding.float())
            if evaluator.compares_cosines and evaluator.connect is not None:
                theirs = reference.embedding[ids].to(embedding.device)
                cosines = F.cosine_similarity(evaluator.connect(embedding).float(), theirs)
                self._sums[EMBEDDING_COSINE.name].append(cosines.sum())

    def _compare_logits(self, ours: Tensor, theirs: Tensor) -> None:
        divergence = F.kl_div(
            F.log_softmax(ours.float(), dim=1),
            F.log_softmax(theirs, dim=1),
            reduction="sum",
            log_target=True,
        )
        same = (ours.argmax(dim=1) == theirs.argmax(dim=1)).sum()
        self._sums[TOP1_AGREEMENT.name].append(100.0 * same)
        self._sums[TEACHER_KL.name].append(divergence.clamp(min=0))

    @torch.no_grad()
    def values(self, device: torch.device) -> dict[str, float]:
        """Return the metrics of all batches, of all ranks: {name: value}."""
        ranks, found = self._ranks, dict[str, float]()
        if self._evaluator.counts_errors:
            found |= self._errors.rates(lambda counts: ranks.all_reduce(counts.to(device)))
        for name, values in self._sums.items():
            total = torch.stack(values or [torch.zeros(())]).cpu().double().sum()
            if not ranks.is_alone:
                total = ranks.all_reduce(total.to(device))
            # A student that diverged has none, and its loss is the error.
            if math.isfinite(mean := total.item() / self._num_samples):
                found[name] = mean
        if self._evaluator.reads_embedding and (self._embeddings or not ranks.is_alone):
            found[NEIGHBOR_DISAGREEMENT.name] = self._neighbor_disagreement(device)
        return found

    def _neighbor_disagreement(self, device: torch.device) -> float:
        reference, ranks = self._evaluator.reference, self._ranks
        assert reference is not None
        if ranks.is_alone:
            embeddings = torch.cat(self._embeddings)
        else:
            own = self._embeddings  # rank 0 has some, if any rank does
            size = int(ranks.broadcast_number(float(own[0].shape[1] if own else 0)))
            own = own or [torch.zeros(0, size, device=device)]
            (embeddings,) = ranks.all_gather_rows([torch.cat(own)], self._num_samples)
        compared = reference.compared.to(embeddings.device)
        return disagreement(nearest_neighbors(embeddings[compared]), reference.neighbors)


def nearest_neighbors(points: Tensor) -> Tensor:
    """Return the nearest other points (M, k) int64 of M points (M, D), by cosine.

    k is 20, or a quarter of the other points if that is less; at least 1.
    """
    points = F.normalize(points.float(), dim=1)
    number, found = max(1, min(_NEIGHBORS, (len(points) - 1) // 4)), []
    rows = max(1, _COSINES_AT_ONCE // len(points))
    for start in range(0, len(points), rows):
        cosines = points[start : start + rows] @ points.T
        own = torch.arange(len(cosines), device=points.device)
        cosines[own, own + start] = -torch.inf
        found.append(cosines.topk(number, dim=1).indices)
    return torch.cat(found)


def disagreement(ours: Tensor, theirs: Tensor) -> float:
    """Return 100 - the mean percentage of neighbors (M, k) that are in both, row by row."""
    ours, theirs = ours.cpu(), theirs.cpu()
    both = sum(int((ours == theirs[:, n : n + 1]).sum()) for n in range(theirs.shape[1]))
    return 100.0 - 100.0 * both / ours.numel()
