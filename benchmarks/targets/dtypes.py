"""What each tap dtype costs and keeps, on real records, and what general compression would save.

Bytes, error of the channel means, divergence of the logits, change of the CD and GKD losses. The
records are view 0 of the teacher's dataset, computed in float32. In place of a student's outputs,
the losses get the same teacher's on view 1: those of a student that has come close.
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
from torch import Tensor

from benchmarks.harness import Findings, interleaved, markdown
from teach_once.nets.teacher.taps import in_order
from teach_once.precompute.compute.setup import prepare
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.runtime.command.options import Overrides
from teach_once.runtime.machine.devices import pick_device
from teach_once.store.format.coding import (
    quantize_channels,
    quantize_rows,
    restore_channels,
    restore_rows,
)
from teach_once.store.format.spec import SAMPLE_DIGEST
from teach_once.train.losses import cd, gkd, kd

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
    content: dict[str, list[dict[str, str | float]]] = {"dtypes": [], "compression": []}
    rows, codec_rows = [], []
    for dtype in DTYPES:
        records, num_bytes = stored_as(exact, dtype)
        metrics = errors(exact, records, student)
        content["dtypes"].append({"dtype": dtype, "bytes_per_record": num_bytes, **metrics})
        rows.append([dtype, f"{num_bytes:.1f}", *(f"{metrics[each]:.1e}" for each in _ERRORS)])
        for codec, (left, rate) in compressed(exact, dtype).items():
            names = {"dtype": dtype, "codec": codec}
            content["compression"].append({**names, "left": left, "decode_gb_per_s": rate})
            codec_rows.append([dtype, codec, f"{left:.0%}", f"{rate:.1f} GB/s"])
    name = setup.config.name
    table = markdown(["stored as", "bytes per record", *_ERRORS.values()], rows)
    of_codecs = markdown(["stored as", "codec", "bytes left", "decoding"], codec_rows)
    text = (
        f": {len(setup.dataset.train):,} records of {name}. Errors of a channel mean are "
        f"relative to the average size of that channel.\n\n"
        f"{table}\nGeneral compression of the same numbers, one core:\n\n{of_codecs}"
    )
    return Findings(text, content=content, title=f"{TITLE}: {name}")


def exact_records(teacher_pass: TeacherPass, view: int) -> Records:
    """The taps that every cache has, of one view: float32 (N, ...)."""
    taps = [tap for tap in teacher_pass.setup.taps if tap.kind not in ("attention", "hint")]
    found = teacher_pass.records(view, np.arange(len(teacher_pass.pixels)), taps)
    return {
        tap: values.float().cpu().numpy() for tap, values in found.items() if tap != SAMPLE_DIGEST
    }


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
            restored[tap] = restore_rows(*quantize_rows(values))
            num_bytes += values.shape[1] + 8
        else:
            blocks = np.split(values, range(_BLOCK_ROWS, len(values), _BLOCK_ROWS))
            read = [restore_channels(*quantize_channels(block)) for block in blocks]
            restored[tap] = np.concatenate(read)
            num_bytes += values.shape[1] * (1 + 8 * len(blocks) / len(values))
    return restored, num_bytes


def errors(exact: Records, stored: Records, student: Records) -> dict[str, float]:
    """The metrics of `_ERRORS`."""
    stages = in_order(exact, "stage")
    relative = [
        np.abs(stored[s] - exact[s]) / np.abs(exact[s]).mean(axis=0).clip(1e-6) for s in stages
    ]
    of_student, full, read = (
        {tap: torch.from_numpy(values) for tap, values in records.items()}
        for records in (student, exact, stored)
    )

    def losses(teacher: dict[str, Tensor]) -> tuple[float, float]:
        own, theirs = ([each[stage] for stage in stages] for each in (of_student, teacher))
        logits = of_student["logits"], teacher["logits"]
        return cd(own, theirs).item(), gkd(*logits, full["correct"]).item()

    pairs = zip(losses(read), losses(full), strict=True)
    change_of_cd, change_of_gkd = (abs(loss / reference - 1) for loss, reference in pairs)
    return {
        "largest_error_of_means": max(float(each.max()) for each in relative),
        "mean_error_of_means": float(np.mean([each.mean() for each in relative])),
        "kl_of_logits": kd(read["logits"], full["logits"], temperature=1.0).item(),
        "change_of_cd": change_of_cd,
        "change_of_gkd": change_of_gkd,
    }


def compressed(records: Records, dtype: str) -> dict[str, tuple[float, float]]:
    """Codec -> the fraction of bytes left, and the GB/s of decoding them."""
    arrays = [
        np.ascontiguousarray(quantize_rows(each)[0] if dtype == "uint8" else each.astype(dtype))
        for tap, each in records.items()
        if tap != "correct"
    ]
    total = sum(array.nbytes for array in arrays)
    packed = {name: list(map(codec.encode, arrays)) for name, codec in _CODECS.items()}

    def decode(name: str) -> None:
        for part in packed[name]:
            _CODECS[name].decode(part)

    timings = interleaved({name: partial(decode, name) for name in packed}, _ROUNDS)
    return {
        name: (sum(map(len, parts)) / total, total / timings[name].median / 1e9)
        for name, parts in packed.items()
    }
