"""A trained student for use elsewhere: a plain state dict, a torch.export program, and their card.

student.pt     the network's own keys, which the constructor of its architecture loads
student.pt2    torch.export, for any batch size: normalized float32 (B, C, H, W) -> logits (B, K)
student.json   architecture, classes, normalization, errors, where it comes from, and checksums
student-ema.*  the same of averaged weights, where the recipe has them

The weights are compared with the checksum that the run's summary has of them, and the program must
give the network's logits on test images, up to rounding. The folder gets its name when all is in
it, so that there is never a mixture of two students. Errors are measured again and not compared
with the run's: a sample or two may change sides on another device.
"""

from __future__ import annotations

import io
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from teach_once.configs.commands import student_command
from teach_once.configs.schema import as_plain
from teach_once.nets.metrics import ErrorRates, count_errors
from teach_once.nets.networks.archs import may_have_stem
from teach_once.nets.weights.files import load_weights
from teach_once.runtime.machine.devices import pick_device
from teach_once.runtime.safe.files import folder_written_aside
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.runtime.safe.text import one_line
from teach_once.store.identity import file_sha256, identity_sha256
from teach_once.store.read.mirror import named_as
from teach_once.train.engine.evaluation import evaluate
from teach_once.train.errors import TrainError
from teach_once.train.method.residual import build_student, hint_stage, is_pair, thinner
from teach_once.train.recording.exported import NAMES, card_document, verify_export
from teach_once.train.runs.files import EMA, SUMMARY_FILE
from teach_once.train.runs.study import Run
from teach_once.views.pixels.batches import Pixels
from teach_once.views.pixels.resident import evaluation_pixels

# How far the program's logits may be from the network's, relative to the largest of them: both
# compute in float32, but the sums of one may be in another order.
_ROUNDING = 1e-3
_COMPARED_IMAGES = 256

Which = Literal["best", "last", "best-ema", "last-ema"]


def export_student(
    run: Run, which: Sequence[Which], folder: Path, *, device: str = "auto"
) -> list[dict[str, Any]]:
    """Write three files for each of these weights into a new `folder`; returns their cards.

    The files of averaged weights are called `student-ema`. An earlier export of the same run is
    replaced whole. Raises TrainError, also if the folder contains another run's export; BadFile if
    it contains anything else.
    """
    _check_same_run(run, folder)
    weights = {each: _intact_weights(run, each) for each in which}
    with folder_written_aside(folder, NAMES) as aside:
        return [_exported(run, each, weights[each], aside, device) for each in which]


def _check_same_run(run: Run, folder: Path) -> None:
    """Raise TrainError if the folder holds the export of another run."""
    try:
        cards = verify_export(folder)
    except (BadFile, OSError):
        return  # none, or a damaged one, which is to be exported again
    for card in cards:
        own = {"model": run.study.config.student.arch, "method": run.method, "seed": run.seed}
        own |= {"cache_sha256": identity_sha256(run.study.cache.identity)}
        own |= {"run_sha256": run.sha256}
        if other := [f"{key} {card.get(key)}" for key in own if card.get(key) != own[key]]:
            raise TrainError(
                f"{folder} holds the export of another run ({one_line(', '.join(other))}), which "
                f"would be lost",
                fix=f"name another folder, or: rm -r {shlex.quote(str(folder))}",
            )


def _exported(run: Run, which: Which, weights: Path, folder: Path, device: str) -> dict[str, Any]:
    study, picked = run.study, pick_device(device)
    file = folder / ("student" + (EMA if which.endswith(EMA) else ""))
    plain_file, program_file = file.with_suffix(".pt"), file.with_suffix(".pt2")
    shutil.copyfile(weights, plain_file)
    _check_weights_file(plain_file, run, which)
    network = _loaded(run, plain_file).to(picked)
    test = evaluation_pixels(
        study.dataset.test, study.teacher.views, study.teacher.dataset.normalization, picked
    )
    errors = evaluate(network, test, run.training.precision, picked)
    plain = network.cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    program = _written_program(plain, test, program_file)
    card = {
        **_origin(run, which),
        "input_shape": [test.shape[2], test.shape[0], test.shape[1]],
        "top1_error": errors.top1,  # measured again, on this device
        "top5_error": errors.top5,
        "program_top1_error": _errors_of(program, test).top1,  # in float32
        "files_sha256": {each.name: file_sha256(each) for each in (plain_file, program_file)},
    }
    file.with_suffix(".json").write_bytes(card_document(card))
    return card


def weights_of(run: Run, when: Literal["best", "last"]) -> list[Which]:
    """Return a run's weights of that epoch: the network's, and their average if it has one."""
    averaged: Which = "best-ema" if when == "best" else "last-ema"
    return [when, averaged] if averaged in (run.summary or {}) else [when]


def _intact_weights(run: Run, which: Which) -> Path:
    """Read the weights of a finished run. Raises TrainError unless they are the run's final
    weights.
    """
    if run.summary is None:
        raise TrainError(f"{run.folder} is not finished", fix=_command(run))
    weights = run.folder / f"{which}.pt"
    if not weights.is_file():
        raise TrainError(f"{weights} is missing", fix=_again(run))
    _check_weights_file(weights, run, which)
    return weights


def _check_weights_file(file: Path, run: Run, which: Which) -> None:
    """Raise TrainError unless the file holds the weights that the run ended with."""
    name = f"{which}.pt"
    expected = ((run.summary or {}).get("files_sha256") or {}).get(name)
    if expected is None:
        raise TrainError(f"{run.folder / SUMMARY_FILE} has no sha256 of {name}", fix=_again(run))
    if file_sha256(file) != expected:
        raise TrainError(
            f"{run.folder / name} does not hold the weights that this run ended with: its sha256 "
            f"is not the one in {SUMMARY_FILE}",
            fix=_again(run),
        )


def _again(run: Run) -> str:
    return f"rm -r {shlex.quote(str(run.folder))} && {_command(run)}"


def _command(run: Run) -> str:
    study = run.study
    return student_command(
        study.config,
        study.teacher,
        run.method,
        run.seed,
        caches_dir=named_as(study.cache.path.parent),
        runs_dir=study.runs_dir,
    )


def _origin(run: Run, which: Which) -> dict[str, Any]:
    """Return the card's description of the run."""
    study, summary = run.study, run.summary
    assert summary is not None
    student = study.config.student
    return {
        "model": student.arch,
        **({"stem": student.stem} if may_have_stem(student.arch) else {}),
        "options": dict(student.options),
        **({"two_of": as_plain(thinner(student))} if is_pair(run.terms) else {}),
        "classes": list(study.dataset.class_names),
        "normalization": as_plain(study.teacher.dataset.normalization),
        "shown": as_plain(study.teacher.views.eval_transform),
        "method": run.method,
        "seed": run.seed,
        "run_sha256": run.sha256,
        "epoch": summary[which].get("epoch", summary["epochs"]),
        "reported_top1_error": summary[which]["top1_error"],
        "cache": summary["cache"],
        "cache_sha256": summary["cache_sha256"],
    }


def _loaded(run: Run, weights: Path) -> nn.Module:
    study = run.study
    network = build_student(
        study.config,
        run.terms,
        hint_stage(study.cache.taps),
        num_classes=study.dataset.num_classes,
        image_shape=study.image_shape,
    )
    load_weights(network, weights)
    channels_last: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return channels_last


def _written_program(network: nn.Module, test: Pixels, path: Path) -> nn.Module:
    """Export, load what was written, and compare it."""
    height, width, channels = test.shape
    example = torch.zeros(2, channels, height, width)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    archive = io.BytesIO()  # given a path, torch words a full disk as an error of its own
    torch.export.save(program, archive)
    path.write_bytes(archive.getbuffer())
    module: nn.Module = torch.export.load(path).module()
    _compare(module, network, test)
    return module


@torch.no_grad()
def _compare(program: nn.Module, network: nn.Module, test: Pixels) -> None:
    """Raise TrainError unless both give the same logits for the same images, up to rounding."""
    some = np.arange(min(len(test), _COMPARED_IMAGES))
    batch, *_ = test.batches([0], some, _COMPARED_IMAGES)
    images = batch.inputs.cpu()
    logits, theirs = network(images), program(images)
    difference = (theirs - logits).abs().max().item() / max(logits.abs().max().item(), 1e-12)
    if not difference <= _ROUNDING:
        raise TrainError(
            f"the program that torch.export made gives other logits than the network: they differ "
            f"by {difference:.2g} of the largest; {_ROUNDING:.2g} would be rounding",
            fix="use the run's best.pt or last.pt, and look in the network for what depends on its "
            "input",
        )


def _errors_of(program: nn.Module, test: Pixels) -> ErrorRates:
    def outputs() -> list[tuple[Tensor, Tensor]]:
        every = np.arange(len(test))
        return [
            (program(batch.inputs.cpu()), batch.labels.cpu())
            for batch in test.batches([0], every, 256)
        ]

    with torch.no_grad():
        return count_errors(outputs())
