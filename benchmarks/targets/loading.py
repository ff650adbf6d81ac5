"""python -m benchmarks loading [--workers 1] [--photographs 512] [--rounds 7]

How fast images reach the training loop: batches of normalised float32 views of 224 pixels, from
photographs of 110 kB. torchvision's ImageFolder with PyTorch's DataLoader, as in the ImageNet
example of PyTorch, against ours from the same files and from photographs packed with
`python -m views pack --short-side 256 --quality 90`. All have the same number of workers, start
them once, and take turns. The files are in the page cache.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import Timing, Verdict, interleaved, machine, markdown, parser_of, publish
from benchmarks.synthetic.photographs import origin, photographs
from teach_once.configs.schema import (
    ImageFolder,
    Normalisation,
    Packed,
    RandomResizedCrop,
    ViewsConfig,
)
from teach_once.runtime.machine.torchvision_shim import import_torchvision
from teach_once.views.augment.augment import cut_views
from teach_once.views.datasets import load_dataset
from teach_once.views.images.encoded import encoded_folder
from teach_once.views.images.folders import image_folder
from teach_once.views.packed.recode import Recode
from teach_once.views.packed.write import pack_encoded
from teach_once.views.pixels.resident import open_pixels
from teach_once.views.pixels.streaming import StreamedPixels

SIZE_PX, BATCH_SIZE, CLASSES = 224, 64, 8
MANY_VIEWS = 50
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
THEIRS = "torchvision"
THEIRS_UINT8 = "torchvision, workers hand over uint8"
OURS = "ours, the same files"
PACKED = "ours, packed with short side 256, quality 90"
RECODE = Recode(256, None, 90)

Epoch = Callable[[], None]
_TICKS = os.sysconf("SC_CLK_TCK")


def make_folder(root: Path, count: int) -> float:
    """Photographs in `root/train/<class>/` and a few in `root/val`; returns their mean bytes."""
    sizes = []
    for number, content in enumerate(photographs(count)):
        for split in ("train", "val") if number < CLASSES else ("train",):
            folder = root / split / f"class{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:06d}.jpg").write_bytes(content)
        sizes.append(len(content))
    return float(np.mean(sizes))


def their_epoch(root: Path, num_workers: int, uint8: bool = False) -> Epoch:
    """One pass over all images in torchvision's way."""
    import_torchvision()
    from torchvision import datasets, transforms

    normalise: Any = transforms.Normalize(MEAN, STD)
    cut = [transforms.RandomResizedCrop(SIZE_PX), transforms.RandomHorizontalFlip()]
    steps = [transforms.PILToTensor()] if uint8 else [transforms.ToTensor(), normalise]
    loader: DataLoader[Any] = DataLoader(
        datasets.ImageFolder(str(root / "train"), transforms.Compose([*cut, *steps])),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )

    def batches() -> Iterator[Tensor]:
        for images, _ in loader:
            yield normalise(images.float() / 255) if uint8 else images

    return _counted(batches, len(loader.dataset))  # type: ignore[arg-type]


def our_epoch(dataset: ImageFolder | Packed, num_workers: int) -> Epoch:
    """One pass over view 0 of all images, in a new order each time."""
    split = load_dataset(dataset).train
    views = ViewsConfig(augment=RandomResizedCrop(size_px=SIZE_PX), seed=0, count=2)
    pixels = open_pixels(
        split, views, dataset.normalisation, torch.device("cpu"), num_workers=num_workers
    )
    assert isinstance(pixels, StreamedPixels)
    rng = np.random.default_rng(0)

    def batches() -> Iterator[Tensor]:
        for batch in pixels.batches([0], rng.permutation(len(split)), BATCH_SIZE):
            yield batch.inputs

    return _counted(batches, len(split))


def _counted(batches: Callable[[], Iterator[Tensor]], expected: int) -> Epoch:
    def run() -> None:
        seen = 0
        for inputs in batches():
            assert inputs.shape[1:] == (3, SIZE_PX, SIZE_PX)
            assert inputs.dtype == torch.float32
            seen += len(inputs)
        assert seen == expected

    return run


def decoding_share(dataset: ImageFolder | Packed, num_images: int = 32) -> float:
    """Of the time that a worker takes for 50 views of an image, the part before any is cut.

    Processor time of this process, the best of three; what one view takes is the 49th part of the
    difference between 50 views and one.
    """
    split = load_dataset(dataset).train
    views = ViewsConfig(augment=RandomResizedCrop(size_px=SIZE_PX), seed=0, count=MANY_VIEWS)
    ids, shape = np.arange(min(num_images, len(split))), (SIZE_PX, SIZE_PX, 3)

    def seconds(num_views: int) -> float:
        taken = []
        for _ in range(3):
            started = time.process_time()
            for sample in ids:
                cut_views(split, views, range(num_views), np.array([sample]), shape)
            taken.append(time.process_time() - started)
        return min(taken)

    one, many = seconds(1), seconds(MANY_VIEWS)
    return (one - (many - one) / (MANY_VIEWS - 1)) / many


def worker_seconds() -> float:
    """Processor time that all workers of this process have taken so far."""
    seconds = 0.0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / _TICKS
    return seconds


def metered(epoch: Epoch, seconds: list[float]) -> Epoch:
    """`epoch`, which adds what its workers took to `seconds`."""

    def run() -> None:
        before = worker_seconds()
        epoch()
        seconds.append(worker_seconds() - before)

    return run


def verdicts_of(
    timings: dict[str, Timing], workers: dict[str, Timing], share: float
) -> list[Verdict]:
    def faster(name: str, than: str, by: dict[str, Timing] = timings) -> float:
        return 1 / by[name].ratio_to(by[than])

    return [
        Verdict(
            "the same files ÷ torchvision, images/s",
            faster(OURS, THEIRS),
            "≥ 1.15",
            lambda x: x >= 1.15,
        ),
        Verdict(
            "packed ÷ torchvision, images/s", faster(PACKED, THEIRS), "≥ 2.5", lambda x: x >= 2.5
        ),
        Verdict("the same files ÷ torchvision with uint8, images/s", faster(OURS, THEIRS_UINT8)),
        Verdict(
            "the same files ÷ torchvision, images per second of a worker's processor time",
            faster(OURS, THEIRS, workers),
        ),
        Verdict(
            "packed ÷ torchvision, images per second of a worker's processor time",
            faster(PACKED, THEIRS, workers),
        ),
        Verdict(
            f"reading and decoding ÷ all worker time, {MANY_VIEWS} views from one decoding",
            share,
            "≤ 0.08",
            lambda x: x <= 0.08,
        ),
    ]


def main(arguments: list[str]) -> int:
    parser = parser_of("loading", __doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--photographs", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the loop's own arithmetic takes no core from the workers
    normalisation = Normalisation(mean=MEAN, std=STD)
    with tempfile.TemporaryDirectory() as name:
        root, packed = Path(name) / "photographs", Path(name) / "packed.h5"
        file_bytes = make_folder(root, options.photographs)
        pack_encoded(encoded_folder(image_folder(root)), packed, RECODE)
        packed_bytes = packed.stat().st_size / (options.photographs + CLASSES)
        folder = ImageFolder(type="imagefolder", root=str(root), normalisation=normalisation)
        file = Packed(type="packed", file=str(packed), normalisation=normalisation)
        rows = {
            THEIRS: their_epoch(root, options.workers),
            THEIRS_UINT8: their_epoch(root, options.workers, uint8=True),
            OURS: our_epoch(folder, options.workers),
            PACKED: our_epoch(file, options.workers),
        }
        share = decoding_share(folder)
        took: dict[str, list[float]] = {name: [] for name in rows}
        metered_rows = {name: metered(epoch, took[name]) for name, epoch in rows.items()}
        timings = interleaved(metered_rows, options.rounds)
    workers = {name: Timing(tuple(seconds[1:])) for name, seconds in took.items()}
    count = options.photographs
    table = markdown(
        ["views from", "images/s", "workers' ms per image", "bytes per image"],
        [
            [
                name,
                f"{count / timing.median:,.0f} ± {timing.spread:.0%}",
                f"{workers[name].median / count * 1000:.2f} ± {workers[name].spread:.0%}",
                f"{packed_bytes if name == PACKED else file_bytes:,.0f}",
            ]
            for name, timing in timings.items()
        ],
    )
    text = (
        f"`python -m benchmarks loading {' '.join(arguments)}` on {machine()}, torch "
        f"{torch.__version__}: {count:,} photographs of 500x375 ({origin()}), {options.workers} "
        f"worker(s), batches of {BATCH_SIZE}; median of {options.rounds} interleaved rounds ± half "
        f"the distance between the quartiles.\n\n{table}"
    )
    publish(options, "Loading photographs", text, verdicts_of(timings, workers, share))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
