"""Residual KD: a student and an assistant, whose maps add up to the teacher's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from teach_once.configs.load import load_student
from teach_once.configs.schema import LossTerm
from teach_once.nets.networks.archs import ArchError
from teach_once.nets.networks.layout import TapError
from teach_once.nets.networks.zoo import build
from teach_once.nets.student import StudentAndAssistant, build_student
from teach_once.nets.teacher.taps import as_is, read_stages
from teach_once.train import losses
from teach_once.train.errors import TrainError
from teach_once.train.method.optimizer import parameter_groups
from teach_once.train.recording.export import export_student
from teach_once.train.recording.recorder import EpochResult
from teach_once.train.runs.check_methods import check_without_cache
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import open_context, train_student
from teach_once.train.terms import looked_at
from tests.support.caches.teacher_cache import CPU
from tests.support.training.training_runs import largest_relative, metrics_of_logits

MakeStudy = Callable[..., Study]
HINT = "taps.hint={stage: stage2, dtype: float32}"
FLOAT32 = (HINT, "taps.logits=float32", "taps.channel_means=float32")
TERMS = (LossTerm(loss="ce"), LossTerm(loss="residual"))


def pair(stage: str = "layer2") -> StudentAndAssistant:
    def thin(seed: int) -> nn.Module:
        return build("resnet8", num_classes=10, in_channels=1, seed=seed, options={"width": 0.7})

    return StudentAndAssistant(thin(0), thin(1), stage)


def by_hand(network: StudentAndAssistant, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, F_S and F_A of a pair whose maps are added behind layer2."""

    def trunk(net: nn.Module) -> Tensor:
        return net.layer2(net.layer1(net.relu(net.bn1(net.conv1(images)))))

    of_student, of_assistant = trunk(network.student), trunk(network.assistant)
    rest = network.student.layer3(of_student + of_assistant)
    return network.student.fc(rest.mean(dim=(2, 3))), of_student, of_assistant


def test_the_prediction_is_the_rest_of_the_student_s_on_the_sum_of_both_maps() -> None:
    network, images = pair().eval(), torch.randn(3, 1, 8, 8)
    stages = {"student": "of_student", "assistant": "of_assistant", "stage2": "student.layer2"}
    with torch.no_grad(), read_stages(network, stages, as_is) as maps:
        logits = network(images)
    expected, of_student, of_assistant = by_hand(network, images)
    assert torch.allclose(logits, expected, atol=1e-6)
    assert torch.allclose(maps["student"], of_student)
    assert torch.allclose(maps["assistant"], of_assistant)
    assert torch.allclose(maps["stage2"], of_student + of_assistant)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("stage", ["layer1", "layer2", "layer3"])
def test_both_together_cost_no_more_than_the_plain_student(stage: str) -> None:
    def products(network: nn.Module) -> int:
        counted: list[int] = []

        def count(module: nn.Module, inputs: object, output: Tensor) -> None:
            weight = module.weight
            counted.append(weight.numel() * (output[0].numel() // len(weight)))

        layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        handles = [layer.register_forward_hook(count) for layer in layers]
        network(torch.zeros(2, 3, 32, 32))
        for handle in handles:
            handle.remove()
        return sum(counted)

    plain = build("resnet20", num_classes=10)
    thin = [build("resnet20", num_classes=10, seed=n, options={"width": 0.7}) for n in (0, 1)]
    both = StudentAndAssistant(thin[0], thin[1], stage)
    assert products(both) <= products(plain)
    assert sum(p.numel() for p in both.parameters()) <= sum(p.numel() for p in plain.parameters())


def test_the_loss_is_two_mean_squares_and_the_second_leaves_the_student_alone() -> None:
    student, assistant, teacher = torch.randn(3, 2, 4, 3, 3).unbind()
    student, assistant = student.requires_grad_(), assistant.requires_grad_()
    loss = losses.residual(student, assistant, teacher)
    first = (student - teacher).square().mean()
    expected = first + (assistant - (teacher - student)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(loss, [student, assistant])
    assert torch.allclose(gradients[0], torch.autograd.grad(first, student)[0])
    gap = (assistant - (teacher - student)).detach()
    assert torch.allclose(gradients[1], 2 * gap / gap.numel())


def test_one_linear_projection_is_that_of_the_sum(make_study: MakeStudy) -> None:
    context = open_context(make_study(teacher=[HINT]).run("residual", 0), CPU)
    connectors = context.train_state.connectors
    assert connectors is not None
    maps = {name: torch.randn(2, 22, 4, 4) for name in ("student", "assistant")}
    one, other = connectors.parts_of(maps)
    assert torch.allclose(
        one + other, connectors.projection(maps["student"] + maps["assistant"]), atol=1e-6
    )


@pytest.mark.parametrize("more", ["", ", {loss: cd}, {loss: kd}, {loss: fitnets}"])
def test_a_cached_run_equals_a_live_one(make_study: MakeStudy, more: str) -> None:
    study = make_study(
        teacher=FLOAT32,
        student=[f"methods.residual=[{{loss: ce}}, {{loss: residual, weight: 5}}{more}]"],
    )
    found = []
    for live in (False, True):
        epochs: list[EpochResult] = []
        train_student(study.run("residual", 0, live), device="cpu", on_epoch=epochs.append)
        found.append([loss for epoch in epochs for loss in epoch.step_losses])
    assert len(found[0]) == 16
    assert largest_relative(*found) < 1e-5
    last = epochs[-1].losses["residual"]
    assert last < epochs[0].losses["residual"]


def test_what_the_networks_of_a_pair_except_from_weight_decay_is_excepted() -> None:
    class Positions(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4))
            self.pos_embed = nn.Parameter(torch.ones(1, 4))

        def no_weight_decay(self) -> set[str]:
            return {"pos_embed"}

    network = StudentAndAssistant(Positions(), Positions(), "0")
    training = load_student("digits-resnet8", ["training.weight_decay_norm_bias=false"]).training
    groups = parameter_groups([network], training)
    decayed = [id(each) for group in groups if group["weight_decay"] for each in group["params"]]
    weights = [network.student[0].weight, network.assistant[0].weight]
    assert sorted(decayed) == sorted(map(id, weights))


def test_every_part_of_a_pair_is_trained(make_study: MakeStudy) -> None:
    study = make_study(teacher=[HINT], student=["training.epochs=2"])
    before = copy.deepcopy(
        open_context(study.run("residual", 0), CPU).train_state.network.state_dict()
    )
    train_student(study.run("residual", 0), device="cpu")
    after = torch.load(study.run("residual", 0).folder / "last.pt", weights_only=True)
    assert set(after) == set(before)
    assert not [name for name in after if torch.equal(after[name], before[name])]
    assert not [name for name in after if name.startswith(("assistant.layer3", "assistant.fc"))]
    assert not torch.equal(before["student.conv1.weight"], before["assistant.conv1.weight"])


def test_a_pair_is_exported_as_one_program(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(teacher=[HINT], student=["training.epochs=2", "training.ema.decay=0.9"])
    summary = train_student(study.run("residual", 0), device="cpu")
    (card,) = export_student(study.run("residual", 0), ["last"], tmp_path / "out", device="cpu")
    assert card["metrics"] == summary["last"]
    assert card["program_metrics"] == pytest.approx(metrics_of_logits(card), abs=0.3)
    assert json.loads((tmp_path / "out" / "student.json").read_text())["two_of"] == {
        "arch": "resnet8",
        "stem": "cifar",
        "options": {"width": 0.7},
    }


def test_what_a_pair_cannot_be_made_of_is_refused() -> None:
    def built(*overrides: str, hint: str | None = "stage2") -> nn.Module:
        net, outputs = load_student("digits-resnet8", overrides).student, looked_at(TERMS)
        return build_student(net, outputs, hint, num_classes=10, image_shape=(32, 32, 3))

    with pytest.raises(ArchError, match=r"no thinner copy of resnet18(?s:.*)student.thinner.arch="):
        built("student.arch=resnet18")
    with pytest.raises(ArchError, match=r"student.init is for one network"):
        built("student.init=weights.pt")
    with pytest.raises(TapError, match="the cache's hint is stage4, which the student lacks"):
        built(hint="stage4")
    named = built("student.arch=resnet18", "student.thinner={arch: resnet14}")
    assert len(named.student.layer1) == 2


def test_a_cache_without_a_hint_is_refused_before_anything_runs(make_study: MakeStudy) -> None:
    study = make_study()
    with pytest.raises(TrainError, match=r"needs the taps hint(?s:.*)taps.hint.stage=stage2"):
        check_without_cache(study.config, study.teacher, ["residual"])
