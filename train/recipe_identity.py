"""What a recipe and a network add to a run's identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.schema import (
    LATER_STUDENT_KEYS,
    LATER_TRAINING_KEYS,
    LossTerm,
    StudentConfig,
    StudentNet,
    Training,
    as_identity,
)
from nets.archs import has_stem
from nets.identity import init_identity
from runtime.limits import num_ranks
from train.errors import TrainError


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


def network_identity(net: StudentNet, linear_connectors: Sequence[str]) -> dict[str, Any]:
    """The student's network and connectors as plain data: the layers, not the key that chose them.

    linear_connectors: the taps whose connectors end without ReLU; none of them leaves the identity
    of earlier runs as it was. Raises TrainError if the file of initial weights is missing.
    """
    stem = {} if has_stem(net.arch) else {"stem": "cifar"}
    init = init_identity(net.init)
    if init.get("init", "") is None:
        raise TrainError(f"student.init: there is no file {net.init}", fix="set student.init=PATH")
    plain = as_identity(net, LATER_STUDENT_KEYS)
    plain.pop("relu_to_signed", None)  # it only allows what `connector` asks for
    plain["connector"] = "none" if net.connector == "none" else "conv-bn-relu"
    if linear_connectors:
        plain["linear_connectors"] = list(linear_connectors)
    return {**plain, **stem, **init}


def pair_identity(config: StudentConfig, terms: Sequence[LossTerm]) -> dict[str, str]:
    """What tells Residual KD's pairs from those that were trained with weight decay on all.

    The networks of a pair may name parameters that have none, as timm's do (`no_weight_decay`),
    which once was ignored. Loads torch only for such networks.
    """
    thinner = config.student.thinner
    if config.training.decay_norms_and_biases or thinner is None:
        return {}
    if not thinner.arch.startswith(("timm:", "python:")):
        return {}
    from train.residual import is_pair  # loads torch

    return {"no_weight_decay": "student and assistant"} if is_pair(terms) else {}
