"""python -m benchmarks dtypes [TEACHER] [key=value ...]

What each tap dtype costs and keeps, on real records: bytes, error of the channel means, divergence
of the logits, change of the CD and GKD losses; and what general compression would save.

The records are view 0 of the teacher's dataset, computed in float32. The losses need a student: the
same teacher's outputs on view 1 stand in for one, as those of a student that has come close.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import numcodecs
import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.harness import Findings, interleaved, markdown
from teach_once.nets.teacher.taps import in_order
from teach_once.precompute.compute.setup import prepare
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.runtime.command.options import Overrides
from teach_once.runtime.machine.devices import pick_device
from teach_once.store.format.coding import (
    quantise_channels,
    quantise_rows,
    restore_channels,
    restore_rows,
)
from teach_once.store.format.spec import SAMPLE_CRC
from teach_once.train import losses

TITLE = "Tap dtypes"
Records = dict[str, NDArray[np.float32]]
DTYPES = ("float32", "float16", "uint8")
_BLOCK_ROWS, _ROUNDS = 4096, 7
_CODECS = {
    "zstd (level 3)": numcodecs.Zstd(level=3),
    "blosc (zstd 3, byte shuffle)": numcodecs.Blosc("zstd", 3, numcodecs.Blosc.SHUFFLE),
    "blosc (zstd 3, bit shuffle)": numcodecs.Blosc("zstd", 3, numcodecs.Blosc.BITSHUFFLE),
}
# A metric of `errors` -> its column.
_ERRORS = {
    "largest_error_of_means": "largest rel. error of means",
    "mean_error_of_means": "mean rel. error of means",
    "kl_of_logits": "KL of logits (nats)",
    "change_of_cd": "rel. change of CD loss",
    "change_of_gkd": "rel. change of GKD loss",
}


def measure(
    teacher: Annotated[str, typer.Argument()] = "cifar10-resnet56",
    overrides: Overrides = None,
    device: str = "auto",
) -> Findings:
    setup = prepare(teacher, overrides or [], Path("caches"))
    teacher_pass = TeacherPass(setup, PassOptions(pick_device(device)))
    exact, student = exact_records(teacher_pass, 0), exact_records(teacher_pass, 1)
    found: list[dict[str, str | float]] = []
    for dtype in DTYPES:
        records, num_bytes = stored_as(exact, dtype)
        metrics = errors(exact, records, student)
        found.append({"dtype": dtype, "bytes_per_record": num_bytes, **metrics})
    squeezed = [row for dtype in DTYPES for row in compressed(exact, dtype)]
    table = markdown(
        ["stored as", "bytes per record", *_ERRORS.values()],
        [
            [str(row["dtype"]), f"{row['bytes_per_record']:.1f}"]
            + [f"{row[metric]:.1e}" for metric in _ERRORS]
            for row in found
        ],
    )
    second = markdown(
        ["stored as", "codec", "bytes left", "decoding"],
        [
            [
                str(r["dtype"]),
                str(r["codec"]),
                f"{r['left']:.0%}",
                f"{r['decode_gb_per_s']:.1f} GB/s",
            ]
            for r in squeezed
        ],
    )
    name, error = setup.config.name, teacher_pass.test_errors()["test_top1_error"]
    text = (
        f": {len(setup.dataset.train):,} records of {name} (test error of the teacher {error:.1f} "
        f"% top-1). Errors of a channel mean are relative to the average size of that channel.\n\n"
        f"{table}\nGeneral compression of the same numbers, one core:\n\n{second}"
    )
    content = {"dtypes": found, "compression": squeezed}
    return Findings(text, content=content, title=f"{TITLE}: {name}")


def exact_records(teacher_pass: TeacherPass, view: int) -> Records:
    """The taps that every cache has, of one view: float32 (N, ...)."""
    taps = [tap for tap in teacher_pass.setup.taps if tap.kind not in ("energy", "hint")]
    found = teacher_pass.records(view, np.arange(len(teacher_pass.pixels)), taps)
    return {tap: values.float().cpu().numpy() for tap, values in found.items() if tap != SAMPLE_CRC}


def stored_as(records: Records, dtype: str) -> tuple[Records, float]:
    """Records as they are read after storing in `dtype`, uint8 with the scales of the cache; and
    the bytes that a record takes.
    """
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
            blocks = np.split(values, range(_BLOCK_ROWS, len(values), _BLOCK_ROWS))
            restored[tap] = np.concatenate(
                [restore_channels(*quantise_channels(block)) for block in blocks]
            )
            num_bytes += values.shape[1] * (1 + 8 * len(blocks) / len(values))
    return restored, num_bytes


def errors(exact: Records, stored: Records, student: Records) -> dict[str, float]:
    """The metrics of `_ERRORS`."""
    stages = in_order(exact, "stage")
    relative = [
        np.abs(stored[s] - exact[s]) / np.abs(exact[s]).mean(axis=0).clip(1e-6) for s in stages
    ]
    correct = torch.from_numpy(exact["correct"])

    def cd(teacher: Records) -> float:
        ours, theirs = ([torch.from_numpy(r[s]) for s in stages] for r in (student, teacher))
        return losses.cd(ours, theirs).item()

    def gkd(teacher: Records) -> float:
        logits = torch.from_numpy(student["logits"]), torch.from_numpy(teacher["logits"])
        return losses.gkd(*logits, correct).item()

    logits = torch.from_numpy(stored["logits"]), torch.from_numpy(exact["logits"])
    return {
        "largest_error_of_means": max(float(r.max()) for r in relative),
        "mean_error_of_means": float(np.mean([r.mean() for r in relative])),
        "kl_of_logits": losses.kd(*logits, temperature=1.0).item(),
        "change_of_cd": abs(cd(stored) / cd(exact) - 1),
        "change_of_gkd": abs(gkd(stored) / gkd(exact) - 1),
    }


def compressed(records: Records, dtype: str) -> list[dict[str, str | float]]:
    """Per codec: the fraction of bytes left, and the speed of decoding them."""
    arrays = [
        np.ascontiguousarray(quantise_rows(v)[0] if dtype == "uint8" else v.astype(dtype))
        for tap, v in records.items()
        if tap != "correct"
    ]
    total = sum(array.nbytes for array in arrays)
    packed = {name: list(map(codec.encode, arrays)) for name, codec in _CODECS.items()}
    timings = interleaved(
        {
            name: partial(lambda codec, parts: list(map(codec.decode, parts)), codec, packed[name])
            for name, codec in _CODECS.items()
        },
        _ROUNDS,
    )
    return [
        {
            **{"dtype": dtype, "codec": name, "left": sum(map(len, parts)) / total},
            "decode_gb_per_s": total / timings[name].median / 1e9,
        }
        for name, parts in packed.items()
    ]
