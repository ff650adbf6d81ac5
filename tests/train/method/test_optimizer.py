"""The optimizer compared with an independent implementation in plain tensors."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from teach_once.configs.load import load_student
from teach_once.configs.schema import Training
from teach_once.nets.networks.zoo import build
from teach_once.train import losses
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.engine.step import ActiveTerm, train_step
from teach_once.train.engine.train_state import TrainState, build_train_state
from teach_once.train.method.optimizer import parameter_groups
from teach_once.train.outputs.teacher_outputs import NoTeacher
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import train_student
from teach_once.views.pixels.batches import ViewBatch
from tests.support.caches.teacher_cache import CPU

CE = [ActiveTerm("ce", 1.0, {})]
RATE = 0.01


def recipe(*overrides: str) -> Training:
    return load_student("digits-resnet8", [f"training.learning_rate={RATE}", *overrides]).training


def network_of(*, norm: bool = True, classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm2d(6)] if norm else []
    layers = [
        nn.Conv2d(2, 6, 3, bias=not norm),
        *middle,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(6, classes))


def batches(count: int, size: int = 6, scale: float = 1.0) -> list[ViewBatch]:
    draw = torch.Generator().manual_seed(1)
    return [
        ViewBatch(
            view=0,
            ids=torch.arange(size),
            host_ids=torch.arange(size),
            inputs=scale * torch.randn(size, 2, 5, 5, generator=draw),
            labels=torch.randint(5, (size,), generator=draw),
        )
        for _ in range(count)
    ]


def train_state_of(network: nn.Module, *overrides: str, freeze: bool = True) -> TrainState:
    return build_train_state(network, None, recipe(*overrides), CPU, freeze_idle_classifier=freeze)


def steps(train_state: TrainState, shown: Sequence[ViewBatch]) -> list[float]:
    return [train_step(train_state, NoTeacher(), batch, CE)["total"].item() for batch in shown]


class ByHand:
    """The same network trained in plain tensors; `update` changes one parameter."""

    def __init__(self, update: Callable[[str, Tensor, Tensor, int], None], **network: Any) -> None:
        self.network, self.update = network_of(**network), update

    def steps(self, shown: Sequence[ViewBatch]) -> list[float]:
        told = []
        for number, batch in enumerate(shown, start=1):
            logits = self.network(batch.inputs)
            loss = -logits.log_softmax(dim=1)[range(len(logits)), batch.labels].mean()
            gradients = torch.autograd.grad(loss, list(self.network.parameters()))
            with torch.no_grad():
                for (name, parameter), gradient in zip(
                    self.network.named_parameters(), self.changed(list(gradients)), strict=True
                ):
                    self.update(name, parameter, gradient, number)
            told.append(loss.item())
            self.after_step()
        return told

    def changed(self, gradients: list[Tensor]) -> list[Tensor]:
        return gradients

    def after_step(self) -> None:
        pass


def assert_same(ours: nn.Module, by_hand: nn.Module, tolerance: float = 1e-5) -> None:
    theirs = by_hand.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.allclose(value, theirs[name], rtol=tolerance, atol=tolerance), name


def adamw(decay: float, undecayed: Sequence[str] = ()) -> Callable[..., None]:
    """Loshchilov and Hutter 2019, algorithm 2, with betas 0.8 and 0.95."""
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}

    def update(name: str, parameter: Tensor, gradient: Tensor, step: int) -> None:
        first[name] = 0.8 * first.get(name, 0.0) + 0.2 * gradient
        second[name] = 0.95 * second.get(name, 0.0) + 0.05 * gradient**2
        mean, square = first[name] / (1 - 0.8**step), second[name] / (1 - 0.95**step)
        shrunk = parameter * (1 - RATE * (0.0 if name in undecayed else decay))
        parameter.copy_(shrunk - RATE * mean / (square.sqrt() + 1e-6))

    return update


ADAMW = ("training.optimizer={type: adamw, betas: [0.8, 0.95], eps: 1e-6}",)


def test_adamw_is_its_paper_s() -> None:
    train_state = train_state_of(network_of(), *ADAMW, "training.weight_decay=0.3")
    by_hand = ByHand(adamw(0.3))
    shown = batches(6)
    assert steps(train_state, shown) == pytest.approx(by_hand.steps(shown), rel=1e-5)
    assert_same(train_state.network, by_hand.network)


def test_without_decay_of_norms_and_biases_only_the_weights_shrink() -> None:
    settings = ("training.weight_decay=0.3", "training.weight_decay_norm_bias=false")
    train_state = train_state_of(network_of(), *ADAMW, *settings)
    by_hand = ByHand(adamw(0.3, undecayed=["1.weight", "1.bias", "5.bias"]))
    shown = batches(6)
    assert steps(train_state, shown) == pytest.approx(by_hand.steps(shown), rel=1e-5)
    assert_same(train_state.network, by_hand.network)


def test_what_a_network_names_itself_is_not_decayed_either() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.ones(1, 4, 6))
            self.norm = nn.LayerNorm((4, 6))
            self.head = nn.Linear(6, 5)

        def no_weight_decay(self) -> set[str]:
            return {"pos_embed"}

    network = Positions()
    training = recipe("training.weight_decay_norm_bias=false", "training.weight_decay=0.3")
    groups = parameter_groups([network], training)
    decayed = [
        parameter for group in groups if group["weight_decay"] for parameter in group["params"]
    ]
    assert [parameter is network.head.weight for parameter in decayed] == [True]
    assert sum(len(group["params"]) for group in groups) == 5


def test_a_long_gradient_is_cut_to_its_length() -> None:
    class Clipped(ByHand):
        lengths: ClassVar[list[float]] = []

        def changed(self, gradients: list[Tensor]) -> list[Tensor]:
            length = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
            self.lengths.append(length)
            return [g * min(1.0, 0.6 / length) for g in gradients]

    def sgd(name: str, parameter: Tensor, gradient: Tensor, step: int) -> None:
        parameter.sub_(gradient, alpha=0.1)

    plain = ("training.momentum=0.0", "training.weight_decay=0.0", "training.learning_rate=0.1")
    train_state = train_state_of(network_of(), *plain, "training.max_grad_norm=0.6")
    by_hand, shown = Clipped(sgd), batches(8)
    assert steps(train_state, shown) == pytest.approx(by_hand.steps(shown), rel=1e-5)
    assert_same(train_state.network, by_hand.network)
    assert min(by_hand.lengths) < 0.6 < max(by_hand.lengths)


def test_the_average_follows_the_weights_and_the_statistics_of_batch_norms() -> None:
    class Averaging(ByHand):
        average: ClassVar[dict[str, Tensor]] = {}

        def after_step(self) -> None:
            for name, value in self.network.state_dict().items():
                old = self.average.get(name, value)
                self.average[name] = (0.7 * old + 0.3 * value).clone()

    train_state = train_state_of(
        network_of(), *ADAMW, "training.weight_decay=0.3", "training.ema.decay=0.7"
    )
    by_hand, shown = Averaging(adamw(0.3)), batches(5)
    steps(train_state, shown)
    by_hand.steps(shown)
    assert train_state.average is not None
    averaged = train_state.average.module.state_dict()
    for name in averaged:
        if name != "1.num_batches_tracked":
            assert torch.allclose(averaged[name], by_hand.average[name], atol=1e-5), name
            assert not torch.allclose(averaged[name], train_state.network.state_dict()[name])


class Indexed(nn.Module):
    """Passes on its input; has tensors that a network looks things up in."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.arange(2401) * 3 + 1)
        self.register_buffer("is_kept", torch.tensor([True, False, True]))
        self.register_buffer("bytes", torch.tensor([7, 255], dtype=torch.uint8))
        self.register_buffer("table", torch.rand(3), persistent=False)
        self.number = nn.Parameter(torch.tensor([5, 9]), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            self.table.add_(1.0)  # derived from the step, not learned
            self.number.add_(3)
        return features


def test_the_average_leaves_its_counter_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    train_state = train_state_of(network_of(), *ADAMW, "training.ema.decay=0.7")
    average = train_state.average
    assert average is not None
    copies: list[object] = []
    average.n_averaged.to = lambda *device: copies.append(device)  # type: ignore[assignment]
    for _ in range(3):
        average.update_parameters(train_state.network)
    assert int(average.n_averaged) == 3
    assert copies == []


@pytest.mark.parametrize("decay", [0.3, 0.7, 0.99, 0.9999])
def test_the_average_of_integers_and_of_buffers_that_are_not_saved_is_a_copy(decay: float) -> None:
    train_state = train_state_of(
        nn.Sequential(Indexed(), *network_of()), *ADAMW, f"training.ema.decay={decay}"
    )
    steps(train_state, batches(6))
    assert train_state.average is not None
    network, averaged = train_state.network, train_state.average.module
    tensors = {**dict(averaged.named_parameters()), **dict(averaged.named_buffers())}
    expected = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    copied = {"0.index", "0.is_kept", "0.bytes", "0.table", "0.number", "2.num_batches_tracked"}
    assert int(expected["2.num_batches_tracked"]) == 6
    for name, value in tensors.items():
        assert torch.equal(value, expected[name]) == (name in copied), name


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_batch_in_parts_is_the_same_step(parts: int) -> None:
    settings = (*ADAMW, "training.max_grad_norm=0.3")
    whole = train_state_of(network_of(norm=False), *settings)
    split = train_state_of(
        network_of(norm=False), *settings, f"training.gradient_accumulation={parts}"
    )
    shown = [*batches(3, size=6), *batches(1, size=5)]  # 5 samples are no equal parts
    assert steps(split, shown) == pytest.approx(steps(whole, shown), rel=1e-5)
    assert_same(split.network, whole.network)


def test_each_part_of_a_batch_is_a_forward_pass_of_its_own() -> None:
    train_state = train_state_of(network_of(), "training.gradient_accumulation=3")
    steps(train_state, batches(2))
    assert train_state.network[1].num_batches_tracked == 6


def test_parts_are_as_equal_as_possible_and_hold_every_sample_once() -> None:
    (batch,) = batches(1, size=7)
    mixed = dataclasses.replace(batch, other_labels=batch.labels + 1, other_shares=torch.rand(7))
    parts = mixed.split(3)
    assert [len(part.ids) for part in parts] == [3, 2, 2]
    for name in ("ids", "inputs", "labels", "other_labels", "other_shares"):
        whole = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(whole, getattr(mixed, name)), name
    assert [len(part.ids) for part in batch.split(9)] == [1] * 7


def test_smoothed_labels_are_shared_out_over_all_classes() -> None:
    torch.manual_seed(0)
    logits, labels, others = torch.randn(4, 5), torch.arange(4), torch.tensor([1, 0, 3, 2])
    shares = torch.tensor([0.0, 0.1, 0.3, 0.5])
    wanted = torch.full((4, 5), 0.2 / 5)
    wanted[range(4), labels] += 0.8
    by_hand = -(wanted * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert losses.ce(logits, labels, label_smoothing=0.2) == pytest.approx(by_hand.item(), rel=1e-6)
    wanted = torch.full((4, 5), 0.2 / 5)
    wanted[range(4), labels] += 0.8 * (1 - shares)
    wanted[range(4), others] += 0.8 * shares
    by_hand = -(wanted * logits.log_softmax(dim=1)).sum(dim=1).mean()
    mixed = losses.ce(logits, labels, others, shares, label_smoothing=0.2)
    assert mixed == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize("optimizer", [ADAMW, ("training.momentum=0.8",)])
@pytest.mark.parametrize("clip", [(), ("training.max_grad_norm=0.3",)])
def test_float16_trains_as_float32_does_and_leaves_out_a_step_that_overflows(
    optimizer: tuple[str, ...], clip: tuple[str, ...]
) -> None:
    settings = (*optimizer, *clip, "training.weight_decay=0.0")
    wide = train_state_of(network_of(norm=False), *settings)
    half = train_state_of(network_of(norm=False), *settings, "training.precision=float16")
    shown = batches(4)
    assert steps(half, shown) == pytest.approx(steps(wide, shown), rel=1e-2)
    first = network_of(norm=False).state_dict()
    moved = [each.network.state_dict()["4.weight"] - first["4.weight"] for each in (half, wide)]
    assert (moved[0] - moved[1]).norm() < 0.1 * moved[1].norm()
    scale = half.scaler.get_scale()
    assert scale == 2.0**16
    before = {name: value.clone() for name, value in half.network.state_dict().items()}
    (overflowing,) = batches(1, scale=1e3)
    assert math.isfinite(steps(half, [overflowing])[0])
    assert half.scaler.get_scale() == scale / 2
    assert all(
        torch.equal(value, before[name]) for name, value in half.network.state_dict().items()
    )
    steps(half, shown)
    assert not torch.equal(half.network.state_dict()["0.weight"], before["0.weight"])


@pytest.mark.parametrize("freeze", ["true", "false"])
def test_while_no_loss_reaches_the_classifier_adamw_leaves_it_or_shrinks_it(
    make_study: Callable[..., Study], freeze: str
) -> None:
    """Its decay is decoupled: without a gradient it is the decay alone."""
    settings = [
        "training.weight_decay=0.5",
        "training.epochs=4",
        "training.schedule.milestones=[4]",
    ]
    method = "methods.cd=[{loss: cd}, {loss: ce, start_epoch: 4}]"
    idle = f"training.freeze_idle_classifier={freeze}"
    study = make_study(student=[*ADAMW, *settings, method, idle, f"training.learning_rate={RATE}"])

    def stop_after_the_third(result: EpochResult) -> None:
        if result.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_student(study.run("cd", 0), device="cpu", on_epoch=stop_after_the_third)
    saved = torch.load(study.run("cd", 0).folder / "checkpoint.pt", weights_only=True)
    assert saved["epoch"] == 3
    trained = saved["network"]
    first = build("resnet8", num_classes=10, in_channels=1, seed=0).fc.weight
    shrunk = first if freeze == "true" else first * (1 - RATE * 0.5) ** 12
    assert torch.allclose(trained["fc.weight"], shrunk, rtol=1e-5)


def test_the_state_of_a_learner_is_all_that_its_next_steps_depend_on() -> None:
    settings = (*ADAMW, "training.precision=float16", "training.ema.decay=0.7")
    shown = [*batches(3), *batches(1, scale=1e3), *batches(2)]  # one step is left out
    one, other = train_state_of(network_of(), *settings), train_state_of(network_of(), *settings)
    steps(one, shown[:4])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert steps(one, shown[4:]) == steps(other, shown[4:])
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours["scaler"] == theirs["scaler"]
    for part in ("network", "average"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])
