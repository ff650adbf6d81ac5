"""Bytes and errors of each tap dtype, on real records.

Errors of channel means, divergence of logits, changes of the CD and GKD losses. The records are
view 0 of the teacher's dataset, computed in float32 and converted. As student outputs, the losses
get the teacher's outputs on view 1, which resemble a good student's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import Findings, markdown
from benchmarks.synthetic.studies import make_cache
from teach_once.nets.teacher.taps import in_order
from teach_once.precompute.compute.setup import prepare
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.runtime.command.options import Overrides
from teach_once.runtime.machine.devices import pick_device
from teach_once.store import TeacherCache
from teach_once.store.move.convert import convert_cache
from teach_once.train.losses import cd, gkd, kd

TITLE = "Tap dtypes"
Records = dict[str, NDArray[np.float32]]
_EXACT = (
    "taps={logits: float32, channel_means: float32}",
    *("views.count=2", "views.evaluation=null"),
)


def measure(
    teacher: Annotated[str, typer.Argument()] = "cifar10-resnet56",
    overrides: Overrides = None,
    device: str = "auto",
) -> Findings:
    found = dict[str, dict[str, float]]()
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(teacher, [*(overrides or []), *_EXACT], Path(folder))
        caches = {"float32": make_cache(setup, PassOptions(pick_device(device)))}
        exact, student = (read_records(caches["float32"], view) for view in (0, 1))
        for dtype in ("float16", "uint8"):
            dest = Path(folder, dtype)
            caches[dtype] = convert_cache(setup.path, dest, logits=dtype, channel_means=dtype)
        for dtype, cache in caches.items():
            metrics = errors(exact, read_records(cache, 0), student)
            found[dtype] = {"bytes per record": cache.manifest.record_bytes, **metrics}
    name = setup.config.name
    rows = [
        [dtype, f"{size}", *(f"{each:.1e}" for each in metrics)]
        for dtype, (size, *metrics) in ((key, row.values()) for key, row in found.items())
    ]
    table = markdown(["stored as", *found["float32"]], rows)
    text = (
        f": {len(setup.dataset.train):,} records of {name}. Errors of a channel mean are "
        f"relative to the average size of that channel.\n\n{table}"
    )
    return Findings(text, content=found, title=f"{TITLE}: {name}")


def read_records(cache: TeacherCache, view: int) -> Records:
    """Read all taps of one view, (N, ...)."""
    found = cache.read_view(view, list(cache.taps))
    return {tap: values.astype(np.float32) for tap, values in found.items()}


def errors(exact: Records, stored: Records, student: Records) -> dict[str, float]:
    """Compute the errors of stored records: column of the table -> value."""
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
        "largest rel. error of means": max(float(each.max()) for each in relative),
        "mean rel. error of means": float(np.mean([each.mean() for each in relative])),
        "KL of logits (nats)": kd(read["logits"], full["logits"], temperature=1.0).item(),
        "rel. change of CD loss": change_of_cd,
        "rel. change of GKD loss": change_of_gkd,
    }
