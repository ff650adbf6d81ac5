"""The description of a student's network, which leaves the network as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from teach_once.configs.load import load_student
from teach_once.nets.student import build_student, describe_student

SHAPE = (8, 8, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("outputs", [("logits",), ("stages", "pre_logits"), ("parts",)])
def test_describe_student_in_either_mode_leaves_mode_and_statistics(
    training: bool, outputs: tuple[str, ...]
) -> None:
    net = load_student("digits-resnet8").student
    network = build_student(net, outputs, "stage2", num_classes=10, image_shape=SHAPE)
    network.train(training)
    before = copy.deepcopy(network.state_dict())
    parts = describe_student(network, net, outputs, SHAPE)
    assert ("stage2" in parts.shapes) == (outputs != ("logits",))
    assert {module.training for module in network.modules()} == {training}
    assert all(torch.equal(network.state_dict()[name], each) for name, each in before.items())
