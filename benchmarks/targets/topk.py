"""python -m benchmarks topk [--shapes "digits cifar-56-20"] [--records 1024] [--rounds 40]

Truncated logits: what they keep of 1,000 classes, and what it costs to make whole logits of them.

The logits are those of a ResNet-34 with random weights on noise, with batch norm's statistics of
each batch. They are almost flat: one factor for all makes their mean largest probability that of a
trained network. Expanding is timed next to whole steps on the same machine, one after the other.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import softmax

from benchmarks.harness import Findings, Timing, Verdict, interleaved, markdown, timed
from benchmarks.synthetic.studies import Shape, endless_steps, shapes_for, study_of
from teach_once.nets.networks.zoo import build
from teach_once.runtime.machine.devices import pick_device
from teach_once.store.format.certificate import Comparison
from teach_once.store.format.spec import TapSpec, cut_rows, expanded_rows
from teach_once.train.outputs.cached_teacher import expand_logits
from teach_once.train.sessions.student import open_context

TITLE = "Cut logits"
CLASSES, STAGES = 1000, (64, 128, 256, 512)
TOPS = (8, 16, 32, 64)
METHOD = "cd+gkd"
_BATCH, _IMAGE_PX = 64, 64
_EXPANSIONS = 50  # timed together: one takes microseconds


def measure(
    device: str = "auto",
    shapes: str = "digits cifar-56-20 imagenet-34-18",
    records: int = 1024,
    largest: float = 0.7,
    rounds: int = 40,
) -> Findings:
    where = pick_device(device)
    torch.set_num_threads(1)
    flat = random_logits(records, where)
    logits = sharpened(flat, largest)
    what = "kB of ResNet-34's record: 32 largest logits, uint8 means"
    verdicts = [Verdict(what, record_bytes(32) / 1000, at_most=1.1)]
    for name, shape in shapes_for(where, shapes).items():
        top = 32 if shape.classes == CLASSES else 4
        factor = {"digits": 5.0, "cifar-56-20": 0.5}.get(name, 0.125)  # long steps less often
        found = expansion_seconds(shape, top, where, max(5, int(rounds * factor)))
        fraction = found["expanding"].median / found["step"].median
        what = f"{name}: expanding {top} of {shape.classes:,} logits ÷ step"
        verdicts.append(Verdict(what, fraction, at_most=0.01))
    text = (
        f", {where}: {len(logits):,} records of a ResNet-34 with random weights on noise. Its "
        f"logits are almost flat (mean largest probability {mean_largest(flat):.3f}); they are "
        f"sharpened by one factor to {mean_largest(logits):.2f}. Real logits have other tails: the "
        f"certificate of a cache records what it lost. Fractions are ratios of medians of rounds "
        f"that take turns, on a CPU of one thread's processor time.\n\n{kept_table(logits)}"
    )
    return Findings(text, verdicts)


def record_bytes(top: int | None) -> int:
    """Of ResNet-34: with truncated logits and uint8 means, or (None) all in float16."""
    means = ("uint8", "block") if top else ("float16", None)
    stages = [TapSpec((channels,), *means) for channels in STAGES]
    taps = [TapSpec((CLASSES,), "float16", top=top), TapSpec((), "uint8"), *stages]
    return sum(tap.bytes_per_record for tap in taps)


def random_logits(num_records: int, device: torch.device) -> NDArray[np.float32]:
    """(R, 1000) of a ResNet-34 that was not trained."""
    torch.manual_seed(0)
    network = build("resnet34", num_classes=CLASSES, in_channels=3, stem="imagenet").to(device)
    sizes = [_BATCH] * (num_records // _BATCH)
    with torch.no_grad():
        images = (torch.randn(size, 3, _IMAGE_PX, _IMAGE_PX, device=device) for size in sizes)
        return torch.cat([network(each).float().cpu() for each in images]).numpy()


def sharpened(logits: NDArray[np.float32], largest: float) -> NDArray[np.float32]:
    """The logits times the factor that makes their mean largest probability `largest`."""
    factor = brentq(lambda x: mean_largest(logits * np.float32(x)) - largest, 0.0, 2.0**20)
    return logits * np.float32(factor)


def mean_largest(logits: NDArray[np.float32]) -> float:
    return float(softmax(logits.astype(np.float64), axis=1).max(axis=1).mean())


def expansion_seconds(
    shape: Shape, top: int, device: torch.device, rounds: int
) -> dict[str, Timing]:
    """Seconds of a step that reads whole logits, and of expanding a batch of truncated ones."""
    with tempfile.TemporaryDirectory() as folder:
        context = open_context(study_of(shape, Path(folder), device).run(METHOD, 0), device)
        size = min(context.run.training.batch_size, shape.num_train)
        logits = np.random.default_rng(0).normal(size=(size, shape.classes)).astype(np.float32)
        kinds = (torch.float16, torch.int32, torch.float16)  # values, classes, the rest
        parts = zip(cut_rows(logits, top).values(), kinds, strict=True)
        values, classes, rest = (
            torch.from_numpy(np.asarray(each)).to(device, kind) for each, kind in parts
        )

        def expand_often() -> None:
            for _ in range(_EXPANSIONS):
                expand_logits(values, classes, rest, shape.classes)

        # On a CPU processor time, so that other programs do not lengthen the step alone.
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        expansions = timed(expand_often, device, clock)
        step = timed(partial(next, endless_steps(context)), device, clock)
        rows = {"step": step, "expanding": lambda: expansions() / _EXPANSIONS}
        try:
            return interleaved(rows, rounds)
        finally:
            context.teacher.close()


def kept_table(logits: NDArray[np.float32]) -> str:
    """Per number of logits: bytes, and the certificate's metrics of logits that are read back."""
    rows = []
    for top in TOPS:
        cut, comparison = cut_rows(logits, top), Comparison()
        read = expanded_rows(cut[""], cut[".class"], cut[".rest"], CLASSES)  # type: ignore[arg-type]
        comparison.add({"logits": logits}, {"logits": read})
        kl = [f"{comparison.figures()[f'kl_t{temperature}']:.2g}" for temperature in (1, 4)]
        logits_bytes = TapSpec((CLASSES,), "float16", top=top).bytes_per_record
        rows.append([str(top), f"{logits_bytes:,}", f"{record_bytes(top):,}", *kl])
    rows.append(["all 1,000, float16", "2,000", f"{record_bytes(None):,}", "", ""])
    titles = ["logits kept", "bytes of them", "bytes of ResNet-34's record", "KL, T = 1"]
    return markdown([*titles, "KL, T = 4"], rows)
