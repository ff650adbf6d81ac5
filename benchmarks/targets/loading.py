"""How fast images reach the training loop: batches of normalized float32 views of 224 pixels.

torchvision's ImageFolder with PyTorch's DataLoader, as in PyTorch's ImageNet example, reads
photographs of 110 kB. This project reads the same files, and photographs packed with
`python -m views pack --short-side 256 --quality 90`. All rows have the same number of workers,
start them once, and are interleaved. The files are in the page cache.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import CPU, ROUNDS, Findings, Timing, Verdict, interleaved, markdown
from benchmarks.synthetic.photographs import photograph_folder
from benchmarks.synthetic.photographs import photographs as make_photographs
from teach_once.configs.schema import (
    ImageFolder,
    Normalization,
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

TITLE = "Loading photographs"
SIZE_PX, BATCH_SIZE, CLASSES = 224, 64, 8
MANY_VIEWS = 50
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
THEIRS = "torchvision"
THEIRS_UINT8 = "torchvision, workers hand over uint8"
OURS = "ours, the same files"
PACKED = "ours, packed with short side 256, quality 90"

Epoch = Callable[[], Iterable[Tensor]]
Rows = dict[str, Timing]


def measure(workers: int = 1, photographs: int = 512, rounds: int = 7) -> Findings:
    torch.set_num_threads(1)  # the loop's own arithmetic takes no core from the workers
    normalization = Normalization(mean=MEAN, std=STD)
    with tempfile.TemporaryDirectory() as name:
        root, packed = Path(name) / "photographs", Path(name) / "packed.h5"
        contents = list(make_photographs(photographs))
        photograph_folder(root, photographs, contents, CLASSES)
        pack_encoded(encoded_folder(image_folder(root)), packed, Recode(256, None, 90))
        packed_bytes = packed.stat().st_size / (photographs + CLASSES)
        folder = ImageFolder(type="imagefolder", root=str(root), normalization=normalization)
        file = Packed(type="packed", file=str(packed), normalization=normalization)
        epochs = {
            THEIRS: their_epoch(root, workers),
            THEIRS_UINT8: their_epoch(root, workers, uint8=True),
            OURS: our_epoch(folder, workers),
            PACKED: our_epoch(file, workers),
        }
        fraction = decoding_fraction(folder)
        took: dict[str, list[float]] = {name: [] for name in epochs}
        rows = {name: _metered(each, photographs, took[name]) for name, each in epochs.items()}
        timings = interleaved(rows, rounds)
    of_workers = {name: Timing(tuple(seconds[1:])) for name, seconds in took.items()}
    lines = []
    for name, timing in timings.items():
        worker_ms = of_workers[name].format_ms(2, photographs).replace(" ms", "")
        num_bytes = packed_bytes if name == PACKED else np.mean(list(map(len, contents)))
        lines.append([name, timing.format_rate(photographs), worker_ms, f"{num_bytes:,.0f}"])
    table = markdown(["views from", "images/s", "workers' ms per image", "bytes per image"], lines)
    text = (
        f": {photographs:,} made-up photographs of 500x375, {workers} worker(s), "
        f"batches of {BATCH_SIZE}; median of {rounds} interleaved rounds {ROUNDS}.\n\n{table}"
    )
    return Findings(text, verdicts_of(timings, of_workers, fraction))


def verdicts_of(timings: Rows, workers: Rows, fraction: float) -> list[Verdict]:
    same, packed = "the same files ÷ torchvision", "packed ÷ torchvision"
    theirs, worker_theirs = timings[THEIRS], workers[THEIRS]
    of_worker = "images per second of a worker's processor time"
    decoding = f"reading and decoding ÷ all worker time, {MANY_VIEWS} views from one decoding"
    uint8 = timings[THEIRS_UINT8].ratio_to(timings[OURS])
    return [
        Verdict(f"{same}, images/s", theirs.ratio_to(timings[OURS]), at_least=1.15),
        Verdict(f"{packed}, images/s", theirs.ratio_to(timings[PACKED]), at_least=2.5),
        Verdict(f"{same} with uint8, images/s", uint8),
        Verdict(f"{same}, {of_worker}", worker_theirs.ratio_to(workers[OURS])),
        Verdict(f"{packed}, {of_worker}", worker_theirs.ratio_to(workers[PACKED])),
        Verdict(decoding, fraction, at_most=0.08),
    ]


def their_epoch(root: Path, num_workers: int, uint8: bool = False) -> Epoch:
    """Return an epoch over all images in torchvision's way."""
    import_torchvision()
    from torchvision import datasets, transforms

    normalize: Any = transforms.Normalize(MEAN, STD)
    cut = [transforms.RandomResizedCrop(SIZE_PX), transforms.RandomHorizontalFlip()]
    steps = [transforms.PILToTensor()] if uint8 else [transforms.ToTensor(), normalize]
    loader: DataLoader[Any] = DataLoader(
        datasets.ImageFolder(str(root / "train"), transforms.Compose([*cut, *steps])),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )

    def batches() -> Iterator[Tensor]:
        for images, _ in loader:
            yield normalize(images.float() / 255) if uint8 else images

    return batches


def our_epoch(dataset: ImageFolder | Packed, num_workers: int) -> Epoch:
    """Return an epoch over view 0 of all images, in a new order each time."""
    split = load_dataset(dataset).train
    views = ViewsConfig(augment=RandomResizedCrop(size_px=SIZE_PX), seed=0, count=2)
    pixels = open_pixels(split, views, dataset.normalization, CPU, num_workers=num_workers)
    assert isinstance(pixels, StreamedPixels)
    rng = np.random.default_rng(0)

    def batches() -> Iterator[Tensor]:
        for batch in pixels.batches([0], rng.permutation(len(split)), BATCH_SIZE):
            yield batch.inputs

    return batches


def _metered(epoch: Epoch, num_images: int, seconds: list[float]) -> Callable[[], None]:
    """Turn an epoch into a row that appends its workers' processor time to `seconds`."""

    def run() -> None:
        before, seen = worker_seconds(), 0
        for inputs in epoch():
            assert (inputs.dtype, inputs.shape[1:]) == (torch.float32, (3, SIZE_PX, SIZE_PX))
            seen += len(inputs)
        assert seen == num_images
        seconds.append(worker_seconds() - before)

    return run


def decoding_fraction(dataset: ImageFolder | Packed, num_images: int = 32) -> float:
    """Return the fraction of a worker's time for 50 views of an image before any is cropped.

    Processor time of this process, the best of three; a view takes the 49th part of the difference
    between 50 views and one.
    """
    split = load_dataset(dataset).train
    views = ViewsConfig(augment=RandomResizedCrop(size_px=SIZE_PX), seed=0, count=MANY_VIEWS)
    ids, shape = np.arange(min(num_images, len(split))), (SIZE_PX, SIZE_PX, 3)

    def seconds(num_views: int) -> float:
        started = time.process_time()
        for sample in ids:
            cut_views(split, views, range(num_views), np.array([sample]), shape)
        return time.process_time() - started

    one, many = (min(seconds(number) for _ in range(3)) for number in (1, MANY_VIEWS))
    return (one - (many - one) / (MANY_VIEWS - 1)) / many


def worker_seconds() -> float:
    """Return the processor time of all workers of this process so far."""
    seconds = 0.0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds
