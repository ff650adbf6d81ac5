"""Reference losses in float64, and inputs for them."""

from __future__ import annotations

import numpy as np


def softmax64(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def kl64(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    """Return divergences (B,) from probabilities in float64, unlike the project's computation."""
    p = softmax64(teacher.astype(np.float64) / temperature)
    q = softmax64(student.astype(np.float64) / temperature)
    return (p * (np.log(p) - np.log(q))).sum(axis=1)


def logits_pair(seed: int, batch: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, (batch, classes)), rng.normal(0, 3, (batch, classes))
