"""Networks: published sizes, taps by name, weights that fit or are rejected."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from teach_once.configs.schema import TeacherNet
from teach_once.nets.networks.archs import CIFAR_RESNETS, ArchError, known_archs
from teach_once.nets.networks.layout import TapError
from teach_once.nets.networks.names import stage_modules
from teach_once.nets.networks.zoo import build
from teach_once.nets.teacher.taps import as_is, channel_means, read_stages
from teach_once.nets.teacher.teacher import load_teacher_network, recalibrate
from teach_once.nets.weights.files import load_weights, save_atomically
from teach_once.nets.weights.source import fetched_weights
from teach_once.runtime.machine.torchvision_shim import import_torchvision

# Parameter counts of the field's CIFAR-100 benchmark models and of torchvision's.
PUBLISHED = {
    "resnet20": 278_324,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
}


@pytest.mark.parametrize(("arch", "count"), PUBLISHED.items())
def test_small_image_networks_have_the_published_size(arch: str, count: int) -> None:
    network = build(arch, num_classes=100)
    assert sum(p.numel() for p in network.parameters()) == count


def test_torchvision_networks_have_torchvisions_size_and_names() -> None:
    ours = build("resnet18", num_classes=1000, stem="imagenet")
    import_torchvision()
    from torchvision.models import resnet18

    assert sum(p.numel() for p in ours.parameters()) == 11_689_512
    assert list(ours.state_dict()) == list(resnet18(weights=None).state_dict())


@pytest.mark.parametrize("arch", [*CIFAR_RESNETS, "resnet18", "resnet34", "resnet50", "resnet152"])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_image_networks_give_logits_and_their_default_stages(
    arch: str, channels: int
) -> None:
    size = 8 if arch in ("resnet152", "resnet110") else 16
    network = build(arch, num_classes=7, in_channels=channels).eval()
    stages = stage_modules(arch)
    with torch.inference_mode(), read_stages(network, stages, as_is) as maps:
        logits = network(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    assert list(maps) == list(stages)
    assert all((features >= 0).all() for features in maps.values())  # past their last ReLU


# One of each family of torchvision's classifiers, the smallest.
FAMILIES = [
    "resnext50_32x4d",
    "wide_resnet50_2",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "efficientnet_v2_m",
    "convnext_tiny",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
    "vgg19_bn",
    "densenet121",
]


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_default_stages_of_torchvisions_networks_are_its_four_coarsest_resolutions(
    arch: str,
) -> None:
    network = build(arch, num_classes=3, stem="imagenet").eval()
    with torch.inference_mode(), read_stages(network, stage_modules(arch), as_is) as maps:
        logits = network(torch.randn(1, 3, 64, 64))
    assert logits.shape == (1, 3)
    assert [features.shape[2] for features in maps.values()] == [16, 8, 4, 2]


def test_every_name_is_torchvisions_or_the_benchmarks() -> None:
    import_torchvision()
    from torchvision import models

    theirs = set(models.list_models(module=models))
    assert set(known_archs()) - theirs == set(CIFAR_RESNETS)


def test_a_network_of_the_users_own_is_built_by_its_function() -> None:
    network = build("python:tests.support.own_network:make", num_classes=4, in_channels=1)
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 4)
    for arch, told in (
        ("python:tests.support.own_network", "not have the form python:package.module:function"),
        ("python:tests.no_such:make", "cannot be loaded"),
        ("python:tests.support.own_network:nothing", "cannot be loaded"),
        ("python:tests.support.own_network:wrong", "returned a str, expected a torch.nn.Module"),
    ):
        with pytest.raises(ArchError, match=told):
            build(arch, num_classes=4)


def test_other_networks_exist_only_as_torchvision_has_them() -> None:
    with pytest.raises(ArchError, match="only with stem: imagenet and for RGB"):
        build("mobilenet_v2", num_classes=2, stem="cifar")
    with pytest.raises(ArchError, match="only with stem: imagenet and for RGB"):
        build("mobilenet_v2", num_classes=2, stem="imagenet", in_channels=1)


def test_the_imagenet_stem_shrinks_and_the_cifar_stem_does_not() -> None:
    for stem, side in (("imagenet", 16), ("cifar", 64)):
        network = build("resnet18", num_classes=2, stem=stem).eval()
        with torch.inference_mode(), read_stages(network, {"stage1": "layer1"}, as_is) as maps:
            network(torch.randn(1, 3, 64, 64))
        assert maps["stage1"].shape == (1, 64, side, side)


def test_the_same_weights_are_the_same_bytes_whatever_their_file_is_called(tmp_path: Path) -> None:
    state = build("resnet8", num_classes=2).state_dict()
    for name in ("a.pt", "another.pt"):
        save_atomically(state, tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()


def test_weights_depend_on_the_seed_and_not_on_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build("resnet8", num_classes=10, seed=1)
    assert (torch.random.get_rng_state() == before).all()
    torch.manual_seed(6)
    again = build("resnet8", num_classes=10, seed=1)
    other = build("resnet8", num_classes=10, seed=2)
    assert (first.conv1.weight == again.conv1.weight).all()
    assert (first.conv1.weight != other.conv1.weight).any()


def test_an_unknown_arch_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ArchError, match=r"'resnet65'; did you mean 'resnet56'[,?]"):
        build("resnet65", num_classes=2)


def test_an_unknown_stage_is_refused_with_the_modules_there_are() -> None:
    network = build("resnet8", num_classes=2)
    with (
        pytest.raises(TapError, match=r"no module 'layer9'.*layer3"),
        read_stages(network, {"stage1": "layer9"}, as_is),
    ):
        pass


def test_hooks_are_gone_when_the_context_closes_even_after_an_error() -> None:
    network = build("resnet8", num_classes=2)
    with pytest.raises(RuntimeError), read_stages(network, stage_modules("resnet8"), as_is):
        raise RuntimeError
    assert all(not module._forward_hooks for module in network.modules())


def test_channel_means_are_taken_in_float32() -> None:
    features = torch.full((1, 1, 64, 64), 1.001, dtype=torch.bfloat16)
    assert channel_means(features).dtype == torch.float32
    assert channel_means(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])).item() == 3.0


def teacher_file(folder: Path, **changes: torch.Tensor) -> Path:
    path = folder / "teacher.pt"
    save_atomically({**build("resnet8", num_classes=3).state_dict(), **changes}, path)
    return path


def test_teacher_outputs_are_logits_means_and_correctness(tmp_path: Path) -> None:
    config = TeacherNet(arch="resnet8", weights=str(teacher_file(tmp_path)))
    cpu = torch.device("cpu")
    stages = stage_modules("resnet8")
    teacher = load_teacher_network(
        config, stages, num_classes=3, image_shape=(8, 8, 3), device=cpu, calibration=[]
    )
    images = torch.randn(5, 3, 8, 8)
    logits = teacher.network(images)
    labels = logits.argmax(dim=1)
    labels[0] = (labels[0] + 1) % 3
    out = teacher.outputs(images, labels)
    assert {name: tuple(v.shape) for name, v in out.items()} == {
        "logits": (5, 3),
        "stage1": (5, 16),
        "stage2": (5, 32),
        "stage3": (5, 64),
        "correct": (5,),
    }
    assert out["correct"].tolist() == [0, 1, 1, 1, 1]
    assert torch.allclose(out["logits"], logits)
    assert not teacher.network.training


def test_the_teacher_computes_in_the_precision_of_its_file(tmp_path: Path) -> None:
    network = build("resnet8", num_classes=3, seed=1)
    save_atomically(network.state_dict(), tmp_path / "weights.pt")
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = network.eval()(images)
    found = {}
    for precision in ("float32", "bfloat16"):
        teacher = load_teacher_network(
            TeacherNet(arch="resnet8", weights=str(tmp_path / "weights.pt"), precision=precision),
            stage_modules("resnet8", None),
            num_classes=3,
            image_shape=(16, 16, 3),
            device=torch.device("cpu"),
            calibration=(),
        )
        found[precision] = teacher.outputs(images, torch.zeros(4).long())["logits"]
        assert found[precision].dtype == torch.float32
    assert torch.allclose(found["float32"], expected, atol=1e-5)
    assert torch.equal(found["bfloat16"], found["bfloat16"].bfloat16().float())
    assert torch.allclose(found["bfloat16"], expected, rtol=0.1, atol=0.05)


def test_recalibration_gives_batch_norm_the_statistics_of_the_batches_and_nothing_else() -> None:
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.9), nn.Conv2d(2, 2, 1)).eval()
    weights = network[2].weight.clone()
    batches = [torch.randn(9, 2, 4, 4) * 3 + 5, torch.randn(9, 2, 4, 4), torch.randn(2, 2, 4, 4)]
    recalibrate(network, batches)
    means = torch.cat(batches).mean(dim=(0, 2, 3))  # every sample counts alike
    assert torch.allclose(network[0].running_mean, means, atol=1e-5)
    variances = sum(len(batch) * batch.var(dim=(0, 2, 3)) for batch in batches) / 20
    assert torch.allclose(network[0].running_var, variances, atol=1e-4)
    assert not any(module.training for module in network.modules())
    assert network[0].momentum == 0.1
    assert (network[2].weight == weights).all()


def test_weights_that_do_not_fit_are_refused_with_the_first_differences(tmp_path: Path) -> None:
    path = teacher_file(tmp_path, extra=torch.zeros(1), **{"fc.weight": torch.zeros(4, 64)})
    with pytest.raises(ArchError) as caught:
        load_weights(build("resnet8", num_classes=3), path)
    assert "unexpected: extra" in str(caught.value)
    assert "fc.weight has shape (4, 64), expected (3, 64)" in str(caught.value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"state_dict": tensors, "epoch": 3},
        lambda tensors: {"model": {"module." + key: value for key, value in tensors.items()}},
        lambda tensors: {"net": tensors},
        lambda tensors: {"model_state_dict": {"student." + k: v for k, v in tensors.items()}},
        lambda tensors: {"_orig_mod.module." + key: value for key, value in tensors.items()},
    ],
)
def test_common_wrappers_and_prefixes_are_seen_through(tmp_path: Path, wrap) -> None:
    source = build("resnet8", num_classes=3, seed=5)
    save_atomically(wrap(source.state_dict()), tmp_path / "w.pt")
    network = build("resnet8", num_classes=3, seed=6)
    load_weights(network, tmp_path / "w.pt")
    assert (network.fc.weight == source.fc.weight).all()


@pytest.mark.parametrize("prefix", ["net", "model", "module", "student"])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module."])
def test_a_networks_own_names_are_not_taken_for_the_prefix_of_a_wrapper(
    tmp_path: Path, prefix: str, wrapper: str
) -> None:
    source, network = (nn.ModuleDict({prefix: nn.Linear(2, 2)}) for _ in range(2))
    tensors = {wrapper + key: value for key, value in source.state_dict().items()}
    save_atomically(tensors, tmp_path / "w.pt")
    load_weights(network, tmp_path / "w.pt")
    assert torch.equal(network[prefix].weight, source[prefix].weight)


def test_torchvisions_weights_are_downloaded_once_and_their_hash_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_torchvision()
    from torchvision.models import ResNet18_Weights

    torch.save(build("resnet18", num_classes=1000, stem="imagenet").state_dict(), tmp_path / "x")
    digest = hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    published = tmp_path / f"resnet18-{digest[:8]}.pth"
    (tmp_path / "x").rename(published)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    member = ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(member.value, "url", published.as_uri())
    spec = "torchvision:ResNet18_Weights.IMAGENET1K_V1"
    file = fetched_weights(spec)
    assert file.read_bytes() == published.read_bytes()
    published.unlink()
    assert fetched_weights(spec) == file  # not fetched again
    file.unlink()
    with pytest.raises(ArchError, match=r"(?s)cannot be downloaded.*fix: download"):
        fetched_weights(spec)
    with pytest.raises(ArchError, match=r"no weights 'ResNet18_Weights\.NONE'"):
        fetched_weights("torchvision:ResNet18_Weights.NONE")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(ArchError, match=r"x\.pt is not a readable weights file"):
        load_weights(nn.Linear(1, 1), path)


def test_the_checkpoints_of_reference_scripts_are_read(tmp_path: Path) -> None:
    source, network = nn.Linear(2, 2), nn.Linear(2, 2)
    args = argparse.Namespace(lr=0.1, milestones=[1, 2], output_dir=Path("out"), device=None)
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60])
    content = {
        "model": source.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 3,
        "args": args,
    }
    for new_format in (True, False):
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=new_format)
        load_weights(network, tmp_path / "w.pt")
        assert torch.equal(network.weight, source.weight)


class Remark:
    """Something of the user's own in a checkpoint."""


FOREIGN = {
    "whole": (lambda network: network, "is a whole pickled module of class torch.nn.modules.l"),
    "held": (
        lambda network: {"epoch": 3, "model": network},
        "contains a whole pickled module of class torch.nn.modules.linear.Linear under 'model'",
    ),
    "beside": (
        lambda network: {"state_dict": network.state_dict(), "args": Remark()},
        "contains an object of class tests.nets.networks.test_nets.Remark in addition to weights",
    ),
    "bare": (
        lambda network: {**network.state_dict(), "args": Remark()},
        "contains an object of class tests.nets.networks.test_nets.Remark in addition to weights",
    ),
    "numpy": (
        lambda network: {"model": dict(network.state_dict()), "error": np.float64(3)},
        "contains an object of class numpy._core.multiarray.scalar in addition to weights",
    ),
}


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(("content_of", "told"), FOREIGN.values(), ids=FOREIGN)
def test_what_else_a_file_holds_is_said_with_the_lines_that_save_its_weights(
    tmp_path: Path, content_of: Callable, told: str, new_format: bool
) -> None:
    source, network = nn.Linear(2, 2), nn.Linear(2, 2)
    path = tmp_path / "full.pt"
    torch.save(content_of(source), path, _use_new_zipfile_serialization=new_format)
    message = refusal(network, path)
    assert message.startswith(f"{path} {told}")
    run_lines_of(message)
    load_weights(network, tmp_path / "full-weights.pt")
    assert torch.equal(network.weight, source.weight)


def test_such_a_file_that_was_cut_off_is_not_readable(tmp_path: Path) -> None:
    path = tmp_path / "full.pt"
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for kept in range(100, len(whole), 50):
        path.write_bytes(whole[:kept])
        assert path.name in refusal(nn.Linear(2, 2), path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_said_to_be_one(tmp_path: Path) -> None:
    source, network = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.jit.save(torch.jit.script(source), tmp_path / "full.pt")
    message = refusal(network, tmp_path / "full.pt")
    assert "full.pt is a TorchScript program" in message
    run_lines_of(message)
    load_weights(network, tmp_path / "full-weights.pt")
    assert torch.equal(network.weight, source.weight)


def refusal(network: nn.Module, path: Path) -> str:
    with pytest.raises(ArchError) as caught:
        load_weights(network, path)
    assert "\x1b" not in str(caught.value)
    return str(caught.value)


def run_lines_of(message: str) -> None:
    """Run the three lines of Python at the end of a message, as they were printed."""
    lines = [line.strip() for line in message.splitlines()[-3:]]
    assert lines[0] == "import torch"
    exec("\n".join(lines), {})


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "was-run",))

    torch.save({"x": Malicious()}, tmp_path / "x.pt")
    with pytest.raises(ArchError, match=r"x\.pt contains an object of class getattr in add"):
        load_weights(nn.Linear(1, 1), tmp_path / "x.pt")
    assert not (tmp_path / "was-run").exists()
