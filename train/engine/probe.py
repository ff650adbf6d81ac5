"""Measure an embedding by labeled images: by their nearest neighbors, and by a linear classifier.

k-NN accuracy     the class of a test image is a vote of its 20 nearest training images by cosine s,
                  each with weight exp(s / 0.07), as for DINO (Caron et al. 2021)
linear accuracy   of a logistic regression on standardized features; the strength C of its
                  regularization is chosen on a fifth of the training images: the first of
                  ascending strengths that the next one does not surpass
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from teach_once.runtime.metrics import KNN_ACCURACY, LINEAR_ACCURACY
from teach_once.views.probe import NEIGHBORS

Rows = NDArray[Any]

_TEMPERATURE = 0.07
_COSINES_AT_ONCE = 2**24
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # larger ones take longer to converge
_MOST_ITERATIONS = 300


def probe_accuracies(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> dict[str, float]:
    """Return both accuracies in percent: {metric: value}.

    train (N, D) and test (M, D): embeddings on one device. labels: (N,) and (M,) int64.
    """
    found = {
        KNN_ACCURACY.name: nearest_classes(train, train_labels, test),
        LINEAR_ACCURACY.name: linear_classes(train, train_labels, test),
    }
    expected = test_labels.cpu()
    return {
        name: 100.0 * (classes.cpu() == expected).double().mean().item()
        for name, classes in found.items()
    }


@torch.no_grad()
def nearest_classes(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Return the classes (M,) int64 for which the nearest training images vote."""
    train, test = (F.normalize(each.float(), dim=1) for each in (train, test))
    labels = labels.to(train.device)
    num_classes = int(labels.max()) + 1
    found = []
    for part in torch.split(test, max(1, _COSINES_AT_ONCE // len(train))):
        cosines, nearest = (part @ train.T).topk(NEIGHBORS, dim=1)
        votes = torch.zeros(len(part), num_classes, device=train.device)
        # Minus 1: the same order, without overflow.
        votes.scatter_add_(1, labels[nearest], ((cosines - 1) / _TEMPERATURE).exp())
        found.append(votes.argmax(dim=1))
    return torch.cat(found)


def linear_classes(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Return the classes (M,) int64 that a logistic regression chooses."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    ours, theirs = (each.float().cpu().numpy() for each in (train, test))
    classes = labels.cpu().numpy()
    is_held = np.random.default_rng(0).permutation(len(classes)) < len(classes) // 5

    def predicted(strength: float, known: Rows, of_known: Rows, others: Rows) -> Rows:
        model = LogisticRegression(C=strength, max_iter=_MOST_ITERATIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            pipeline = make_pipeline(StandardScaler(), model).fit(known, of_known)
        found: Rows = pipeline.predict(others)
        return found

    def score(strength: float) -> float:
        held = predicted(strength, ours[~is_held], classes[~is_held], ours[is_held])
        return float((held == classes[is_held]).mean())

    chosen, highest = _STRENGTHS[0], -1.0
    for strength in _STRENGTHS if len(np.unique(classes[~is_held])) > 1 else ():
        if (found := score(strength)) <= highest:
            break
        chosen, highest = strength, found
    return torch.from_numpy(predicted(chosen, ours, classes, theirs))
