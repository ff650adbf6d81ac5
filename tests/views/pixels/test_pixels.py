"""Resident and streamed pixels, with any number of workers, equal the definition of a view."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from teach_once.configs.schema import (
    AugmentConfig,
    CenterCrop,
    ColorJitter,
    ImageFolder,
    Mix,
    PadCropFlip,
    RandomErasing,
    RandomResizedCrop,
    TrivialAugment,
    ViewsConfig,
)
from teach_once.runtime.machine.resources import Share, sharing_machine
from teach_once.views.augment.augment import view_pixels
from teach_once.views.augment.parameters import view_parameters
from teach_once.views.datasets import DatasetError, load_dataset
from teach_once.views.pixels import resident as pixels_module
from teach_once.views.pixels import streaming
from teach_once.views.pixels.batches import Pixels, normalize
from teach_once.views.pixels.resident import (
    ResidentPixels,
    VerifiedPixels,
    calibration_batches,
    evaluation_pixels,
    open_pixels,
)
from teach_once.views.pixels.streaming import StreamedPixels
from teach_once.views.splits import array_split, changed_samples
from tests.support.caches.teacher_cache import CPU
from tests.support.datasets.image_folders import write_image_folder
from tests.support.datasets.streamed_pixels import CROP, RGB, split_of, streamed_pixels
from tests.support.project import ROOT

ERASING, JITTER = RandomErasing(probability=0.5), ColorJitter(brightness=0.4, hue=0.1)


def all_batches(
    pixels: Pixels, numbers: list[int], ids: np.ndarray, batch_size: int = 7
) -> dict[int, torch.Tensor]:
    found: dict[int, list[torch.Tensor]] = {view: [] for view in numbers}
    for batch in pixels.batches(numbers, ids, batch_size):
        assert (
            batch.ids.numpy() == ids[sum(map(len, found[batch.view])) :][: len(batch.ids)]
        ).all()
        found[batch.view].append(batch.inputs.clone())
    return {view: torch.cat(parts) for view, parts in found.items()}


AUGMENTS: list[AugmentConfig] = [
    CROP,
    RandomResizedCrop(
        size_px=10, random_erasing=ERASING, color_jitter=JITTER, trivial_augment=TrivialAugment()
    ),
    RandomResizedCrop(size_px=10, mix=Mix(type="cutmix"), random_erasing=ERASING),
    RandomResizedCrop(size_px=10, mix=Mix(type="mixup", alpha=0.4)),
    CenterCrop(resize_px=12, crop_px=10, flip=True),
]


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_views_are_the_defined_ones(
    augment: AugmentConfig, num_workers: int, photographs: Path, monkeypatch
) -> None:
    monkeypatch.setattr(streaming, "PART_BYTES", 4 * 10 * 10 * 3)  # several parts per batch
    monkeypatch.setattr(streaming, "WINDOW_SAMPLES", 7)  # and several windows
    split, views = split_of(photographs), ViewsConfig(augment=augment, seed=3, count=2)
    streamed = streamed_pixels(split, views, num_workers)
    ids = np.array([3, 19, 0, 7, 8, 4, 11, 12, 5, 6, 1])
    for view, inputs in all_batches(streamed, [0, 1], ids).items():
        expected = normalize(torch.from_numpy(view_pixels(split, views, view, ids)), RGB)
        assert torch.equal(inputs, expected)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_eight_workers_give_the_same_pixels_epoch_after_epoch_and_after_a_fresh_start(
    photographs: Path,
) -> None:
    split, views = split_of(photographs), ViewsConfig(augment=CROP, seed=1)
    many, none, again = (streamed_pixels(split, views, count) for count in (8, 0, 2))
    for view in (0, 1, 2):
        ids = np.random.default_rng(view).permutation(20)
        assert torch.equal(
            all_batches(many, [view], ids)[view], all_batches(none, [view], ids)[view]
        )
    # A resumed run begins in the middle: the same pixels, without the epochs before.
    assert torch.equal(all_batches(again, [2], ids)[2], all_batches(none, [2], ids)[2])


def test_an_abandoned_epoch_leaves_nothing_behind(photographs: Path) -> None:
    split, views = split_of(photographs), ViewsConfig(augment=CROP, seed=1)
    pixels = streamed_pixels(split, views, 2)
    next(pixels.batches([0], np.arange(20), 3))
    found = all_batches(pixels, [1], np.arange(20))[1]
    expected = view_pixels(split, views, 1, np.arange(20))
    assert torch.equal(found, normalize(torch.from_numpy(expected), RGB))


@pytest.mark.parametrize(
    "augment",
    [
        PadCropFlip(pad_px=2),
        PadCropFlip(pad_px=2, padding="zero", random_erasing=ERASING, mix=Mix(type="mixup")),
        CenterCrop(flip=True),
    ],
)
def test_resident_and_streamed_views_are_the_same(augment: AugmentConfig, tmp_path: Path) -> None:
    split = split_of(write_image_folder(tmp_path / "data", per_class=6))
    views = ViewsConfig(augment=augment, seed=2, count=2)
    resident = open_pixels(split, views, RGB, CPU)
    assert isinstance(resident, ResidentPixels)
    ids = np.array([5, 2, 11, 0])
    streamed = all_batches(streamed_pixels(split, views, 0), [0, 1], ids)
    for view, inputs in all_batches(resident, [0, 1], ids).items():
        assert torch.equal(inputs, streamed[view])
        expected = normalize(torch.from_numpy(view_pixels(split, views, view, ids)), RGB)
        assert torch.equal(inputs, expected)


def test_images_that_do_not_fit_are_streamed(tmp_path: Path, monkeypatch) -> None:
    split = split_of(write_image_folder(tmp_path / "data"))
    views = ViewsConfig(augment=PadCropFlip(pad_px=1), seed=2)
    monkeypatch.setattr(pixels_module, "free_memory", lambda device: 1000)
    streamed = open_pixels(split, views, RGB, CPU, 0)
    assert isinstance(streamed, StreamedPixels)
    expected = view_pixels(split, views, 3, np.arange(6))
    found = all_batches(streamed, [3], np.arange(6))[3]
    assert torch.equal(found, normalize(torch.from_numpy(expected), RGB))


def test_where_images_come_from_is_told(photographs: Path, monkeypatch) -> None:
    split, views = split_of(photographs), ViewsConfig(augment=CROP, seed=1)
    assert streamed_pixels(split, views, 0).where == "read by this process"
    assert streamed_pixels(split, views, 2).where == "read by 2 workers"
    monkeypatch.setattr(streaming, "PART_BYTES", 2**60)  # more than any shared memory
    without = streamed_pixels(split, views, 2)
    assert without.num_workers == 0
    assert "too small" in without.where


def test_workers_are_planned_with_this_processes_share_of_shared_memory(
    photographs: Path, monkeypatch
) -> None:
    split, views = split_of(photographs), ViewsConfig(augment=CROP, seed=1)
    room = os.statvfs("/dev/shm")
    monkeypatch.setattr(streaming, "PART_BYTES", room.f_bavail * room.f_frsize // 16)
    assert streamed_pixels(split, views, 2).num_workers == 2
    with sharing_machine(Share(3, 6)):
        assert streamed_pixels(split, views, 2).num_workers == 0


def test_without_shared_memory_this_process_reads(photographs: Path, monkeypatch) -> None:
    split, views = split_of(photographs), ViewsConfig(augment=CROP, seed=1)
    monkeypatch.setattr(streaming, "_SHARED_MEMORY", "/nowhere")
    for num_workers in (0, 2):
        pixels = streamed_pixels(split, views, num_workers)
        assert len(all_batches(pixels, [0], np.arange(20))[0]) == 20


def test_part_that_does_not_fit_into_shared_memory_is_an_error_not_a_wait(
    photographs: Path, monkeypatch
) -> None:
    def refuse(images: torch.Tensor) -> None:
        raise RuntimeError("No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    pixels = streamed_pixels(split_of(photographs), ViewsConfig(augment=CROP, seed=1), 2)
    with pytest.raises(DatasetError, match=r"/dev/shm has no space .*No space left") as caught:
        all_batches(pixels, [0], np.arange(20))
    assert "fix: use fewer --workers" in str(caught.value)


@contextmanager
def not_waiting_endlessly() -> Iterator[None]:
    """Fail the test after two minutes; otherwise a fault would hang the whole run of tests."""

    def give_up(number: int, frame: object) -> None:
        pytest.fail("waits endlessly")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_part_that_cannot_be_sent_is_an_error_not_a_wait(photographs: Path, monkeypatch) -> None:
    monkeypatch.setattr(streaming._CutViews, "__getitem__", lambda self, key: lambda: "no pickle")
    pixels = streamed_pixels(split_of(photographs), ViewsConfig(augment=CROP, seed=1), 1)
    with (
        not_waiting_endlessly(),
        pytest.raises(DatasetError, match="a worker process that reads images died"),
    ):
        all_batches(pixels, [0], np.arange(20))


def test_killed_worker_is_a_named_error_and_the_next_epoch_has_new_workers(
    photographs: Path, monkeypatch
) -> None:
    monkeypatch.setattr(streaming, "PART_BYTES", 300)  # a sample a part: more than are sent ahead
    others = set(multiprocessing.active_children())
    pixels = streamed_pixels(split_of(photographs), ViewsConfig(augment=CROP, seed=1), 1)
    expected = all_batches(pixels, [0], np.arange(20))[0]
    batches = pixels.batches([0], np.arange(20), 1)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(timeout=300)
    for _ in range(10_000):  # nothing is raised in the middle of other work, such as a step
        pass
    with pytest.raises(
        DatasetError,
        match=r"a worker process that reads images died: .*\n  fix: run the command again",
    ):
        list(batches)
    assert torch.equal(all_batches(pixels, [0], np.arange(20))[0], expected)


def test_mixed_batches_say_whose_share_is_larger(photographs: Path) -> None:
    split = split_of(photographs)
    views = ViewsConfig(augment=RandomResizedCrop(size_px=10, mix=Mix(type="mixup")), seed=3)
    table = view_parameters(views, 0, 20, (10, 10))
    partner, own = table[:, 7], table[:, 8] / 256
    pixels = streamed_pixels(split, views, 0)
    (batch,) = pixels.batches([0], np.arange(20), 20)
    assert batch.other_labels is not None
    assert batch.other_shares is not None
    is_own = own >= 0.5
    labels = split.labels
    assert (batch.labels.numpy() == np.where(is_own, labels, labels[partner])).all()
    assert (batch.other_labels.numpy() == np.where(is_own, labels[partner], labels)).all()
    assert batch.other_shares.numpy() == pytest.approx(np.minimum(own, 1 - own), abs=1e-6)
    assert is_own.any()
    assert not is_own.all()


def test_test_images_of_any_size_are_cut_once_and_kept(photographs: Path, monkeypatch) -> None:
    config = ImageFolder(type="imagefolder", root=str(photographs), normalization=RGB)
    test = load_dataset(config).test
    views = ViewsConfig(augment=RandomResizedCrop(size_px=14), seed=3)
    assert views.eval_transform == CenterCrop(resize_px=16, crop_px=14)
    kept = evaluation_pixels(test, views, RGB, CPU, 2)
    assert isinstance(kept, ResidentPixels)
    shown_config = ViewsConfig(augment=views.eval_transform, count=1)
    expected = normalize(torch.from_numpy(view_pixels(test, shown_config, 0, np.arange(4))), RGB)
    assert torch.equal(all_batches(kept, [0], np.arange(4))[0], expected)


@pytest.mark.parametrize(("samples", "sizes"), [(255, [255]), (257, [256]), (258, [256, 2])])
def test_calibration_has_no_batch_of_one(samples: int, sizes: list[int]) -> None:
    images = np.zeros((samples, 4, 4, 3), dtype=np.uint8)
    split = array_split(images, np.zeros(samples, dtype=np.int64), "blank")
    views = ViewsConfig(augment=CenterCrop(), seed=0, count=1)
    pixels = open_pixels(split, views, RGB, CPU)
    assert [len(batch) for batch in calibration_batches(pixels)] == sizes


def test_calibration_is_view_0_whatever_the_batch(photographs: Path) -> None:
    split, views = split_of(photographs), ViewsConfig(augment=CROP, seed=1)
    (batch,) = calibration_batches(streamed_pixels(split, views, 0))
    expected = normalize(torch.from_numpy(view_pixels(split, views, 0, np.arange(20))), RGB)
    assert torch.equal(batch, expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_file_is_named_from_within_a_worker(num_workers: int, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "data")
    (root / "train" / "dog" / "01.png").write_bytes(b"no image")
    views = ViewsConfig(augment=CROP)
    pixels = streamed_pixels(split_of(root), views, num_workers)
    with pytest.raises(DatasetError, match=r"cannot read the image .*dog/01\.png"):
        all_batches(pixels, [0], np.arange(6))


def test_images_of_other_sizes_are_refused_with_what_to_do(photographs: Path) -> None:
    with pytest.raises(DatasetError, match=r"differ in size(?s:.*)random-resized-crop"):
        open_pixels(split_of(photographs), ViewsConfig(augment=PadCropFlip(pad_px=1)), RGB, CPU)


def test_streaming_warns_of_nothing_and_leaves_the_global_generator_alone(
    photographs: Path,
) -> None:
    split, views = split_of(photographs), ViewsConfig(augment=CROP, seed=1)
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_batches(streamed_pixels(split, views, 2), [0], np.arange(20))
    assert torch.equal(before, torch.random.get_rng_state())


def test_workers_leave_signals_to_their_parent_and_end_with_it(photographs: Path) -> None:
    split, views = split_of(photographs), ViewsConfig(augment=CROP, seed=1)
    others = set(multiprocessing.active_children())  # of other tests, not yet collected
    pixels = streamed_pixels(split, views, 2)
    before = all_batches(pixels, [0], np.arange(20))[0]
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    for signal_name in ("-TERM", "-INT"):  # from another process, as to a whole group
        subprocess.run(["kill", signal_name, *(str(each.pid) for each in workers)], check=True)
    assert torch.equal(all_batches(pixels, [0], np.arange(20))[0], before)
    del pixels
    for worker in workers:
        worker.join(timeout=300)
        assert not worker.is_alive()


READS_UNTIL_TOLD_TO_STOP = """
import sys
from pathlib import Path
import numpy as np
from teach_once.configs.schema import ViewsConfig
from teach_once.runtime.command.signals import StopRequest
from tests.support.datasets.streamed_pixels import CROP, split_of, streamed_pixels

pixels = streamed_pixels(split_of(Path(sys.argv[1])), ViewsConfig(augment=CROP, seed=1), 2)
with StopRequest() as stop:
    while stop.signal_number is None:
        for batch in pixels.batches([0], np.arange(20), 4):
            print("reading", flush=True)
    batches = pixels.batches([0], np.arange(20), 4)  # the workers are alive at the end
    next(batches)
    stop.signal_number = None  # answered
    print("stopped", flush=True)
"""


def test_a_signal_to_the_whole_group_is_the_parents_to_answer(photographs: Path) -> None:
    command = [sys.executable, "-c", READS_UNTIL_TOLD_TO_STOP, str(photographs)]
    with subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        os.killpg(process.pid, signal.SIGTERM)
        told, _ = process.communicate(timeout=300)
    assert told.endswith("stopped\n")
    assert process.returncode == 0


def test_sample_whose_digest_differs_in_its_last_byte_has_changed() -> None:
    images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    split = array_split(images, np.zeros(3, np.int64), "numbers")
    ids, digests = np.arange(3), split.loaded[1].copy()
    digests[1, -1] ^= 1
    ((number, changed),) = changed_samples(split, digests, ids)
    assert (number, changed.tolist()) == (3, [1])
    pixels = open_pixels(split, ViewsConfig(augment=PadCropFlip(pad_px=1)), RGB, CPU)
    verified = VerifiedPixels(pixels, split, digests, "restore it")
    assert len(list(verified.batches([0], ids[2:], 1))) == 1
    with pytest.raises(DatasetError, match="sample 1 of numbers has changed"):
        list(verified.batches([0], ids, 3))
