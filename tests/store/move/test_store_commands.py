"""python -m store and python -m precompute.verify as users call them."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from teach_once.configs.schema import TeacherConfig
from teach_once.nets.networks.zoo import build
from teach_once.precompute.command import cli as precompute
from teach_once.precompute.verify import _compared, _Pair
from teach_once.precompute.verify import cli as verify
from teach_once.store import CacheContent, CacheWriter, TeacherCache
from teach_once.store.command import cli
from teach_once.store.format.manifest import read_manifest, write_manifest
from teach_once.store.format.spec import Block, encode_chunk
from teach_once.store.move.hdf5 import export_cache
from tests.support.caches.damage import flip
from tests.support.caches.teacher_cache import make_cache
from tests.support.programs.pass_commands import arguments_of, overrides_of

Make = Callable[..., TeacherConfig]


@pytest.fixture
def made(small_teacher: Make, tmp_path: Path) -> tuple[TeacherConfig, Path]:
    config = small_teacher()
    return config, make_cache(config, tmp_path / "caches").path


def test_list_shows_complete_unfinished_and_unusable_caches(
    made: tuple[TeacherConfig, Path], small_teacher: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = made
    unfinished = make_cache(small_teacher("views.seed=3"), path.parent).path
    (journal,) = (unfinished / "journal").iterdir()
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:3]))
    broken = make_cache(small_teacher("views.seed=4"), path.parent).path
    flip(broken / "manifest.json", 100)
    export_cache(path, path.parent / "exported.h5")
    assert cli(["list", "--caches", str(path.parent)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines[path.name].split()[1:5] == ["resnet8", "digits", "3", "60"]
    assert lines[path.name].rstrip().endswith("complete")
    assert lines["exported.h5"].rstrip().endswith("complete")
    assert "25.0 % done" in lines[unfinished.name]
    assert "unusable" in lines[broken.name]
    assert cli(["list", "--caches", "nowhere"]) == 0
    assert "contains no cache" in capsys.readouterr().out


def test_info_says_what_the_cache_is(
    made: tuple[TeacherConfig, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = made
    assert cli(["info", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_per_record"] == 245
    assert found["taps"]["stage3"]["bytes"] == 128 * 180
    assert found["complete"] is True
    assert found["measured"]["test_top1_error"] > 0
    assert cli(["info", str(path)]) == 0
    text = capsys.readouterr().out
    assert "teacher.arch: resnet8" in text
    assert "3 views x 60 samples x 245 bytes = 44,100 bytes" in text
    assert cli(["info", str(path.parent)]) == 2
    assert "is not a cache" in capsys.readouterr().err


def test_info_draws_a_picture(made: tuple[TeacherConfig, Path], tmp_path: Path) -> None:
    _, path = made
    assert cli(["info", str(path), "--plot", str(tmp_path / "cache.png")]) == 0
    with Image.open(io.BytesIO((tmp_path / "cache.png").read_bytes())) as picture:
        assert min(picture.size) > 600


def test_check_reads_every_byte(
    made: tuple[TeacherConfig, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = made
    assert cli(["check", str(path)]) == 0
    assert "is valid: " in capsys.readouterr().out
    flip(path / "teacher.zarr" / "stage1" / "c.2.1.0", 5)
    (path / "teacher.zarr" / "logits" / "c.0.0.0").unlink()
    assert cli(["check", str(path)]) == 1
    told = capsys.readouterr().out
    assert "tap stage1, view 2, block 1, wrong checksum" in told
    assert "tap logits, view 0, block 0, chunk missing" in told
    assert f"make cache-teacher TEACHER=digits-resnet20 CACHES={path.parent} FULL_CHECK=1" in told
    assert cli(["check", "nowhere"]) == 2


def test_check_continues_after_an_unsound_cache(
    made: tuple[TeacherConfig, Path], small_teacher: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    _, sound = made
    caches = sound.parent
    flip(make_cache(small_teacher("views.seed=3"), caches).path / "manifest.json", 100)
    torn = make_cache(small_teacher("views.seed=4"), caches).path
    (torn / "teacher.zarr" / "logits" / "c.0.0.0").unlink()
    assert cli(["check", "--caches", str(caches)]) == 1
    told = capsys.readouterr()
    assert f"{sound} is valid" in told.out
    assert f"{torn} is invalid" in told.out
    assert "4 of 6 caches are valid" in told.out  # three of them inside the others
    assert "manifest.json is damaged" in told.err
    assert cli(["check", str(sound), str(torn)]) == 1
    assert cli(["check", "--caches", str(caches / "none")]) == 0


# ---- verify


def test_verify_agrees_with_a_sound_cache(
    made: tuple[TeacherConfig, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = made
    call = ["digits-resnet20", *overrides_of(config.teacher.weights), "--device", "cpu"]
    assert verify([*call, "--caches", str(path.parent)]) == 0
    told = capsys.readouterr().out
    assert "60 labels and the pixel canary agree" in told
    records = TeacherCache.open(path).num_samples * TeacherCache.open(path).num_views
    assert records < 512
    assert f"all {records} records\n" in told
    assert f"valid: {records} records were computed again and agree" in told
    assert verify([*call, "--caches", str(path.parent), "--records", "32"]) == 0
    told = capsys.readouterr().out
    assert "32 random records; to compare the same ones again: --seed " in told
    assert "valid: 32 records were computed again and agree" in told
    export_cache(path, path.parent / "x.h5")
    assert verify([*call, "--cache", str(path.parent / "x.h5")]) == 0


@pytest.mark.parametrize(
    "dtypes",
    [
        ["taps.logits=uint8", "taps.channel_means=uint8"],
        ["taps.logits=float32", "taps.channel_means=float32"],
        ["taps.attention=float16", "taps.hint={stage: stage2}"],
        ["teacher.precision=bfloat16"],
    ],
)
def test_verify_knows_what_each_dtype_rounds(
    small_teacher: Make, tmp_path: Path, dtypes: list[str]
) -> None:
    config = small_teacher(*dtypes)
    make_cache(config, tmp_path, batch_size=7)
    call = ["digits-resnet20", *overrides_of(config.teacher.weights), *dtypes]
    assert verify([*call, "--caches", str(tmp_path), "--device", "cpu"]) == 0


def test_verify_finds_a_changed_train_agreement(
    made: tuple[TeacherConfig, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = made
    measured = TeacherCache.open(path).measured
    other = {**measured, "train_agreement": measured["train_agreement"] - 1 / 180}  # of a record
    write_manifest(path, dataclasses.replace(read_manifest(path), measured=other))
    call = ["digits-resnet20", *overrides_of(config.teacher.weights), "--caches", str(path.parent)]
    assert verify([*call, "--device", "cpu", "--records", "1"]) == 1
    assert "DIFFERS from the teacher's outputs: train_agreement" in capsys.readouterr().out


@pytest.mark.parametrize("tap", ["logits", "stage2", "correct"])
def test_verify_finds_records_that_are_not_the_teachers_though_every_checksum_is_right(
    made: tuple[TeacherConfig, Path], tap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = made
    forge(path, tap)
    assert cli(["check", str(path)]) == 0
    call = ["digits-resnet20", *overrides_of(config.teacher.weights), "--caches", str(path.parent)]
    capsys.readouterr()
    assert verify(call) == 1
    assert f"DIFFERS from the teacher's outputs: {tap}" in capsys.readouterr().out


def test_verify_draws_other_records_each_time_and_says_how_to_draw_them_again(
    made: tuple[TeacherConfig, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = made
    call = ["digits-resnet20", *overrides_of(config.teacher.weights), "--caches", str(path.parent)]
    call += ["--records", "8"]
    seeds, tables = [], []
    for repeated in ([], [], None):
        again = ["--seed", seeds[1]] if repeated is None else repeated
        assert verify([*call, *again]) == 0
        told = capsys.readouterr().out
        seeds += re.findall(r"--seed (\d+)", told)
        tables.append(told[told.index("tap  ") :])
    assert seeds[0] != seeds[1] == seeds[2]
    assert tables[1] == tables[2]


@pytest.mark.parametrize(("fresh", "stored"), [(1.0, np.nan), (np.nan, np.nan), (np.nan, 1.0)])
def test_nan_never_compares_as_equal(fresh: float, stored: float) -> None:
    values = [np.full((2, 3), value, np.float32) for value in (fresh, stored, 1e-3)]
    margin = np.ones(2, np.float32)
    assert _compared("logits", _Pair(*values), 1e-4, margin).num_wrong == 6
    bits = [each[:, 0] for each in values]
    assert _compared("correct", _Pair(*bits), 1e-4, margin * np.nan).num_wrong == 2


def forge(path: Path, tap: str) -> None:
    """Exchange the values of one tap, and make every checksum fit."""
    opened = TeacherCache.open(path)
    with CacheWriter.open(path, content_of(opened)) as writer:
        for block in opened.manifest.blocks():
            values = opened.read_block(block, [tap])[tap]
            wrong = 1 - values if tap == "correct" else values + values.std(axis=0)
            writer.write_block(block, {tap: wrong})


def content_of(opened: TeacherCache) -> CacheContent:
    m = opened.manifest
    return CacheContent(
        teacher=m.teacher,
        identity=m.identity,
        taps=m.taps,
        num_samples=m.num_samples,
        labels=opened.labels,
        num_views=m.num_views,
        class_names=m.class_names,
        canary=m.canary,
        preview=opened.preview,
        versions=m.versions,
    )


def test_verify_refuses_the_cache_of_other_weights(
    made: tuple[TeacherConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = made
    state = torch.load(config.teacher.weights, weights_only=True)
    state["fc.bias"][0] += 1
    torch.save(state, tmp_path / "w.pt")
    call = ["digits-resnet20", *overrides_of(str(tmp_path / "w.pt")), "--caches", str(path.parent)]
    assert verify(call) == 2
    assert "teacher.weights_sha256: expected" in capsys.readouterr().err


# ---- growth by the command


def test_more_views_and_another_tap_add_to_the_cache_and_touch_nothing(
    made: tuple[TeacherConfig, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = made
    before = {f: f.stat().st_mtime_ns for f in (path / "teacher.zarr").glob("*/c.*")}
    call = arguments_of(config, path.parent)
    assert precompute([*call, "views.count=5"]) == 0
    assert "to do    120 of" in capsys.readouterr().out
    assert precompute([*call, "views.count=5", "taps.attention=float16"]) == 0
    assert precompute([*call, "taps.hint={stage: stage2, dtype: float32}"]) == 0
    assert all(f.stat().st_mtime_ns == time_ns for f, time_ns in before.items())
    opened = TeacherCache.open(path)
    assert (opened.num_views, opened.taps["attention3"].shape) == (5, (4,))
    assert opened.taps["hint"].shape == (32, 4, 4)
    records = opened.read_view(4)
    attention = records["attention2"].astype(np.float32)
    assert np.allclose(np.linalg.norm(attention, axis=1), 1, atol=1e-2)
    assert np.allclose(records["hint"].mean(axis=(2, 3)), records["stage2"], atol=1e-2)
    squares = (records["hint"] ** 2).mean(axis=1).reshape(60, -1)
    assert np.allclose(
        attention, squares / np.linalg.norm(squares, axis=1, keepdims=True), atol=1e-3
    )
    assert opened.faults() == []
    # A smaller wish finds all it wants; views that are added later get every tap that is there.
    assert precompute(call) == 0
    assert "nothing to do" in capsys.readouterr().out.splitlines()[-1]
    assert precompute([*call, "views.count=6"]) == 0
    assert TeacherCache.open(path).read_view(5)["attention1"].shape == (60, 64)


def test_a_hint_of_another_stage_is_refused(
    made: tuple[TeacherConfig, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = made
    call = arguments_of(config, path.parent)
    assert precompute([*call, "taps.hint={stage: stage2}"]) == 0
    assert precompute([*call, "taps.hint={stage: stage3}"]) == 2
    assert "taps.hint: expected" in capsys.readouterr().err
    assert precompute([*call, "taps.hint={stage: stage4}"]) == 2
    assert "stage4 is not one of stage1, stage2, stage3" in capsys.readouterr().err


def test_plan_says_everything_and_writes_nothing(
    small_teacher: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = arguments_of(small_teacher(), tmp_path, "--plan")
    assert precompute(call) == 0
    told = capsys.readouterr().out
    assert "size     44.1 kB in 240 files: 3 views x 60 samples, 245 bytes each\n" in told
    assert "to do    180 of" in told
    assert "images/s on cpu" in told
    assert "\nstage3   64     float16    128    23.0 kB\n" in told
    assert max(map(len, told.splitlines()[1:])) <= 100  # the first is the folder
    assert precompute([*call, "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == told.splitlines()[:3]
    assert list(tmp_path.iterdir()) == []
    encoded, _ = encode_chunk(np.zeros((3, 2)), small_spec(), 4)
    assert encoded.size == 4 * 2 * 4 + 4
    assert Block(0, 0, 0, 3).rows == 3


def small_spec():
    from teach_once.store.format.spec import ArraySpec

    return ArraySpec((2,), "float32")


def test_the_list_tells_caches_apart_that_differ_in_seed_or_images(
    made: tuple[TeacherConfig, Path],
    small_teacher: Callable[..., TeacherConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, path = made
    assert cli(["list", "--caches", str(path.parent)]) == 0
    header, only = capsys.readouterr().out.splitlines()
    assert header.split()[-3:] == ["differs", "in", "state"]
    assert "=" not in only
    other_seed = make_cache(small_teacher("views.seed=5"), path.parent).path
    other_images = make_cache(small_teacher("dataset.max_per_class=5"), path.parent).path
    assert cli(["list", "--caches", str(path.parent)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "views.seed=0" in lines[path.name]
    assert "views.seed=5" in lines[other_seed.name]
    digests = {name: re.search(r"dataset.digest='(\S+)'", line) for name, line in lines.items()}
    digest = {name: match[1] for name, match in digests.items() if match}
    assert digest[path.name] == digest[other_seed.name] != digest[other_images.name]
    assert "arch" not in lines[path.name]


def test_list_of_caches_with_other_teachers_contains_no_settings(
    made: tuple[TeacherConfig, Path],
    small_teacher: Callable[..., TeacherConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, path = made
    weights = tmp_path / "resnet14.pt"
    torch.save(build("resnet14", num_classes=10, in_channels=1).state_dict(), weights)
    config = small_teacher("teacher.arch=resnet14", f"teacher.weights={weights}", "views.seed=5")
    other = make_cache(config, path.parent).path
    assert cli(["list", "--caches", str(path.parent)]) == 0
    out = capsys.readouterr().out
    assert path.name in out
    assert other.name in out
    assert "=" not in out
