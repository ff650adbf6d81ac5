"""Reduced logits: the stored values, and training from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teach_once.configs.load import ConfigError
from teach_once.configs.schema import LossTerm, StudentConfig, TeacherConfig
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.precompute.verify import compare_records
from teach_once.runtime.errors import UserError
from teach_once.store import CacheDamaged, TapSpec, TeacherCache
from teach_once.store.format.journal import JournalWriter
from teach_once.store.format.spec import SUFFIXES, cut_rows, expanded_rows, with_checksum
from teach_once.store.identity import identity_sha256, is_tap_name
from teach_once.store.move.hdf5 import export_cache, import_cache
from teach_once.store.read.mapped import MappedRows
from teach_once.train.outputs.cached_teacher import CachedTeacher, Expansion, WindowedTeacher
from teach_once.train.runs.check_methods import check_all_logits
from teach_once.train.runs.study import open_study
from teach_once.train.sessions.student import train_student
from tests.support.caches.teacher_cache import CPU, make_cache, setup_of

CUT = "taps.logits={top_k: 3}"
Make = Callable[..., TeacherConfig]


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def restored(values: np.ndarray, k: int) -> np.ndarray:
    cut = cut_rows(values, k)
    return expanded_rows(cut[""], cut[".class"], cut[".rest"], values.shape[1])


@given(
    seed=st.integers(0, 2**32 - 1),
    num_classes=st.integers(2, 40),
    scale=st.floats(0.01, 30),
    data=st.data(),
)
def test_kept_probabilities_and_the_sum_of_the_others_are_right_at_temperature_1(
    seed: int, num_classes: int, scale: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, num_classes - 1))
    logits = np.random.default_rng(seed).normal(0, scale, (6, num_classes)).astype(np.float32)
    ours, theirs = softmax(restored(logits, k)), softmax(logits)
    largest = np.argsort(-logits, axis=1)[:, :k]
    kept = np.take_along_axis(ours, largest, 1), np.take_along_axis(theirs, largest, 1)
    rounding = 2.0**-10 * (np.abs(logits).max() + 1) * 2  # of two float16 logits
    assert np.allclose(*kept, rtol=rounding, atol=1e-12)
    rest = 1 - kept[0].sum(axis=1), 1 - kept[1].sum(axis=1)
    assert np.allclose(*rest, rtol=rounding, atol=rounding * 0.3)


def test_the_bytes_of_a_record_are_pinned() -> None:
    cut = cut_rows(np.array([[1.5, -2.0, 4.0, 0.0, 4.0]], dtype=np.float32), 2)
    assert cut[".class"].tolist() == [[2, 4]]  # equal values by their class
    assert cut[""].tobytes().hex() == "00440044"
    assert cut[".rest"].tolist() == [np.float16(np.log(np.exp([1.5, -2.0, 0.0]).sum()))]
    assert {name: part.dtype.name for name, part in cut.items()} == {
        "": "float16",
        ".class": "uint16",
        ".rest": "float16",
    }


def test_a_record_of_resnet34_takes_1_1_kilobytes() -> None:
    stages = [TapSpec((c,), "uint8", "block") for c in (64, 128, 256, 512)]
    logits = TapSpec((1000,), "float16", top=32)
    record = [logits, *stages, TapSpec((), "uint8")]
    assert sum(spec.bytes_per_record for spec in record) == 1091


def test_taps_cannot_be_called_as_the_arrays_of_others() -> None:
    assert not any(is_tap_name(f"logits{suffix}") for suffix in SUFFIXES)


@pytest.fixture
def cut(small_teacher: Make, tmp_path: Path) -> TeacherCache:
    return make_cache(small_teacher(CUT), tmp_path)


def test_a_cache_holds_the_cut_logits_of_the_full_one(
    cut: TeacherCache, small_teacher: Make, tmp_path: Path
) -> None:
    full = make_cache(small_teacher("taps.logits=float32"), tmp_path / "full")
    assert cut.path.name != full.path.name
    for view in range(cut.num_views):
        ours, theirs = cut.read_view(view), full.read_view(view)
        assert (ours["correct"] == theirs["correct"]).all()
        assert np.array_equal(ours["logits"], restored(theirs["logits"], 3))
        assert np.array_equal(cut.read([5, 2], view)["logits"], ours["logits"][[5, 2]])
        rows = MappedRows(cut, ["logits"]).read(view, np.array([5, 2]))["logits"]
        assert np.array_equal(rows, ours["logits"][[5, 2]])


def test_export_and_import_keep_every_byte(cut: TeacherCache, tmp_path: Path) -> None:
    export_cache(cut.path, tmp_path / "cut.h5")
    back = TeacherCache.open(import_cache(tmp_path / "cut.h5", tmp_path / "back"))
    assert back.faults() == TeacherCache.open(tmp_path / "cut.h5").faults() == []
    for file in (cut.path / "teacher.zarr").rglob("c.*"):
        assert (back.path / file.relative_to(cut.path)).read_bytes() == file.read_bytes()
    view = TeacherCache.open(tmp_path / "cut.h5").read_view(1)["logits"]
    assert np.array_equal(view, cut.read_view(1)["logits"])


@pytest.mark.parametrize("location", ["device", "host", "window"])
def test_a_batch_is_expanded_on_the_device_and_never_a_view(
    cut: TeacherCache, small_teacher: Make, location: str
) -> None:
    taps = ["logits", "correct"]
    placement: CachedTeacher | WindowedTeacher
    if location == "window":
        placement = WindowedTeacher(cut, taps, CPU, cut.manifest.block_rows)
    else:
        placement = CachedTeacher(cut, taps, CPU, location)  # type: ignore[arg-type]
    order = np.arange(cut.num_samples)
    placement.start_epoch(0, order)
    pixels = TeacherPass(setup_of(small_teacher(CUT), cut.path.parent), PassOptions(CPU)).pixels
    for batch in pixels.batches([0], order, 16):
        found = placement.rows(batch)
        expected = cut.read(batch.host_ids.numpy(), 0, taps)
        assert set(found) == set(taps)
        assert np.allclose(found["logits"].numpy(), expected["logits"], rtol=0, atol=1e-6)
        assert (found["correct"].numpy() == expected["correct"]).all()
    placement.close()


def test_what_is_not_cut_is_left_as_it_is(small_teacher: Make, tmp_path: Path) -> None:
    cache = make_cache(small_teacher(), tmp_path)
    rows = {"logits": torch.ones(2, 10)}
    assert Expansion(cache)(rows) is rows


def test_students_learn_from_it_and_lskd_is_refused(
    cut: TeacherCache,
    small_teacher: Make,
    small_student: Callable[..., StudentConfig],
    tmp_path: Path,
) -> None:
    study = open_study(
        small_student(), small_teacher(CUT), caches_dir=cut.path.parent, runs_dir=tmp_path / "r"
    )
    summary = train_student(study.run("kd", 0), device="cpu")
    assert summary["is_taught"]
    with pytest.raises(UserError, match=r"methods\.lskd: lskd divides by (.|\n)*the 3 largest"):
        train_student(study.run("lskd", 0), device="cpu")


@pytest.mark.parametrize("module", ["train.losses", "teach_once.train.losses"])
def test_lskd_under_its_full_name_is_refused_too(module: str) -> None:
    terms = [LossTerm(loss=f"{module}:lskd")]
    with pytest.raises(UserError, match=r"methods\.mine: lskd divides by (.|\n)*the 3 largest"):
        check_all_logits("mine", terms, 3)
    check_all_logits("mine", terms, None)
    check_all_logits("mine", [LossTerm(loss=f"{module}:kd")], 3)


def test_verification_finds_it_sound_and_another_teacher_not(
    cut: TeacherCache, small_teacher: Make
) -> None:
    setup = setup_of(small_teacher(CUT), cut.path.parent)
    teacher_pass = TeacherPass(setup, PassOptions(CPU))
    results = {r.tap: r for r in compare_records(setup, cut, teacher_pass, 200, 0)}
    assert not any(result.num_wrong for result in results.values())
    with torch.no_grad():
        teacher_pass.teacher.network.fc.bias[0] += 0.3
    results = {r.tap: r for r in compare_records(setup, cut, teacher_pass, 200, 0)}
    assert results["logits"].num_wrong


@pytest.mark.parametrize("top", [10, 11, 65_535])
def test_as_many_as_there_are_classes_is_refused(
    small_teacher: Make, tmp_path: Path, top: int
) -> None:
    with pytest.raises(
        ConfigError, match=f"taps.logits.top_k is {top}, but .* number of classes \\(10\\)"
    ):
        make_cache(small_teacher(f"taps.logits={{top_k: {top}}}"), tmp_path)


def test_a_class_that_is_none_is_damage_whatever_its_checksum_says(
    cut: TeacherCache,
) -> None:
    (file,) = (cut.path / "teacher.zarr/logits.class").glob("c.0.0.0")
    values = np.frombuffer(file.read_bytes()[:-4], np.uint16).copy()
    values[0] = 10
    data = with_checksum(values)
    file.write_bytes(data.tobytes())
    block = cut.manifest.block(0, 0)
    journal = JournalWriter(cut.path, identity_sha256(cut.identity), 7)
    journal.commit(block, {"logits.class": int.from_bytes(data[-4:].tobytes(), "little")})
    journal.close()
    with pytest.raises(CacheDamaged, match="holds the class 10, expected 0 to 9"):
        TeacherCache.open(cut.path).read_view(0, ["logits"])
