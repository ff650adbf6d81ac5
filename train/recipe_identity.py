"""What a recipe adds to a run's identity."""

from __future__ import annotations

from typing import Any

from configs.schema import LATER_TRAINING_KEYS, Training, as_identity
from runtime.limits import num_ranks


def recipe_identity(training: Training, ranks: int | None = None) -> dict[str, Any]:
    """The recipe as plain data: all of it that decides what a network becomes.

    How many processes train together decides something only where each one normalises its own slice
    of a batch; then it is here as "ranks". To a single process `batch_norm` makes no difference.
    ranks: how many; None: as many as this process was started with.
    """
    plain = as_identity(training, LATER_TRAINING_KEYS)
    if plain.pop("batch_norm", "sync") == "sync":
        return plain
    ranks = num_ranks() if ranks is None else ranks
    return {**plain, "batch_norm": "local", "ranks": ranks} if ranks > 1 else plain
