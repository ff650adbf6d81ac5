"""The torch Dataset gives the trainer's data to any loop, worker, rank and epoch."""

from __future__ import annotations

import copy
import multiprocessing
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler

from teach_once.configs.load import load_student, to_yaml
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.runtime.errors import UserError
from teach_once.runtime.machine.urls import BadUrl, path_or_url
from teach_once.store import (
    CacheDamaged,
    CacheError,
    CacheMismatch,
    CacheMissing,
    TeacherCache,
    UnknownView,
)
from teach_once.store.move.copy import copy_cache
from teach_once.train import losses
from teach_once.train.dataset import DistillationDataset, EvaluationDataset, RunOrder
from teach_once.train.outputs.cached_teacher import CachedTeacher
from teach_once.train.runs.study import Study, open_study
from teach_once.views.augment.parameters import view_of_epoch
from teach_once.views.datasets import DatasetError
from teach_once.views.seeds import permutation
from tests.support.caches.damage import flip
from tests.support.caches.object_store import Server
from tests.support.caches.teacher_cache import CPU, make_cache
from tests.support.datasets.photograph_study import PLAIN, configs_of, study_of

MIXED = {**PLAIN, "flip": True, "mix": {"type": "mixup"}, "random_erasing": {"probability": 0.5}}


@pytest.fixture(scope="module")
def digits(
    small_teacher: Callable, small_student: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Study:
    """60 digits in blocks of 16, three views; for reading only."""
    folder, config = tmp_path_factory.mktemp("digits"), small_teacher()
    make_cache(config, folder / "caches")
    folders = {"caches_dir": folder / "caches", "runs_dir": folder / "runs"}
    return open_study(small_student(), config, **folders)


@pytest.fixture
def make_photographs(photographs: Path, tmp_path: Path) -> Callable[[dict[str, Any]], Study]:
    """20 images of different sizes, cut by Pillow, three views."""

    def make(augment: dict[str, Any]) -> Study:
        network = build("resnet8", num_classes=2, seed=1)
        save_atomically(network.state_dict(), tmp_path / "teacher.pt")
        images = shutil.copytree(photographs, tmp_path / "photographs")
        configs = configs_of(images, tmp_path / "teacher.pt", augment)
        return study_of(*configs, tmp_path, num_workers=0)

    return make


def dataset_of(study: Study, taps: list[str] | None = None, **options: Any) -> DistillationDataset:
    return DistillationDataset(study.teacher, study.cache, taps, **options)


def as_trained_on(study: Study, epoch: int, taps: list[str]) -> Iterator[tuple[Any, dict]]:
    """The batches of a run: pixels and the feed's rows, in the order of seed 0."""
    placement = CachedTeacher(study.cache, taps, CPU)
    order = permutation(0, epoch, study.cache.num_samples)
    view = view_of_epoch(epoch, study.num_views)
    placement.start_epoch(view, order)
    try:
        for batch in study.pixels(CPU, 0).train.batches([view], order, 7):
            yield batch, placement.rows(batch)
    finally:
        placement.close()


def assert_equal_to_a_run(study: Study, loader: DataLoader, dataset: DistillationDataset) -> None:
    """Over more epochs than there are views, so that the first view comes again."""
    for epoch in range(1, study.num_views + 2):
        dataset.set_epoch(epoch)
        count = 0
        ours = as_trained_on(study, epoch, list(dataset.taps))
        for (inputs, labels, rows), (batch, expected) in zip(loader, ours, strict=True):
            assert inputs.dtype == torch.float32
            assert torch.equal(inputs, batch.inputs)
            assert torch.equal(labels, batch.labels)
            assert rows.keys() == expected.keys()
            for tap, values in rows.items():
                assert values.dtype == expected[tap].dtype
                assert torch.equal(values, expected[tap]), tap
            count += len(labels)
        assert count == len(dataset)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_digits_come_bit_for_bit_as_a_run_gets_them(digits: Study, num_workers: int) -> None:
    dataset = dataset_of(digits)
    assert dataset.taps == tuple(digits.cache.taps)
    loader = DataLoader(
        dataset,
        7,
        sampler=RunOrder(dataset, seed=0),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    assert_equal_to_a_run(digits, loader, dataset)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_photographs_come_bit_for_bit_as_a_run_gets_them(
    make_photographs: Callable[..., Study], num_workers: int
) -> None:
    study = make_photographs(PLAIN)
    dataset = dataset_of(study, ["stage2", "logits"])
    loader = DataLoader(
        dataset, 7, sampler=RunOrder(dataset, seed=0), num_workers=num_workers, prefetch_factor=None
    )
    assert_equal_to_a_run(study, loader, dataset)


def test_rows_that_are_stored_as_codes_come_as_a_run_gets_them(
    make_study: Callable[..., Study],
) -> None:
    study = make_study(["taps.logits=uint8", "taps.channel_means=uint8"])
    dataset = dataset_of(study, ["logits", "stage1", "correct"])
    loader = DataLoader(dataset, 7, sampler=RunOrder(dataset, seed=0))
    assert_equal_to_a_run(study, loader, dataset)


def test_the_label_of_a_mixed_image_is_the_share_of_each_class(
    make_photographs: Callable[..., Study],
) -> None:
    study = make_photographs(MIXED)
    dataset = dataset_of(study, ["logits"])
    dataset.set_epoch(2)
    loader = DataLoader(dataset, 7, sampler=RunOrder(dataset, seed=0))
    logits = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    for (inputs, labels, rows), (batch, expected) in zip(
        loader, as_trained_on(study, 2, ["logits"]), strict=True
    ):
        assert torch.equal(inputs, batch.inputs)
        assert torch.equal(rows["logits"], expected["logits"])
        assert labels.shape == (len(inputs), 2)
        ours = losses.ce(
            logits[: len(inputs)], batch.labels, batch.other_labels, batch.other_shares
        )
        torch.testing.assert_close(F.cross_entropy(logits[: len(inputs)], labels), ours)
        assert ((labels > 0) & (labels < 1)).any()


def test_a_student_chooses_the_number_of_views(
    digits: Study, small_student: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "teacher.yaml"
    path.write_text(to_yaml(digits.teacher))
    (tmp_path / "student.yaml").write_text(
        to_yaml(small_student("num_views=2")).replace("digits-resnet20", str(path))
    )
    student = load_student(tmp_path / "student.yaml")
    dataset = DistillationDataset(student, digits.cache.path, ["logits"])
    views = []
    for epoch in (1, 2, 3):
        dataset.set_epoch(epoch)
        views.append(dataset.view)
        expected = digits.cache.read([5], dataset.view, ["logits"])["logits"][0]
        assert (dataset[5][2]["logits"].numpy() == expected).all()
    assert views == [0, 1, 0]


def rows_of_all(loader: DataLoader) -> torch.Tensor:
    return torch.cat([rows["logits"] for _, _, rows in loader])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_epoch_reaches_persistent_workers_however_they_are_started(
    digits: Study, method: str
) -> None:
    dataset = dataset_of(digits, ["logits"])
    loader = DataLoader(
        dataset, 16, num_workers=1, persistent_workers=True, multiprocessing_context=method
    )
    for epoch in (1, 3, 2):
        dataset.set_epoch(epoch)
        expected = digits.cache.read_view(epoch - 1, ["logits"])["logits"]
        assert (rows_of_all(loader).numpy() == expected).all(), epoch
    # An epoch that is given up leaves prepared batches behind, which the next one must not show.
    next(iter(loader))
    dataset.set_epoch(1)
    expected = digits.cache.read_view(0, ["logits"])["logits"]
    assert (rows_of_all(loader).numpy() == expected).all()


def test_the_ranks_of_a_distributed_sampler_share_an_epoch(digits: Study) -> None:
    dataset = dataset_of(digits, ["logits"])
    dataset.set_epoch(2)
    expected = digits.cache.read_view(1, ["logits"])["logits"]
    seen: list[int] = []
    for rank in range(2):
        sampler: DistributedSampler = DistributedSampler(dataset, num_replicas=2, rank=rank)
        sampler.set_epoch(2)
        ids = list(sampler)
        rows = rows_of_all(DataLoader(dataset, 16, sampler=sampler, num_workers=1))
        assert (rows.numpy() == expected[ids]).all()
        seen += ids
    assert sorted(seen) == list(range(60))


def test_a_dataset_may_be_forked_after_it_was_read(digits: Study) -> None:
    dataset = dataset_of(digits, ["logits"])
    dataset.set_epoch(1)
    _ = dataset[0]
    dataset.set_epoch(2)

    def is_right() -> bool:
        row = dataset[7][2]["logits"].numpy()
        return bool((row == digits.cache.read([7], 1, ["logits"])["logits"][0]).all())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside other threads
        child = multiprocessing.get_context("fork").Process(
            target=lambda: exit(0 if is_right() else 1)
        )
        child.start()
    child.join()
    assert child.exitcode == 0


def test_it_is_a_sequence(digits: Study) -> None:
    dataset = dataset_of(digits, ["correct"])
    dataset.set_epoch(1)
    assert len(dataset) == 60
    assert [int(label) for _, label, _ in dataset] == dataset.labels.tolist()
    assert torch.equal(dataset[-1][0], dataset[59][0])
    assert dataset[0][0].shape == (1, 8, 8)
    with pytest.raises(IndexError, match="no sample 60"):
        dataset[60]


def test_a_slice_gives_its_items_and_other_indices_are_refused(digits: Study) -> None:
    dataset = dataset_of(digits, ["correct"])
    dataset.set_epoch(1)
    for each, name in ((dataset, "train"), (EvaluationDataset(digits.teacher), "test")):
        items = each[-3::2]
        expected = [each[len(each) - 3], each[len(each) - 1]]
        assert [int(item[1]) for item in items] == [int(item[1]) for item in expected], name
        assert torch.equal(items[1][0], expected[1][0])
        assert each[5:5] == []
        assert int(each[np.int64(2)][1]) == int(each[2][1])
        with pytest.raises(UserError, match=r"an integer or a slice, not list\n  fix: .*Subset"):
            each[[0, 1]]


def test_images_to_test_on_are_shown_as_a_run_shows_them(
    make_photographs: Callable[..., Study],
) -> None:
    study = make_photographs(PLAIN)
    dataset = EvaluationDataset(study.teacher)
    (batch,) = study.pixels(CPU, 0).test.batches([0], np.arange(len(dataset)), 100)
    for each in (dataset, copy.deepcopy(dataset)):  # by its state, as for a spawned worker
        ((inputs, labels),) = DataLoader(each, 100)
        assert torch.equal(inputs, batch.inputs)
        assert torch.equal(labels, batch.labels)
    with pytest.raises(UserError, match=r"fix: set dataset\.validation_fraction"):
        EvaluationDataset(study.teacher, "validation")


# ---- in a bucket


class _Environment:
    """As a pickle, it gives this process's environment to the process that loads it."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[dict[str, str]]]:
        return _set_environment, (dict(os.environ),)


def _set_environment(values: dict[str, str]) -> None:
    os.environ.update(values)


class InThisEnvironment(torch.utils.data.Dataset):
    """The dataset for workers that fork from a process which began in another environment."""

    def __init__(self, dataset: DistillationDataset) -> None:
        self._environment = _Environment()  # comes first, also where this is loaded
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: list[int]) -> Any:
        return self._dataset.__getitems__(indices)


# Like spawn, forkserver hands the dataset over as a pickle, but imports torch only once.
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_cache_in_a_bucket_is_read_through_the_mirror_also_by_workers(
    digits: Study, server: Server, tmp_path: Path, method: str
) -> None:
    (where, _), mirror = copy_cache(digits.cache, path_or_url("s3://bucket/caches")), tmp_path / "m"
    for named in ("s3://bucket/caches", str(where)):
        dataset = DistillationDataset(digits.teacher, named, ["logits"], mirror=mirror)
        loader = DataLoader(
            InThisEnvironment(dataset), 16, num_workers=1, multiprocessing_context=method
        )
        dataset.set_epoch(2)
        expected = digits.cache.read_view(1, ["logits"])["logits"]
        assert (rows_of_all(loader).numpy() == expected).all()
        fetched = sorted(mirror.rglob("logits/c.1.*"))
        assert len(fetched) == digits.cache.manifest.blocks_per_view
        fetched[0].unlink()  # as another process does that needs room
        if method == "fork":  # in which no client of a store works
            with pytest.raises(CacheError, match="in a process forked from one that reads it"):
                rows_of_all(loader)
        else:
            assert (rows_of_all(loader).numpy() == expected).all()
            assert fetched[0].is_file()


def test_a_url_that_is_none_is_refused(digits: Study) -> None:
    with pytest.raises(BadUrl, match=r"invalid URL: expected s3://bucket/prefix"):
        DistillationDataset(digits.teacher, "gs://bucket/caches")


# ---- mistakes


def test_a_view_is_verified_before_its_rows_are_read(make_study: Callable[..., Study]) -> None:
    study = make_study()
    dataset = dataset_of(study, ["logits", "stage1"])
    path = study.cache.path / "teacher.zarr"
    flip(path / "stage2" / "c.1.0.0", 9)  # not asked for
    dataset.set_epoch(2)
    flip(path / "stage1" / "c.2.1.0", 9)
    dataset.set_epoch(1)
    with pytest.raises(CacheDamaged, match="tap stage1, view 2, block 1, wrong checksum"):
        dataset.set_epoch(3)
    assert dataset.view == 0  # still the one that was verified


def test_epochs_are_set_first_and_counted_from_where_it_was_said(digits: Study) -> None:
    dataset = dataset_of(digits, ["logits"])
    with pytest.raises(UserError, match=r"no epoch is set.*\n  fix: call dataset.set_epoch"):
        dataset[0]
    loader = DataLoader(dataset, 16, num_workers=1)
    with pytest.raises(UserError, match="no epoch is set") as caught:
        next(iter(loader))
    assert "fix: call dataset.set_epoch" in str(caught.value)
    with pytest.raises(UserError, match=r"first epoch is 1\n  fix: .*first_epoch=0"):
        dataset.set_epoch(0)
    from_zero = dataset_of(digits, ["logits"], first_epoch=0)
    from_zero.set_epoch(0)
    assert (from_zero.epoch, from_zero.view) == (1, 0)
    with pytest.raises(UserError, match="first epoch is 0"):
        from_zero.set_epoch(-1)


def test_the_folder_of_caches_is_enough(digits: Study) -> None:
    dataset = DistillationDataset(digits.teacher, digits.cache.path.parent, ["logits"])
    assert dataset.taps == ("logits",)


def test_a_cache_that_is_missing_or_of_another_dataset_is_refused_with_the_command(
    digits: Study, small_teacher: Callable, tmp_path: Path
) -> None:
    other = small_teacher("dataset.max_per_class=5")
    with pytest.raises(CacheMismatch, match=r"dataset\.digest.*(\n.*)*\n  fix: make cache-t"):
        DistillationDataset(other, digits.cache, ["logits"])
    with pytest.raises(CacheMismatch, match=r"views\.seed"):
        DistillationDataset(small_teacher("views.seed=3"), digits.cache, ["logits"])
    for path in (tmp_path / "caches", tmp_path / "caches" / "digits-resnet20-01234567"):
        with pytest.raises(CacheMissing, match=rf"\n  fix: make .* CACHES={tmp_path}/caches "):
            DistillationDataset(digits.teacher, path, ["logits"])


def test_taps_that_a_cache_lacks_are_named_with_what_would_add_them(
    digits: Study, small_teacher: Callable
) -> None:
    with pytest.raises(UserError, match=r"no tap 'attention1'.*\n  fix: .*taps\.attention=float16"):
        dataset_of(digits, ["attention1"])
    with pytest.raises(UserError, match=r"no tap 'stage9': .* has logits.*\n  fix: pass taps="):
        dataset_of(digits, ["stage9"])
    with pytest.raises(
        UserError, match=r"no tap 'logit': .*did you mean 'logits'.*\n  fix: pass taps="
    ):
        dataset_of(digits, ["logit"])
    with pytest.raises(UserError, match=r"fix: pass taps=\['logits'\]"):
        DistillationDataset(digits.teacher, digits.cache, "logits")
    with pytest.raises(UnknownView, match=r"\n  fix: .*views\.count=4"):
        DistillationDataset(small_teacher("views.count=4"), digits.cache.path, ["logits"])


def test_a_config_by_its_name_is_told_how_to_be_loaded(digits: Study) -> None:
    with pytest.raises(
        UserError, match=r"config is str.*\n  fix: from teach_once.configs.load import"
    ):
        DistillationDataset("digits-resnet20", digits.cache, ["logits"])  # type: ignore[arg-type]


def test_an_image_that_has_changed_is_refused(make_photographs: Callable[..., Study]) -> None:
    study = make_photographs(PLAIN)
    dataset = dataset_of(study, ["logits"])
    dataset.set_epoch(1)
    file = Path(study.dataset.train.name_of(3))
    file.write_bytes(Path(study.dataset.train.name_of(4)).read_bytes())
    loader = DataLoader(dataset, 5, num_workers=1)
    with pytest.raises(DatasetError, match=f"{file.name} has changed since the cache was filled"):
        list(loader)


def test_a_cache_file_that_is_cut_short_is_named(make_study: Callable[..., Study]) -> None:
    study = make_study()
    dataset = dataset_of(study, ["logits"])
    dataset.set_epoch(1)
    file = study.cache.path / "teacher.zarr" / "logits" / "c.0.2.0"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CacheDamaged, match=r"logits, view 0, block 2, chunk has .* bytes"):
        dataset[40]


def test_an_opened_cache_is_not_needed(digits: Study) -> None:
    path = str(TeacherCache.open(digits.cache.path).path)
    assert len(DistillationDataset(digits.teacher, path)) == 60
