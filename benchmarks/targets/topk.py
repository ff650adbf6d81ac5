"""python -m benchmarks topk [--shapes "digits cifar-56-20"] [--records 1024] [--rounds 40]

Cut logits: what they keep of 1,000 classes, and what it costs to make whole logits of them again.

The logits are those of a ResNet-34 with random weights on noise, with batch norm's statistics of
each batch. They are almost flat: one factor for all makes their mean largest probability that of a
trained network. Expanding is timed beside whole steps on the same machine, in turn.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import Timing, Verdict, interleaved, machine, markdown, parser_of, publish
from benchmarks.synthetic.studies import Shape, shapes_for, steps, study_of
from teach_once.nets.networks.zoo import build
from teach_once.runtime.machine.devices import pick_device
from teach_once.store.format.certificate import Comparison
from teach_once.store.format.spec import TapSpec, cut_rows, expanded_rows
from teach_once.train.outputs.teacher_outputs import expand_logits
from teach_once.train.sessions.student import open_context

CLASSES, STAGES = 1000, (64, 128, 256, 512)
TOPS = (8, 16, 32, 64)
METHOD = "cd+gkd"
_BATCH, _IMAGE_PX = 64, 64
_EXPANSIONS = 50  # timed together: one takes microseconds
_MOST_KB, _MOST_SHARE = 1.1, 0.01


def record_bytes(top: int | None) -> int:
    """Of ResNet-34: with cut logits and uint8 means, or (None) all in float16."""
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
        logits = [network(each).float().cpu() for each in images]
    return torch.cat(logits).numpy()


def sharpened(logits: NDArray[np.float32], largest: float) -> NDArray[np.float32]:
    """The logits times the factor that makes their mean largest probability `largest`."""
    low, high = 0.0, 1.0
    while mean_largest(logits * np.float32(high)) < largest:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        is_flat = mean_largest(logits * np.float32(middle)) < largest
        low, high = (middle, high) if is_flat else (low, middle)
    return logits * np.float32(high)


def mean_largest(logits: NDArray[np.float32]) -> float:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
    return float((1 / shifted.sum(axis=1)).mean())


def kept_of(logits: NDArray[np.float32], top: int) -> dict[str, float]:
    """The certificate's figures of logits that are cut and read back."""
    cut = cut_rows(logits, top)
    values, classes, rest = cut[""], cut[".class"], cut[".rest"]
    comparison = Comparison()
    read = expanded_rows(values, classes, rest, logits.shape[1])  # type: ignore[arg-type]
    comparison.add({"logits": logits}, {"logits": read})
    return comparison.figures()


def measure(shape: Shape, top: int, device: torch.device, rounds: int) -> dict[str, Timing]:
    """Seconds of a step that reads whole logits, and of expanding a batch of cut ones."""
    with tempfile.TemporaryDirectory() as folder:
        study = study_of(shape, Path(folder), device)
        context = open_context(study.run(METHOD, 0), device)
        size = min(context.run.training.batch_size, shape.num_train)
        logits = np.random.default_rng(0).normal(size=(size, shape.classes)).astype(np.float32)
        parts = [
            torch.from_numpy(each.astype(np.float32)) for each in cut_rows(logits, top).values()
        ]
        values, classes, rest = parts
        arrays = values.half().to(device), classes.int().to(device), rest.half().to(device)
        expand = partial(expand_logits, *arrays, shape.classes)
        try:
            return interleaved(
                {
                    "step": partial(_seconds, partial(next, steps(context)), device),
                    "expanding": lambda: _seconds(_repeated(expand), device) / _EXPANSIONS,
                },
                rounds,
            )
        finally:
            context.teacher.close()


def _repeated(call: partial[torch.Tensor]) -> partial[None]:
    def many() -> None:
        for _ in range(_EXPANSIONS):
            call()

    return partial(many)


def _seconds(call: partial[None], device: torch.device) -> float:
    """On a CPU processor time, so that other programs do not lengthen the step alone."""
    if device.type != "cuda":
        started = time.process_time()
        call()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def kept_table(logits: NDArray[np.float32]) -> str:
    rows = []
    for top in TOPS:
        found = kept_of(logits, top)
        logits_bytes = TapSpec((CLASSES,), "float16", top=top).bytes_per_record
        kl = (f"{found[f'kl_t{temperature}']:.2g}" for temperature in (1, 4))
        rows.append([str(top), f"{logits_bytes:,}", f"{record_bytes(top):,}", *kl])
    rows.append(["all 1,000, float16", "2,000", f"{record_bytes(None):,}", "", ""])
    header = [
        "logits kept",
        "bytes of them",
        "bytes of ResNet-34's record",
        "KL, T = 1",
        "KL, T = 4",
    ]
    return markdown(header, rows)


def share_verdicts(shapes: dict[str, Shape], device: torch.device, rounds: int) -> list[Verdict]:
    verdicts = []
    for name, shape in shapes.items():
        top = 32 if shape.classes == CLASSES else 4
        factor = {"digits": 5.0, "cifar-56-20": 0.5}.get(name, 0.125)  # long steps less often
        found = measure(shape, top, device, max(5, int(rounds * factor)))
        verdicts.append(
            Verdict(
                f"{name}: expanding {top} of {shape.classes:,} logits ÷ step",
                found["expanding"].median / found["step"].median,
                f"≤ {_MOST_SHARE}",
                lambda x: x <= _MOST_SHARE,
            )
        )
    return verdicts


def main(arguments: list[str]) -> int:
    parser = parser_of("topk", __doc__)
    parser.add_argument("--shapes", default="digits cifar-56-20 imagenet-34-18")
    parser.add_argument("--records", type=int, default=1024)
    parser.add_argument("--largest", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    torch.set_num_threads(1)
    flat = random_logits(options.records, device)
    logits = sharpened(flat, options.largest)
    verdicts = [
        Verdict(
            "kB of ResNet-34's record: 32 largest logits, uint8 means",
            record_bytes(32) / 1000,
            f"≤ {_MOST_KB}",
            lambda x: x <= _MOST_KB,
        ),
        *share_verdicts(shapes_for(device, options.shapes), device, options.rounds),
    ]
    text = (
        f"`python -m benchmarks topk {' '.join(arguments)}` on {machine()}, torch "
        f"{torch.__version__}, {device}: {len(logits):,} records of a ResNet-34 with random "
        f"weights on noise. Its logits are almost flat (mean largest probability "
        f"{mean_largest(flat):.3f}); they are sharpened by one factor to "
        f"{mean_largest(logits):.2f}. Real logits have other tails: the certificate of a cache "
        f"says what it lost. Shares are ratios of medians of rounds in turn, on a CPU of one "
        f"thread's processor time.\n\n{kept_table(logits)}"
    )
    publish(options, "Cut logits", text, verdicts)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
