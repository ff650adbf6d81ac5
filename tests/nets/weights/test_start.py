"""Freezing the first stages of a network: its parameters, and the modules in evaluation mode."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

from teach_once.nets.weights.start import freeze

STAGES = {"stage1": "stages.0", "stage2": "stages.1"}


def nested() -> nn.Module:
    """A network whose stages are inside one module, as in timm's."""
    stages = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)))
    parts = OrderedDict(stem=nn.Linear(2, 2), stages=stages, head=nn.Linear(2, 3))
    return nn.Sequential(parts)


@pytest.mark.parametrize(("count", "frozen"), [(1, ("stem", "stages.0")), (2, ("stem", "stages"))])
def test_freeze_of_nested_stages_leaves_modules_around_trained_ones_in_training(
    count: int, frozen: tuple[str, ...]
) -> None:
    network = nested()
    modules = freeze(network, STAGES, count)
    for module in modules:
        module.eval()
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    for name, module in network.named_modules():
        if name not in ("", "stages"):
            assert module.training != name.startswith(frozen), name
