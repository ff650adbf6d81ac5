"""Batch norm over the slices of several processes equals that of one process with the whole batch.

All cases run in one group of two processes, and in one of three.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from teach_once.nets.networks.archs import ArchError
from teach_once.nets.networks.sync_batch_norm import synchronized
from teach_once.nets.networks.zoo import build
from tests.support.training.gloo import on_ranks

SLICES = {2: (5, 2), 3: (1, 2, 4)}  # samples of each rank
NUM_SAMPLES = 7
STEPS = 2


class Case(NamedTuple):
    """build: the module, always with the same weights. shape: of one sample."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    memory_format: torch.memory_format = torch.contiguous_format
    autocast: bool = False
    is_ddp: bool = False
    slices: Mapping[int, tuple[int, ...]] = SLICES
    tolerance: float = 1e-9


def norm(kind: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        made = kind(3, **options)
        for number, weights in enumerate(made.parameters()):
            nn.init.uniform_(weights, 0.5, 1.5, generator=torch.Generator().manual_seed(number))
        return made

    return build


def frozen() -> nn.Module:
    """Two layers, of which the first keeps its statistics."""
    layers = nn.Sequential(norm(nn.BatchNorm2d)(), norm(nn.BatchNorm2d)())
    layers[0].training = False
    return layers


def untracked() -> nn.Module:
    """It has statistics, and leaves them as they are."""
    made = norm(nn.BatchNorm2d)()
    made.track_running_stats = False
    return made


def unusual() -> nn.Module:
    """Its input needs no gradient, and a layer is used twice."""
    shared = nn.BatchNorm2d(4)
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(inplace=True), shared)


def timms() -> nn.Module:
    return build("timm:test_efficientnet", num_classes=4, in_channels=3, image_size=(32, 32))


def resnet() -> nn.Module:
    return build("resnet8", num_classes=4, in_channels=3)


CASES = {
    "2d": Case(norm(nn.BatchNorm2d), (3, 4, 5)),
    "1d of vectors": Case(norm(nn.BatchNorm1d), (3,)),
    "1d of sequences": Case(norm(nn.BatchNorm1d), (3, 6)),
    "3d": Case(norm(nn.BatchNorm3d), (3, 2, 2, 2)),
    "float32": Case(norm(nn.BatchNorm2d), (3, 4, 5), torch.float32, tolerance=3e-6),
    "channels last": Case(norm(nn.BatchNorm2d), (3, 4, 5), memory_format=torch.channels_last),
    "momentum None": Case(norm(nn.BatchNorm2d, momentum=None), (3, 2, 2)),
    "momentum 0.3, eps 0.1": Case(norm(nn.BatchNorm2d, momentum=0.3, eps=0.1), (3, 2, 2)),
    "no weights": Case(norm(nn.BatchNorm2d, affine=False), (3, 2, 2)),
    "no statistics": Case(norm(nn.BatchNorm2d, track_running_stats=False), (3, 2, 2)),
    "statistics left alone": Case(untracked, (3, 2, 2)),
    "an idle rank": Case(norm(nn.BatchNorm2d), (3, 2, 2), slices={2: (0, 7), 3: (4, 0, 3)}),
    "frozen": Case(frozen, (3, 4, 4)),
    "unusual": Case(unusual, (3, 6, 6)),
    "resnet8": Case(resnet, (3, 16, 16)),
    "resnet8 in DDP": Case(resnet, (3, 16, 16), is_ddp=True),
    "timm's with activations": Case(timms, (3, 32, 32)),
    "bfloat16": Case(norm(nn.BatchNorm2d), (3, 4, 5), torch.float32, autocast=True, tolerance=2e-2),
}


def results_of(case: Case, rank: int, world: int) -> dict[str, Tensor]:
    """Outputs and gradients of two steps in training mode and the output of one in evaluation mode.

    rank, world: whose slice is shown; of world 1 the whole batch.
    """
    module = case.build().to(case.dtype)
    network = synchronized(module)
    if case.is_ddp and world > 1:
        network = DistributedDataParallel(network)
    sizes = case.slices.get(world, (NUM_SAMPLES,))
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        shown, weights = batch(case, step)
        own = shown.split(sizes)[rank].contiguous(memory_format=case.memory_format)
        own = own.bfloat16() if case.autocast else own
        own.requires_grad_(case.build is not unusual)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            output = network(own)
        scale = world if network is not module else 1  # DDP takes the mean over the ranks
        weighted = output.double().square() * weights(output).split(sizes)[rank]
        (weighted.sum() * scale).backward()
        found[f"rows output {step}"] = output.detach()
        if own.grad is not None:
            found[f"rows input gradient {step}"] = own.grad / scale
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        found[f"sum gradient of {name}"] = parameter.grad / scale
    found |= {f"same {name}": value for name, value in module.named_buffers()}
    if rank == 0:  # alone: nothing is exchanged
        found["once output in evaluation mode"] = module.eval()(batch(case, STEPS)[0]).detach()
    return found


def batch(case: Case, step: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The whole batch, and weights for its outputs; the first samples are unlike the last."""
    made = torch.Generator().manual_seed(step)
    shown = torch.randn(NUM_SAMPLES, *case.shape, dtype=torch.float64, generator=made)
    shown = shown * torch.linspace(0.5, 4, NUM_SAMPLES).view(-1, *[1] * len(case.shape)) + 3

    def weights(output: Tensor) -> Tensor:
        shape = NUM_SAMPLES, *output.shape[1:]
        return torch.randn(shape, dtype=torch.float64, generator=made)

    return shown.to(case.dtype), weights


def all_results(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    refuses_one_value()
    replaces_in_place()
    return {name: results_of(case, rank, world) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.long), 3])
def on_each_rank(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Tensor]]]:
    return on_ranks(request.param, all_results, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_slices_give_what_the_whole_batch_gives(
    name: str, on_each_rank: list[dict[str, dict[str, Tensor]]]
) -> None:
    results, tolerance = [rank[name] for rank in on_each_rank], CASES[name].tolerance
    for what, expected in results_of(CASES[name], 0, 1).items():
        found = gathered(what, [rank[what] for rank in results if what in rank])
        assert found.dtype == expected.dtype
        torch.testing.assert_close(
            found,
            expected,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, what=what: f"{what}: {text}",
        )


def gathered(what: str, of_ranks: list[Tensor]) -> Tensor:
    """What the ranks found, as one process would have found it."""
    how = what.partition(" ")[0]
    if how == "rows":
        return torch.cat(of_ranks)
    if how == "sum":
        return torch.stack(of_ranks).sum(dim=0)
    assert all(torch.equal(each, of_ranks[0]) for each in of_ranks), f"{what} differs"
    return of_ranks[0]


def refuses_one_value() -> None:
    """All ranks refuse a batch of one value."""
    network = synchronized(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(torch.ones(1 if torch.distributed.get_rank() == 1 else 0, 3))


class OtherNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replaces_in_place() -> None:
    """Modules, parameters, names and hooks stay as they were; a foreign batch norm is refused."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    inner, called = network[1][0], []
    inner.register_forward_hook(lambda *_: called.append(1))
    state, parameters = copy.deepcopy(network.state_dict()), list(network.parameters())
    assert synchronized(network) is network
    assert synchronized(network)[1][0] is inner
    assert isinstance(inner, nn.BatchNorm2d)
    assert network.state_dict().keys() == state.keys()
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    copy.deepcopy(network)(torch.randn(2, 3, 4, 4))
    network(torch.randn(2, 3, 4, 4))
    assert called == [1, 1]
    with pytest.raises(ValueError, match="expected 4D input"):
        network(torch.randn(2, 3))
    with pytest.raises(ArchError, match=r"0\.1 is a OtherNorm.*\n?.*batch_norm=local"):
        synchronized(nn.Sequential(nn.Sequential(nn.ReLU(), OtherNorm(3))))


def test_one_process_has_plain_batch_norm() -> None:
    network = resnet()
    kinds = [type(module) for module in network.modules()]
    assert [type(module) for module in synchronized(network).modules()] == kinds
