"""A run equals an independent implementation: another loop, other formulas, plain SGD."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from teach_once.configs.schema import CenterCrop, ViewsConfig
from teach_once.nets.metrics import count_errors
from teach_once.nets.networks.names import stage_modules
from teach_once.nets.networks.zoo import build
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.engine.train_state import build_train_state
from teach_once.train.method.connectors import Connectors, build_connectors
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import train_student
from teach_once.views.augment.augment import view_pixels
from teach_once.views.seeds import permutation
from teach_once.views.splits import Split
from tests.support.caches.teacher_cache import CPU

CHANNELS = {"stage1": 16, "stage2": 32, "stage3": 64}
EPOCHS, BATCH, SEED = 4, 16, 3
RATE = 0.002  # with larger ones rounding grows from step to step
METHOD = (
    "methods.all=[{loss: ce}, {loss: kd, weight: 0.5, temperature: 2}, {loss: gkd, weight: 0.3},"
    "{loss: cd, weight: 6, decay: 0.5, decay_epochs: [3]}]"
)
SETTINGS = (
    f"training.learning_rate={RATE}",
    "training.schedule={type: multistep, milestones: [2], gamma: 0.2}",
    "training.momentum=0.8",
    "training.nesterov=true",
    "training.weight_decay=5e-3",
    f"training.batch_size={BATCH}",
    f"training.epochs={EPOCHS}",
)
FLOAT32 = ("taps.logits=float32", "taps.channel_means=float32")


class ByHand:
    """resnet8 and connectors of plain parts, and what of them the losses look at."""

    def __init__(self) -> None:
        self.network = build("resnet8", num_classes=10, in_channels=1, seed=SEED)
        theirs = build_connectors(CHANNELS, CHANNELS, "conv-bn-relu", SEED)
        self.connectors = {}
        for stage, channels in CHANNELS.items():
            convolution = nn.Conv2d(channels, channels, 1, bias=False)
            convolution.weight = nn.Parameter(theirs.stages[stage][0].weight.detach().clone())
            self.connectors[stage] = nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())
        self.maps: dict[str, torch.Tensor] = {}
        modules = dict(self.network.named_modules())
        for stage, module in stage_modules("resnet8").items():
            modules[module].register_forward_hook(
                lambda _, inputs, output, stage=stage: self.maps.update({stage: output})
            )

    def parameters(self) -> list[nn.Parameter]:
        parts = [self.network, *self.connectors.values()]
        return [parameter for part in parts for parameter in part.parameters()]


def pixels_by_hand(
    study: Study, split: Split, views: ViewsConfig, view: int, ids: np.ndarray
) -> torch.Tensor:
    normalization = study.teacher.dataset.normalization
    images = view_pixels(split, views, view, ids).astype(np.float64) / 255
    images = (images - normalization.mean) / np.array(normalization.std)
    return torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32)


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    p, q = (logits.div(temperature).softmax(dim=1) for logits in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum(dim=1)


def losses_by_hand(study: Study) -> tuple[list[float], ByHand]:
    mine = ByHand()
    optimizer = torch.optim.SGD(
        mine.parameters(), lr=0.0, momentum=0.8, nesterov=True, weight_decay=5e-3, foreach=False
    )
    train = study.dataset.train
    labels = torch.from_numpy(train.labels)
    losses = []
    for epoch in range(1, EPOCHS + 1):
        optimizer.param_groups[0]["lr"] = RATE if epoch <= 2 else RATE * 0.2
        view = (epoch - 1) % 3
        order = permutation(SEED, epoch, 60)
        for start in range(0, 60, BATCH):
            ids = order[start : start + BATCH]
            teacher = study.cache.read(ids, view)
            theirs = {tap: torch.from_numpy(values) for tap, values in teacher.items()}
            logits = mine.network(pixels_by_hand(study, train, study.teacher.views, view, ids))
            total = -logits.log_softmax(dim=1)[torch.arange(len(ids)), labels[ids]].mean()
            total = total + 0.5 * divergence(logits, theirs["logits"], 2.0).mean()
            right = theirs["correct"].bool()
            if right.any():
                guided = divergence(logits[right], theirs["logits"][right], 1.0)
                total = total + 0.3 * guided.mean()
            for stage, connect in mine.connectors.items():
                gap = connect(mine.maps[stage]).mean(dim=(2, 3)) - theirs[stage]
                total = total + (6 if epoch < 3 else 3) * gap.square().mean()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.item())
    return losses, mine


def test_every_step_and_the_test_error_are_those_of_the_loop_by_hand(
    make_study: Callable[..., Study],
) -> None:
    study = make_study(teacher=FLOAT32, student=(METHOD, *SETTINGS))
    epochs: list[EpochResult] = []
    summary = train_student(study.run("all", SEED), on_epoch=epochs.append)
    expected, mine = losses_by_hand(study)
    assert [loss for epoch in epochs for loss in epoch.step_losses] == pytest.approx(
        expected, rel=1e-4
    )
    test = study.dataset.test
    as_it_is = ViewsConfig(augment=CenterCrop(), seed=0, count=1)
    inputs = pixels_by_hand(study, test, as_it_is, 0, np.arange(len(test)))
    with torch.no_grad():
        logits = mine.network.eval()(inputs).numpy()
    ranks = (-logits).argsort(axis=1)
    is_right = ranks == test.labels[:, None]
    top1, top5 = (100 * (1 - is_right[:, :k].sum() / len(is_right)) for k in (1, 5))
    # Rounding may turn a sample or two of the 797 over.
    assert summary["last"]["top1_error"] == pytest.approx(top1, abs=0.3)
    assert summary["last"]["top5_error"] == pytest.approx(top5, abs=0.3)
    assert summary["last"]["top1_error"] > summary["last"]["top5_error"]


def test_errors_are_those_of_ranks_that_are_counted() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 9)), rng.integers(0, 9, 50)
    ranks = np.array([(row > row[label]).sum() for row, label in zip(logits, labels, strict=True)])
    parts = [slice(0, 20), slice(20, 50)]
    batches = [(torch.tensor(logits[p]), torch.tensor(labels[p])) for p in parts]
    found = count_errors(batches)
    assert found["top1_error"] == pytest.approx(100 * np.mean(ranks >= 1))
    assert found["top5_error"] == pytest.approx(100 * np.mean(ranks >= 5))


def test_connectors_are_drawn_from_the_seed_and_trained_with_the_network(
    make_study: Callable[..., Study],
) -> None:
    def connectors(seed: int) -> Connectors:
        return build_connectors({"stage1": 4}, {"stage1": 6}, "conv-bn-relu", seed)

    one, same, other = (connectors(seed).stages["stage1"] for seed in (1, 1, 2))
    assert [type(part) for part in one] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert torch.equal(one[0].weight, same[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    network = build("resnet8", num_classes=10, in_channels=1)
    training = make_study(student=SETTINGS).config.training
    train_state = build_train_state(network, connectors(1), training, CPU)
    (group,) = train_state.optimizer.param_groups
    assert len(group["params"]) == len(list(network.parameters())) + 3
    wanted = {"momentum": 0.8, "nesterov": True, "weight_decay": 5e-3}
    assert {name: group[name] for name in wanted} == wanted
