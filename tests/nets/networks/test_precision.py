"""Precision of forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from teach_once.nets.networks.precision import bfloat16_hint
from teach_once.nets.networks.zoo import CifarResNet
from teach_once.train.cli.commands import cli
from teach_once.train.runs.study import Study
from teach_once.train.sessions import trial as precision_trial
from teach_once.train.sessions.student import train_student


@contextmanager
def flags_kept() -> Iterator[None]:
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def flags() -> tuple[bool, bool]:
    """Whether TF32 is allowed in convolutions and in matrix products, on a GPU."""
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("precision", "allowed"),
    [("float32", (False, False)), ("tf32", (True, True)), ("bfloat16", (False, False))],
)
def test_the_backward_pass_has_the_arithmetic_that_was_asked_for(
    make_study: Callable[..., Study],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    allowed: tuple[bool, bool],
) -> None:
    found: dict[str, tuple[tuple[bool, bool], bool]] = {}

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            found["forward"] = flags(), torch.is_autocast_enabled("cpu")
            return logits.clone()

        @staticmethod
        def backward(ctx, gradient):
            found["backward"] = flags(), torch.is_autocast_enabled("cpu")
            return gradient

    study = make_study(student=["training.epochs=2", f"training.precision={precision}"])
    forward = CifarResNet.forward
    monkeypatch.setattr(
        CifarResNet, "forward", lambda self, images: Noted.apply(forward(self, images))
    )
    with flags_kept():
        torch.set_float32_matmul_precision("high")  # as the user's own network may have it
        torch.backends.cudnn.allow_tf32 = True
        train_student(study.run("cd+gkd", 0), device="cpu")
        assert flags() == (True, True)
    assert found["forward"] == (allowed, precision == "bfloat16")
    assert found["backward"] == (allowed, False)


def test_bfloat16_on_a_cpu_without_its_instructions_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, found = torch.device("cpu"), {"_is_avx512_bf16_supported": False}
    found["_is_amx_tile_supported"] = False
    for name in found:
        monkeypatch.setattr(torch.cpu, name, lambda name=name: found[name])
    assert "training.precision=float32" in bfloat16_hint("bfloat16", cpu)
    assert bfloat16_hint("float32", cpu) == ""
    assert bfloat16_hint("bfloat16", torch.device("cuda")) == ""
    for name in found:
        found[name] = True
        assert bfloat16_hint("bfloat16", cpu) == ""
        found[name] = False


@pytest.mark.parametrize(
    ("float32", "said"), [(297.0, "is slower than float32 on this CPU: 95 against 297"), (90.0, "")]
)
def test_check_says_that_a_precision_is_slower_than_float32_and_nothing_if_it_is_faster(
    float32: float,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    rates = [95.0, float32]

    def rate(steps: Iterator[int], *, of_processor: bool) -> float:
        assert next(steps) > 0  # a real step
        return rates.pop(0)

    monkeypatch.setattr(precision_trial, "measured_rate", rate)
    check = ["check", "digits-resnet8", f"--caches={tmp_path}", "--device=cpu", "--methods=ce"]
    assert cli([*check, "training.precision=float32"]) == 0
    assert len(rates) == 2  # nothing is timed for float32
    assert cli([*check, "training.precision=bfloat16"]) == 0
    assert rates == []
    printed = capsys.readouterr().out
    assert said in printed
    assert ("hint:" in printed) == bool(said)
