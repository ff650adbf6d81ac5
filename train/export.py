"""A trained student for use elsewhere: a plain state dict, a torch.export program, and their card.

student.pt     the network's own keys, which the constructor of its architecture loads
student.pt2    torch.export, for any batch size: normalised float32 (B, C, H, W) -> logits (B, K)
student.json   architecture, classes, normalisation, errors and where it comes from

What was trained is tested again before anything is written, and the program after it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from configs.commands import student_command
from configs.schema import as_plain
from nets.errors import Errors, count_errors
from nets.precision import pick_device
from nets.weights import load_weights
from nets.zoo import build
from store.files import write_atomically
from train.evaluate import evaluate
from train.study import Study, TrainError
from views.batches import Pixels
from views.pixels import evaluation_pixels

# On another device a few samples may turn over; on the same one the errors are equal.
_ROUNDING_PERCENT = 0.5

Which = Literal["best", "last"]


def export_student(
    study: Study, method: str, seed: int, which: Which, folder: Path, *, device: str = "auto"
) -> dict[str, Any]:
    """Write the three files into `folder`; returns the card. Raises TrainError."""
    summary = study.finished(method, seed)
    if summary is None:
        command = student_command(
            study.config,
            study.teacher,
            method,
            seed,
            caches_dir=study.cache.path.parent,
            runs_dir=study.runs_dir,
        )
        raise TrainError(f"{study.run_folder(method, seed)} is not finished\n  fix: {command}")
    place = pick_device(device)
    trained = study.run_folder(method, seed) / f"{which}.pt"
    network = _loaded(study, trained).to(place)
    test = evaluation_pixels(
        study.dataset.test, study.teacher.views, study.teacher.dataset.normalisation, place
    )
    found = evaluate(network, test, study.config.training.precision, place)
    reported = summary[which]["top1_error"]
    if abs(found.top1 - reported) > _ROUNDING_PERCENT:
        raise TrainError(
            f"{trained} has {found.top1:.2f} % top-1 error, but {reported:.2f} % was reported\n"
            f"  fix: rm -r {trained.parent} and make train-student again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(trained, folder / "student.pt")
    plain = network.cpu().eval().to(memory_format=torch.contiguous_format)
    program = _written_program(plain, test.shape, folder / "student.pt2")
    card = {
        "model": study.config.student.arch,
        "stem": study.config.student.stem,
        "classes": list(study.dataset.class_names),
        "input_shape": [test.shape[2], test.shape[0], test.shape[1]],
        "normalisation": as_plain(study.teacher.dataset.normalisation),
        "shown": as_plain(study.teacher.views.shown_at_evaluation),
        "method": method,
        "seed": seed,
        "epoch": summary["best"]["epoch"] if which == "best" else summary["epochs"],
        "top1_error": found.top1,
        "top5_error": found.top5,
        "program_top1_error": _errors_of(program, test).top1,  # in float32
        "cache": summary["cache"],
        "cache_sha256": summary["cache_sha256"],
    }
    write_atomically(folder / "student.json", (json.dumps(card, indent=1) + "\n").encode())
    return card


def _loaded(study: Study, weights: Path) -> nn.Module:
    network = build(
        study.config.student.arch,
        num_classes=study.dataset.num_classes,
        in_channels=study.image_shape[2],
        stem=study.config.student.stem,
    )
    load_weights(network, weights)
    return network.to(memory_format=torch.channels_last)


def _written_program(network: nn.Module, shape: tuple[int, int, int], path: Path) -> nn.Module:
    """Export, write aside, rename, and load what was written."""
    height, width, channels = shape
    example = torch.zeros(2, channels, height, width)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    aside = path.with_name(f".{path.stem}.tmp.pt2")
    torch.export.save(program, aside)
    aside.replace(path)
    module: nn.Module = torch.export.load(path).module()
    return module


def _errors_of(program: nn.Module, test: Pixels) -> Errors:
    def outputs() -> list[tuple[Tensor, Tensor]]:
        every = np.arange(len(test))
        return [
            (program(batch.inputs.cpu()), batch.labels.cpu())
            for _, batch in test.batches([0], every, 256)
        ]

    with torch.no_grad():
        return count_errors(outputs())
