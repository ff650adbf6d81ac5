"""Time an epoch of five methods that are trained jointly.

The lower bound is the larger of reading the epoch once and the sum of the five students' own steps;
the upper bound is one method after the other. For photographs of 110 kB as 32-pixel views, one
worker's decoding is the bottleneck; for images on the device it is not.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import Findings, Timing, Verdict, drain, interleaved, table_of
from benchmarks.synthetic.photographs import photograph_folder, photographs
from benchmarks.synthetic.studies import (
    SHAPES,
    make_cache,
    steps_of_epoch,
    study_of,
    write_study,
)
from benchmarks.targets.ablation import METHODS
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.runtime.machine.devices import pick_device
from teach_once.train.engine.step import TrainContext, start_epoch
from teach_once.train.engine.train_state import capture_maps
from teach_once.train.runs.study import Study
from teach_once.train.sessions.joint import shared_feed
from teach_once.train.sessions.student import open_context
from teach_once.views.pixels.batches import Pixels, ViewBatch
from teach_once.views.splits import Ids

TITLE = "Five methods trained jointly"
_DIFFERENT = 24  # photographs; the others are copies
_WORKERS = 1
_STUDENT = ["student.arch=resnet8", "training.batch_size=64", "training.precision=float32"]
ROWS = {
    "reading": "reading the epoch once",
    "steps": "the five students' own steps",
    "together": "five methods jointly",
    "apart": "one after the other",
}


def measure(device: str = "auto", images: int = 960, rounds: int = 5, threads: int = 1) -> Findings:
    """Time all rows. threads: torch's threads, in addition to the worker."""
    where, before, timings = pick_device(device), torch.get_num_threads(), {}
    torch.set_num_threads(threads)
    try:
        for name in ("photographs", "digits", "cifar-56-20"):
            with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
                if name == "photographs":
                    study = photograph_study(Path(place), images, where)
                else:
                    shape = replace(SHAPES[name], num_train=images)
                    study = study_of(shape, Path(place), where, ["student.arch=resnet8"])
                timings[name] = interleaved(rows_of(study, where, stack), rounds)
    finally:
        torch.set_num_threads(before)
    text = (
        f", {where}: resnet8 students, {images:,} images, batches of 64 (digits: 32); photographs "
        f"are made-up pictures of 110 kB, read by one worker; {threads} of torch's threads.\n\n"
    )
    text += table_of("an epoch", ROWS, timings, lambda t: f"{t.median:.2f} s ± {t.spread:.0%}")
    verdicts = []
    for name, t in timings.items():
        least = Timing(tuple(map(max, t["reading"].seconds, t["steps"].seconds)))
        what, ratio_to = f"{name}: five methods jointly", t["together"].ratio_to
        larger = f"{what} ÷ the larger of reading and steps"
        verdicts.append(Verdict(larger, ratio_to(least), at_most=1.1))
        verdicts.append(Verdict(f"{what} ÷ one after the other", ratio_to(t["apart"]), at_most=1))
    return Findings(text, verdicts)


class LoadedBatches:
    """`Pixels` whose batches of an epoch are in memory before the clock starts."""

    where, is_streamed = "in memory", False

    def __init__(self, pixels: Pixels, order: Ids, batch_size: int) -> None:
        self.shape, self._length = pixels.shape, len(pixels)
        self._batches = list(pixels.batches([0], order, batch_size))

    def __len__(self) -> int:
        return self._length

    def batches(self, views: Sequence[int], ids: Ids, batch_size: int) -> Iterator[ViewBatch]:
        return iter(self._batches)


def photograph_study(folder: Path, num_images: int, device: torch.device) -> Study:
    """Write a study of resnet8 students on an image folder, with a random teacher."""
    photograph_folder(folder / "photos", num_images, list(photographs(_DIFFERENT)), classes=10)
    data = {"type": "imagefolder", "root": str(folder / "photos")}
    views = ["views.augment={type: random-resized-crop, size_px: 32}", "views.count=1"]
    taps = "taps={logits: float32, channel_means: float32}"
    files = write_study(folder, data, ["teacher.arch=resnet8", *views, taps], _STUDENT)
    make_cache(files.setup(), PassOptions(device, 64, num_workers=_WORKERS))
    return files.study()


def rows_of(
    study: Study, device: torch.device, stack: contextlib.ExitStack
) -> dict[str, Callable[[], None]]:
    """Return an epoch of each row."""
    runs = [study.run(method, 0) for method in METHODS]
    pixels = study.pixels(device, _WORKERS)
    apart = [open_context(run, device, data=pixels) for run in runs]
    open_shared = stack.enter_context(shared_feed(runs, device, _WORKERS))
    together = [open_shared(run) for run in runs]
    order, size = start_epoch(apart[-1], 1), study.config.training.batch_size
    loaded = pixels._replace(train=LoadedBatches(pixels.train, order, size))
    for context in [*apart, *together]:
        context.train_state.train()
        stack.enter_context(capture_maps(context.train_state, pixels.train, size))
        stack.callback(context.teacher.close)

    def epochs(contexts: Sequence[TrainContext]) -> list[Callable[[], Iterator[object]]]:
        return [partial(steps_of_epoch, context, 1) for context in contexts]

    return {
        "reading": drain(partial(pixels.train.batches, [0], order, size)),
        "steps": drain(*epochs([replace(context, data=loaded) for context in apart])),
        "together": drain(lambda: zip(*(each() for each in epochs(together)), strict=True)),
        "apart": drain(*epochs(apart)),
    }
