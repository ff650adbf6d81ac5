"""python -m benchmarks dtypes [TEACHER] [key=value ...]

What each tap dtype costs and keeps, on real records: bytes, error of the channel means, divergence
of the logits, change of the CD and GKD losses; and what general compression would save.

The records are view 0 of the teacher's dataset, computed in float32. The losses need a student: the
same teacher's outputs on view 1 stand in for one, as those of a student that has come close.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import machine, markdown, write_json, write_section
from teach_once.nets.teacher.taps import in_order
from teach_once.precompute.compute.setup import prepare
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.runtime.command.make_args import with_words
from teach_once.runtime.machine.devices import pick_device
from teach_once.store.format.coding import (
    quantise_channels,
    quantise_rows,
    restore_channels,
    restore_rows,
)
from teach_once.store.format.spec import SAMPLE_CRC
from teach_once.train import losses

Records = dict[str, NDArray[np.float32]]
DTYPES = ("float32", "float16", "uint8")
_ROUNDS = 7


@dataclass(frozen=True)
class Stored:
    """Records as they come back from a dtype, and the bytes that a record takes."""

    records: Records
    bytes_per_record: float


def exact_records(teacher_pass: TeacherPass, view: int) -> Records:
    """The taps that every cache has, of one view: float32 (N, ...)."""
    taps = [tap for tap in teacher_pass.setup.taps if tap.kind not in ("energy", "hint")]
    found = teacher_pass.records(view, np.arange(len(teacher_pass.pixels)), taps)
    return {tap: values.float().cpu().numpy() for tap, values in found.items() if tap != SAMPLE_CRC}


def stored_as(records: Records, dtype: str, block_rows: int) -> Stored:
    """What reading gives back after storing in `dtype`; uint8 with the scales of the cache."""
    restored, num_bytes = {}, 1.0  # the byte of `correct`
    for tap, values in records.items():
        if tap == "correct":
            restored[tap] = values
        elif dtype != "uint8":
            restored[tap] = values.astype(dtype).astype(np.float32)
            num_bytes += values.shape[1] * np.dtype(dtype).itemsize
        elif tap == "logits":
            restored[tap] = restore_rows(*quantise_rows(values))
            num_bytes += values.shape[1] + 8
        else:
            blocks = [values[s : s + block_rows] for s in range(0, len(values), block_rows)]
            restored[tap] = np.concatenate(
                [restore_channels(*quantise_channels(block)) for block in blocks]
            )
            num_bytes += values.shape[1] + 8 * values.shape[1] * len(blocks) / len(values)
    return Stored(restored, num_bytes)


def errors(exact: Records, stored: Records, student: Records) -> dict[str, float]:
    """Relative to each channel's mean size: errors of the means; KL; relative loss changes."""
    stages = in_order(exact, "stage")
    relative = [
        np.abs(stored[s] - exact[s]) / np.abs(exact[s]).mean(axis=0).clip(1e-6) for s in stages
    ]
    right = torch.from_numpy(exact["correct"])

    def cd(teacher: Records) -> float:
        ours, theirs = ([torch.from_numpy(r[s]) for s in stages] for r in (student, teacher))
        return losses.cd(ours, theirs).item()

    def gkd(teacher: Records) -> float:
        logits = torch.from_numpy(student["logits"]), torch.from_numpy(teacher["logits"])
        return losses.gkd(*logits, right).item()

    kept, lost = torch.from_numpy(stored["logits"]), torch.from_numpy(exact["logits"])
    return {
        "largest_error_of_means": max(float(r.max()) for r in relative),
        "mean_error_of_means": float(np.mean([r.mean() for r in relative])),
        "kl_of_logits": losses.kd(kept, lost, temperature=1.0).item(),
        "change_of_cd": abs(cd(stored) / cd(exact) - 1),
        "change_of_gkd": abs(gkd(stored) / gkd(exact) - 1),
    }


def compressions() -> dict[str, Callable[[], Any]]:
    return {
        "zstd (level 3)": lambda: numcodecs.Zstd(level=3),
        "blosc (zstd 3, byte shuffle)": lambda: numcodecs.Blosc("zstd", 3, numcodecs.Blosc.SHUFFLE),
        "blosc (zstd 3, bit shuffle)": lambda: numcodecs.Blosc(
            "zstd", 3, numcodecs.Blosc.BITSHUFFLE
        ),
    }


def compressed(records: Records, dtype: str) -> list[dict[str, object]]:
    """Per codec: the fraction of bytes left, and the speed of getting them back."""
    arrays = [
        np.ascontiguousarray(quantise_rows(v)[0] if dtype == "uint8" else v.astype(dtype))
        for tap, v in records.items()
        if tap != "correct"
    ]
    total = sum(array.nbytes for array in arrays)
    found = []
    for name, make in compressions().items():
        codec = make()
        packed = [codec.encode(array) for array in arrays]
        seconds = statistics.median(_seconds_to_decode(codec, packed) for _ in range(_ROUNDS))
        found.append(
            {
                "dtype": dtype,
                "codec": name,
                "left": sum(map(len, packed)) / total,
                "decode_gb_per_s": total / seconds / 1e9,
            }
        )
    return found


def _seconds_to_decode(codec: Any, packed: list[Any]) -> float:
    started = time.perf_counter()
    for data in packed:
        codec.decode(data)
    return time.perf_counter() - started


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", nargs="?", default="cifar10-resnet56")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--docs", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/dtypes.json"))
    options = parser.parse_intermixed_args(arguments)
    setup = prepare(options.teacher, options.overrides, Path("caches"))
    teacher_pass = TeacherPass(setup, PassOptions(pick_device(options.device)))
    exact, student = exact_records(teacher_pass, 0), exact_records(teacher_pass, 1)
    rows, found = [], []
    for dtype in DTYPES:
        stored = stored_as(exact, dtype, block_rows=4096)
        result = errors(exact, stored.records, student)
        found.append({"dtype": dtype, "bytes_per_record": stored.bytes_per_record, **result})
        rows.append(
            [dtype, f"{stored.bytes_per_record:.1f}", *(f"{v:.1e}" for v in result.values())]
        )
    squeezed = [
        row for dtype in ("float32", "float16", "uint8") for row in compressed(exact, dtype)
    ]
    table = markdown(
        [
            "stored as",
            "bytes per record",
            "largest rel. error of means",
            "mean rel. error of means",
            "KL of logits (nats)",
            "rel. change of CD loss",
            "rel. change of GKD loss",
        ],
        rows,
    )
    second = markdown(
        ["stored as", "codec", "bytes left", "decoding"],
        [
            [
                str(r["dtype"]),
                str(r["codec"]),
                f"{100 * float(str(r['left'])):.0f} %",
                f"{float(str(r['decode_gb_per_s'])):.1f} GB/s",
            ]
            for r in squeezed
        ],
    )
    command = " ".join(["python -m benchmarks dtypes", options.teacher, *options.overrides])
    body = (
        f"`{command}` on {machine()}: {len(setup.dataset.train):,} records of "
        f"{setup.config.name} (test error of the teacher "
        f"{teacher_pass.test_errors()['test_top1_error']:.1f} % top-1). Errors of a channel mean "
        f"are relative to the average size of that channel.\n\n{table}\n"
        f"General compression of the same numbers, one core:\n\n{second}"
    )
    print(body)
    write_section(options.docs, f"Tap dtypes: {setup.config.name}", body)
    write_json(options.json, {"dtypes": found, "compression": squeezed})
    return 0


if __name__ == "__main__":
    sys.exit(main(with_words(sys.argv[1:])))
