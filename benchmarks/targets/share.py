"""python -m benchmarks share [--images 960] [--rounds 5] [--threads 1] [--device cuda]

An epoch of five methods together, against reading the epoch once and the sum of the five students'
own steps, of which none can be saved; and against one method after the other. Photographs of 110 kB
as 32-pixel views, where one worker's decoding is the bottleneck, and images that lie on the device,
where it is not.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.harness import Timing, Verdict, interleaved, machine, markdown, parser_of, publish
from benchmarks.synthetic.photographs import origin, photographs
from benchmarks.synthetic.studies import SHAPES, study_of
from benchmarks.targets.ablation import METHODS
from teach_once.configs.load import load_student, load_teacher
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.compute import setup
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.precompute.run_pass import fill_cache
from teach_once.runtime.machine.devices import pick_device
from teach_once.train.engine.step import TrainContext, active_terms, epoch_steps, start_epoch
from teach_once.train.engine.train_state import capture_maps
from teach_once.train.runs.study import Study, open_study
from teach_once.train.sessions.joint import shared_feed
from teach_once.train.sessions.student import open_context
from teach_once.views.datasets import load_dataset
from teach_once.views.pixels.batches import Pixels, ViewBatch
from teach_once.views.splits import Ids

_DIFFERENT = 24  # photographs; the others are copies
_WORKERS = 1
_STUDENT = ["student.arch=resnet8", "training.batch_size=64", "training.precision=float32"]
_TEST_IMAGES = 10

ROWS = {
    "reading": "reading the epoch once",
    "steps": "the five students' own steps",
    "together": "five methods together",
    "apart": "one after the other",
}


class HeldBatches:
    """The batches of an epoch, in memory before the clock starts: `Pixels`."""

    where, is_streamed = "in memory", False

    def __init__(self, pixels: Pixels, order: Ids, batch_size: int) -> None:
        self.shape, self._length = pixels.shape, len(pixels)
        self._batches = list(pixels.batches([0], order, batch_size))

    def __len__(self) -> int:
        return self._length

    def batches(self, views: Sequence[int], ids: Ids, batch_size: int) -> Iterator[ViewBatch]:
        return iter(self._batches)


def photograph_study(folder: Path, num_images: int, device: torch.device) -> Study:
    """resnet8 students of a teacher with random weights, on an image folder."""
    contents = list(photographs(_DIFFERENT))
    for split, count in (("train", num_images), ("val", _TEST_IMAGES)):
        for number in range(count):
            place = folder / "photos" / split / f"class{number % 10}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.jpg").write_bytes(contents[number % _DIFFERENT])
    save_atomically(build("resnet20", num_classes=10).state_dict(), folder / "teacher.pt")
    half = [0.5, 0.5, 0.5]
    data = {"type": "imagefolder", "root": str(folder / "photos")}
    teacher = load_teacher(
        "cifar10-resnet56",
        [
            f"dataset={json.dumps(data | {'normalisation': {'mean': half, 'std': half}})}",
            'views.augment={"kind": "random-resized-crop", "size_px": 32}',
            "views.evaluation=null",
            "views.count=1",
            f"teacher={json.dumps({'arch': 'resnet20', 'weights': str(folder / 'teacher.pt')})}",
            'taps={"logits": "float32", "means": "float32"}',
        ],
    )
    student = load_student("cifar10-resnet20", _STUDENT)
    pass_ = setup.setup_of(teacher, load_dataset(teacher.dataset), folder / "caches")
    fill_cache(pass_, PassOptions(device, 64, num_workers=_WORKERS), Console(file=io.StringIO()))
    return open_study(student, teacher, caches_dir=folder / "caches", runs_dir=folder / "runs")


def rows_of(
    study: Study, device: torch.device, open_: contextlib.ExitStack
) -> dict[str, Callable[[], None]]:
    """An epoch of each row."""
    runs = [study.run(method, 0) for method in METHODS]
    pixels = study.pixels(device, _WORKERS)
    alone = [open_context(run, device, data=pixels) for run in runs]
    open_shared = open_.enter_context(shared_feed(runs, device, _WORKERS))
    together = [open_shared(run) for run in runs]
    order, size = start_epoch(alone[-1], 1), study.config.training.batch_size
    held = HeldBatches(pixels.train, order, size)
    own = [replace(context, data=pixels._replace(train=held)) for context in alone]
    for context in [*alone, *together]:
        context.train_state.train()
        open_.enter_context(capture_maps(context.train_state, pixels.train, size))
        open_.callback(context.teacher.close)

    def read() -> None:
        for _ in pixels.train.batches([0], order, size):
            pass

    def one_by_one(contexts: Sequence[TrainContext]) -> None:
        for context in contexts:
            for _ in _steps(context):
                pass

    def in_turn() -> None:
        for _ in zip(*map(_steps, together), strict=True):
            pass

    return {
        "reading": read,
        "steps": lambda: one_by_one(own),
        "together": in_turn,
        "apart": lambda: one_by_one(alone),
    }


def _steps(context: TrainContext) -> Iterator[object]:
    """Those of the first epoch, with all terms of the method."""
    terms = active_terms(context.run.terms, context.run.training.epochs)
    return epoch_steps(context, 1, start_epoch(context, 1), terms)


def main(arguments: list[str]) -> int:
    parser = parser_of("share", __doc__)
    parser.add_argument("--images", type=int, default=960)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch, beside the worker")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    timings = {}
    try:
        for name in ("photographs", "digits", "cifar-56-20"):
            with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as open_:
                study = (
                    photograph_study(Path(place), options.images, device)
                    if name == "photographs"
                    else study_of(
                        replace(SHAPES[name], num_train=options.images),
                        Path(place),
                        device,
                        ["student.arch=resnet8"],
                    )
                )
                timings[name] = interleaved(rows_of(study, device, open_), options.rounds)
    finally:
        torch.set_num_threads(threads)
    text = (
        f"`python -m benchmarks share {' '.join(arguments)}` on {machine()}, torch "
        f"{torch.__version__}, {device}: resnet8 students, {options.images:,} images, batches of "
        f"64 (digits: 32); photographs are {origin()} of 110 kB, read by one worker; "
        f"{options.threads} of torch's threads.\n\n{_table(timings)}"
    )
    verdicts = [each for name in timings for each in _verdicts(name, timings[name])]
    publish(options, "Five methods that share one reading", text, verdicts)
    return 0


def _verdicts(name: str, rows: Mapping[str, Timing]) -> list[Verdict]:
    least = Timing(tuple(map(max, rows["reading"].seconds, rows["steps"].seconds)))
    return [
        Verdict(
            f"{name}: five methods together ÷ the larger of reading and steps",
            rows["together"].ratio_to(least),
            "≤ 1.1",
            lambda x: x <= 1.1,
        ),
        Verdict(
            f"{name}: five methods together ÷ one after the other",
            rows["together"].ratio_to(rows["apart"]),
            "≤ 1",
            lambda x: x <= 1,
        ),
    ]


def _table(timings: Mapping[str, Mapping[str, Timing]]) -> str:
    rows = [
        [label, *(f"{t[key].median:.2f} s ± {100 * t[key].spread:.0f}%" for t in timings.values())]
        for key, label in ROWS.items()
    ]
    return markdown(["an epoch", *timings], rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
