"""Every reader of an image detects that its bytes differ from the teacher's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorstore
from PIL import Image

from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.command import cli as precompute
from teach_once.precompute.compute import teacher_pass as pass_module
from teach_once.precompute.verify import cli as verify
from teach_once.store import TeacherCache
from teach_once.store.errors import CacheDamaged
from teach_once.store.format.journal import JournalWriter
from teach_once.store.identity import identity_sha256
from teach_once.store.move.hdf5 import export_cache, import_cache
from teach_once.train.cli.commands import cli as train
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.recording.run_writer import RunWriter
from teach_once.views.augment import augment as canary
from teach_once.views.command import cli as views
from teach_once.views.images import folders

TEACHER = """
dataset: {{type: imagefolder, root: {root}/data, normalization: {colors}}}
views: {{augment: {augment}, count: 2}}
teacher: {{arch: resnet8, weights: {root}/teacher.pt}}
"""
STUDENT = """
teacher: {root}/teacher.yaml
student: {{arch: resnet8}}
training: {{epochs: 1, batch_size: 8, learning_rate: 0.1, schedule: {{type: onecycle}}}}
methods: {{kd: [{{loss: ce}}, {{loss: kd}}]}}
"""
RESIDENT = "{type: pad-crop-flip, pad_px: 1}"
COLORS = "{mean: [0, 0, 0], std: [1, 1, 1]}"
STREAMED = "{type: random-resized-crop, size_px: 8}"
CHANGED = "train/dog/03.bmp"  # sample 8 + 3


BOTH = pytest.mark.parametrize(
    "root", [RESIDENT, STREAMED], ids=["resident", "streamed"], indirect=True
)


@pytest.fixture
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two classes of eight images, whose digest and canary look into one file each."""
    monkeypatch.setattr(folders, "HASHED_FILES", 1)
    monkeypatch.setattr(canary, "CANARY_SAMPLES", 1)
    augmentation = getattr(request, "param", RESIDENT)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)
                file = tmp_path / "data" / split / name / f"{number:02d}.bmp"
                Image.fromarray(pixels).save(file)
    save_atomically(build("resnet8", num_classes=2, seed=1).state_dict(), tmp_path / "teacher.pt")
    (tmp_path / "teacher.yaml").write_text(
        TEACHER.format(root=tmp_path, augment=augmentation, colors=COLORS)
    )
    (tmp_path / "student.yaml").write_text(STUDENT.format(root=tmp_path))
    return tmp_path


def make_cache(root: Path, *more: str) -> int:
    options = ["--caches", str(root / "caches"), "--device", "cpu", "--block-rows", "4"]
    return precompute([str(root / "teacher.yaml"), *options, *more])


def cache_of(root: Path) -> Path:
    (path,) = (root / "caches").glob("teacher-*")
    return path


def train_student(root: Path, *more: str) -> int:
    places = ["--caches", str(root / "caches"), "--runs", str(root / "runs")]
    name = str(root / "student.yaml")
    return train(["student", name, "--method", "kd", "--device", "cpu", *places, *more])


def check_samples(root: Path) -> int:
    return verify([str(root / "teacher.yaml"), "--caches", str(root / "caches"), "--check-images"])


def change(root: Path, name: str = CHANGED) -> None:
    """Another image in a file of the same size."""
    file = root / "data" / name
    content = bytearray(file.read_bytes())
    content[100] ^= 255
    file.write_bytes(content)


def expected_digests(root: Path) -> list[list[int]]:
    files = sorted((root / "data" / "train").rglob("*.bmp"))
    found = (hashlib.blake2b(file.read_bytes(), digest_size=16) for file in files)
    return [list(digest.digest()) for digest in found]


def test_a_cache_stores_the_digest_of_each_file(root: Path, tmp_path: Path) -> None:
    expected = expected_digests(root)
    assert make_cache(root) == 0
    path = cache_of(root)
    assert TeacherCache.open(path).sample_digest.tolist() == expected
    spec = {"kvstore": f"file://{path}/teacher.zarr/sample_digest", "driver": "zarr3"}
    raw = tensorstore.open(spec, open=True, read=True).result().read().result()
    assert (raw.dtype, raw.tolist()) == (np.uint8, expected)
    export_cache(path, tmp_path / "cache.h5")
    with h5py.File(tmp_path / "cache.h5") as file:
        assert file["sample_digest"][()].tolist() == expected
    assert TeacherCache.open(tmp_path / "cache.h5").sample_digest.tolist() == expected
    imported = TeacherCache.open(import_cache(tmp_path / "cache.h5", tmp_path / "other"))
    assert imported.sample_digest.tolist() == expected
    assert imported.faults() == []
    assert "sample_digest" not in imported.taps
    assert "sample_digest" not in imported.read_view(0)


@BOTH
def test_training_refuses_an_image_that_has_changed_and_names_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_cache(root) == 0
    before = (root / "data" / CHANGED).read_bytes()
    change(root)
    assert make_cache(root) == 0  # the digest has not seen it
    for more in ([], ["--workers", "2"], ["--live-teacher"]):
        assert train_student(root, *more) == 2
        told = capsys.readouterr().err
        assert f"{root}/data/{CHANGED} has changed since the cache was filled" in told
        assert f"rm -r {cache_of(root)}" in told
    (root / "data" / CHANGED).write_bytes(before)
    assert train_student(root) == 0


@pytest.mark.parametrize("root", [STREAMED], indirect=True)
@pytest.mark.parametrize("workers", [0, 2])
def test_training_refuses_an_image_that_changes_after_the_first_epoch(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    assert make_cache(root) == 0
    save_epoch, epochs = RunWriter.save_epoch, list[int]()

    def change_after(writer: RunWriter, result: EpochResult) -> None:
        save_epoch(writer, result)
        epochs.append(result.epoch)
        if result.epoch == 1:
            change(root)

    monkeypatch.setattr(RunWriter, "save_epoch", change_after)
    assert train_student(root, "--workers", str(workers), "training.epochs=4") == 2
    assert (
        f"{root}/data/{CHANGED} has changed since the cache was filled" in capsys.readouterr().err
    )
    assert max(epochs) < 4


def test_every_sample_can_be_compared_without_the_teacher(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_cache(root) == 0
    monkeypatch.delattr(pass_module, "TeacherPass")
    assert check_samples(root) == 0
    assert "all 16 samples are unchanged" in capsys.readouterr().out
    change(root)
    change(root, "train/cat/05.bmp")
    assert check_samples(root) == 1
    told = capsys.readouterr().out
    assert f"sample 5, {root}/data/train/cat/05.bmp: changed since" in told
    assert f"sample 11, {root}/data/{CHANGED}: changed since" in told
    assert "2 of 16 samples have changed" in told


def test_a_cache_is_not_continued_with_other_images(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_cache(root) == 0
    before = (root / "data" / CHANGED).read_bytes()
    change(root)
    for more in ("taps.attention=float16", "views.count=3"):
        assert make_cache(root, more) == 2
        told = capsys.readouterr().err
        assert f"1 sample changed since {cache_of(root)} was started" in told
        assert f"{root}/data/{CHANGED}" in told
    (root / "data" / CHANGED).write_bytes(before)
    assert make_cache(root, "views.count=3", "taps.attention=float16") == 0
    assert TeacherCache.open(cache_of(root)).sample_digest.tolist() == expected_digests(root)


@BOTH
def test_checksums_survive_a_stop_and_several_processes(root: Path) -> None:
    assert make_cache(root) == 0
    path = cache_of(root)
    (journal,) = (path / "journal").iterdir()
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]))
    change(root, "train/dog/07.bmp")  # of a block that has been written and not committed
    for rank in ("1", "0"):
        assert make_cache(root, "--job", "one", "--rank", rank, "--world-size", "2") == 0
    assert TeacherCache.open(path).sample_digest.tolist() == expected_digests(root)
    assert TeacherCache.open(path).faults() == []


def test_a_lost_or_damaged_checksum_is_made_again_with_its_block(root: Path) -> None:
    assert make_cache(root) == 0
    path = cache_of(root)
    before = TeacherCache.open(path).read([5], 1)["stage1"]
    (path / "teacher.zarr" / "sample_digest" / "c.1.0").unlink()
    damaged = path / "teacher.zarr" / "sample_digest" / "c.2.0"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    opened = TeacherCache.open(path)
    with pytest.raises(CacheDamaged, match="tap sample_digest, view 0, block 1, chunk missing"):
        opened.sample_digest.tolist()
    change(root, "train/cat/05.bmp")  # of which nothing is known any more
    assert make_cache(root) == 0
    assert (TeacherCache.open(path).read([5], 1)["stage1"] != before).any()
    assert TeacherCache.open(path).faults() == []
    assert TeacherCache.open(path).sample_digest.tolist() == expected_digests(root)


def test_views_that_were_computed_from_different_bytes_at_once_are_damage(root: Path) -> None:
    """As two processes would leave it, had the file changed between their readings."""
    assert make_cache(root) == 0
    path = cache_of(root)
    manifest = TeacherCache.open(path).manifest
    journal = JournalWriter(path, identity_sha256(manifest.identity))
    journal.commit(manifest.block(1, 2), {"sample_digest": 1})
    journal.close()
    with pytest.raises(CacheDamaged, match="block 2, differs between views"):
        _ = TeacherCache.open(path).sample_digest
    assert make_cache(root) == 0
    assert TeacherCache.open(path).sample_digest.tolist() == expected_digests(root)


@pytest.mark.parametrize("kind", [[], ["--encoded"]], ids=["pixels", "encoded"])
def test_a_cache_of_a_folder_serves_its_packed_form(
    root: Path, kind: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_cache(root) == 0
    assert views(["pack", str(root / "teacher.yaml"), str(root / "data.h5"), *kind]) == 0
    config = (root / "teacher.yaml").read_text()
    packed = config.replace(f"imagefolder, root: {root}/data", f"packed, file: {root}/data.h5")
    assert packed != config
    (root / "teacher.yaml").write_text(packed)
    capsys.readouterr()
    assert make_cache(root) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert check_samples(root) == 0
    assert train_student(root) == 0


# ---- another state of the dataset


LAST = "train/dog/07.bmp"


@pytest.mark.parametrize(
    ("gone", "added", "told"),
    [
        (CHANGED, None, "15 samples, were 16; first difference: sample 11, {}/train/dog/04.bmp"),
        (
            "train/cat/02.bmp",
            None,
            "15 samples, were 16; first difference: sample 2, {}/train/cat/03",
        ),
        (LAST, None, "15 samples, were 16; the remaining samples are unchanged"),
        (
            None,
            "train/dog/08.bmp",
            "17 samples, were 16; first difference: sample 16, {}/train/dog/08",
        ),
        (
            LAST,
            "train/cat/x.bmp",
            "16 samples, as before; first difference: sample 8, {}/train/cat/x",
        ),
    ],
)
def test_a_changed_dataset_is_told_by_its_samples(
    root: Path, capsys: pytest.CaptureFixture[str], gone: str, added: str, told: str
) -> None:
    assert make_cache(root) == 0
    if gone:
        (root / "data" / gone).rename(root / "gone.bmp")
    if added:
        (root / "data" / added).write_bytes((root / "data" / "test/cat/00.bmp").read_bytes())
    told = told.format(root / "data")
    for more in ([], ["--cache", str(cache_of(root))]):
        assert train_student(root, *more) == 2
        message = capsys.readouterr().err
        assert told in message
        assert "make cache-teacher" in message
    assert make_cache(root, "--plan") == 0
    message = capsys.readouterr().out
    assert told in message
    assert f"{root}/teacher.yaml --reuse-from {cache_of(root)}" in message


def test_another_image_in_place_is_told_by_its_name(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_cache(root) == 0
    change(root, "train/cat/06.bmp")  # which the digest looks into
    assert train_student(root) == 2
    told = f"16 samples, as before; first difference: sample 6, {root}/data/train/cat/06.bmp"
    assert told in capsys.readouterr().err


@BOTH
def test_unchanged_records_are_carried_over_into_the_new_cache(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_cache(root, "taps.logits=uint8") == 0
    old = TeacherCache.open(cache_of(root))
    (root / "data" / CHANGED).unlink()
    assert make_cache(root, "taps.logits=uint8", "--reuse-from", str(old.path)) == 0
    assert "copied 4 of 8 blocks from" in capsys.readouterr().out
    (path,) = set((root / "caches").glob("teacher-*")) - {old.path}
    carried = TeacherCache.open(path)
    assert carried.faults() == []
    assert carried.sample_digest.tolist() == expected_digests(root)
    (root / "caches").rename(root / "kept")
    assert make_cache(root, "taps.logits=uint8") == 0
    fresh = TeacherCache.open(cache_of(root))
    assert fresh.path.name == path.name
    kept = TeacherCache.open(root / "kept" / path.name)
    for view in (0, 1):
        ours, theirs = kept.read_view(view), fresh.read_view(view)
        assert all((ours[tap] == theirs[tap]).all() for tap in fresh.taps)
    assert train_student(root, "teacher.taps.logits=uint8") == 0


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("views.seed=5", "it differs in dataset.digest, views.seed"),
        ("views.augment.mix={type: cutmix}", "its records depend on all samples"),
        ("teacher.bn=recalibrated", "its records depend on all samples"),
    ],
)
def test_records_that_depend_on_more_than_their_sample_are_not_carried_over(
    root: Path, capsys: pytest.CaptureFixture[str], setting: str, reason: str
) -> None:
    both = [] if "seed" in setting else [setting]
    assert make_cache(root, *both) == 0
    (root / "data" / CHANGED).unlink()
    assert make_cache(root, setting, "--reuse-from", str(cache_of(root))) == 2
    assert reason in capsys.readouterr().err
    assert len(list((root / "caches").glob("teacher-*"))) == 1  # and nothing is begun


def test_a_sample_with_another_label_is_not_carried_over(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_cache(root) == 0
    train_folder = root / "data" / "train"
    (train_folder / "cat" / "07.bmp").rename(train_folder / "dog" / "0.bmp")  # keeps its number
    assert make_cache(root, "--reuse-from", str(cache_of(root))) == 0
    assert "copied 6 of 8 blocks from" in capsys.readouterr().out


def test_a_plan_with_from_says_what_is_copied_and_what_is_left(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_cache(root) == 0
    old = cache_of(root)
    (root / "data" / CHANGED).unlink()
    capsys.readouterr()
    for more in (["--plan"], []):
        assert make_cache(root, "--reuse-from", str(old), *more) == 0
        told = capsys.readouterr().out
        assert f"to copy  16 records from {old}\nto do    14 of 30 records" in told
        assert len(list((root / "caches").glob("teacher-*"))) == (1 if more else 2)
    assert "copied 4 of 8 blocks from" in told
