"""Hugging Face tables: packed once, with the classes of their labels."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pytest
from pyarrow import parquet

from teach_once.configs.load import load_teacher
from teach_once.views.command import cli
from teach_once.views.datasets import load_dataset
from tests.support.datasets.other_formats import (
    LABELS,
    pack_again,
    picture,
    shows_pictures,
    write_config,
)


def table(labels: Sequence[int | float | str | None], names: list[str] | None) -> datasets.Dataset:
    rows = {
        "picture": [{"bytes": picture(number), "path": None} for number in range(len(labels))],
        "kind": list(labels),
    }
    types = {int: "int64", float: "float64", str: "string"}
    kind = datasets.Value(types[type(labels[0])])
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": kind if names is None else datasets.ClassLabel(names=names),
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves tables as the package does, with a config beside them."""

    def save(labels: Sequence[int | str], names: list[str] | None, **keys: str) -> Path:
        both = datasets.DatasetDict(
            {"train": table(labels, names), "validation": table(labels[:2], names)}
        )
        both.save_to_disk(tmp_path / "saved")
        given = {"path": "saved", "image": "picture", "label": "kind", **keys}
        return write_config(tmp_path / "mine.yaml", "huggingface", **given)

    return save


@pytest.mark.parametrize(
    ("labels", "names", "found"),
    [
        (LABELS, ["cat", "dog", "emu"], ("cat", "dog", "emu")),
        (LABELS, None, ("0", "1")),
        (["dog" if label else "cat" for label in LABELS], None, ("cat", "dog")),
    ],
)
def test_a_saved_table_is_packed_with_its_classes(
    labels: list[int | str],
    names: list[str] | None,
    found: tuple[str, ...],
    saved: Callable[..., Path],
) -> None:
    dataset = load_dataset(load_teacher(pack_again(saved(labels, names))).dataset)
    assert dataset.class_names == found
    assert dataset.type == "huggingface"
    assert dataset.train.labels.tolist() == LABELS
    assert dataset.test.labels.tolist() == LABELS[:2]
    assert shows_pictures(dataset.train)


@pytest.mark.parametrize(
    ("labels", "names", "told"),
    [
        ([*range(12), -1], None, "row 12 of train of saved: the label -1 is negative"),
        ([0, 1, -1], ["cat", "dog"], "row 2 of train of saved: the label -1 is negative"),
        ([0, 1, None], None, "row 2 of train of saved has no label"),
        ([0.0, 1.0, 2.5], None, "row 2 of train of saved: the label 2.5 is neither"),
        (["cat", "dog", "3"], None, "row 2 of train of saved: the label 3 is a number"),
    ],
)
def test_pack_label_that_does_not_fit_names_its_row(
    labels: list[int | float | str | None],
    names: list[str] | None,
    told: str,
    saved: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli(["pack", str(saved(labels, names))]) == 2
    error = capsys.readouterr().err
    assert told in error.replace(f"{tmp_path}/", ""), error


def test_pack_numbers_stored_as_decimals_keep_their_order(saved: Callable[..., Path]) -> None:
    config = load_teacher(pack_again(saved([float(number) for number in range(12)], None)))
    dataset = load_dataset(config.dataset)
    assert dataset.class_names == tuple(map(str, range(12)))
    assert dataset.train.labels.tolist() == list(range(12))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"image": "photo"}, "has no column 'photo'; it has picture, kind"),
        ({"image": "kind"}, "the column 'kind' has no images"),
        ({"train": "fit"}, "has no split fit; it has train, validation"),
    ],
)
def test_columns_and_splits_that_are_not_there_are_named(
    keys: dict[str, str],
    told: str,
    saved: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli(["pack", str(saved(LABELS, None, **keys))]) == 2
    assert told in capsys.readouterr().err


def test_a_table_that_names_files_elsewhere_is_refused(
    saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = saved(LABELS, None)
    for split in ("train", "validation"):
        rewrite_as_paths(tmp_path / "saved" / split)
    assert cli(["pack", str(config)]) == 2
    assert "row 0 of train of" in (told := capsys.readouterr().err)
    assert "contains a path instead of an image" in told
    assert not list(tmp_path.glob("packed*"))


def test_pack_row_without_an_image_is_named(
    saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = saved([0, 1, 0], None)
    made = table([0, 1, 0], None)
    holes = made.map(
        lambda row, at: {"picture": None if at == 1 else row["picture"]}, with_indices=True
    )
    shutil.rmtree(tmp_path / "saved/train")
    holes.save_to_disk(tmp_path / "saved/train")
    assert cli(["pack", str(config)]) == 2
    assert "row 1 of train of" in (told := capsys.readouterr().err)
    assert "has no image\n  fix: remove the row" in told


def write_parquet(folder: Path, count: int = 2, content: bytes | None = None) -> None:
    """A folder of parquet files; all rows have the same image, which takes the room of one."""
    folder.mkdir()
    for split in ("train", "test"):
        image = {"bytes": picture(0) if content is None else content, "path": None}
        rows = {"picture": [image] * count, "kind": [0, 1] * (count // 2)}
        features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("int64")})
        made = datasets.Dataset.from_dict(rows, features=features)
        file = folder / f"{split}-00000-of-00001.parquet"
        parquet.write_table(made.data.table, file, compression="zstd")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of `datasets`, empty."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path / "hf"


def test_pack_parquet_files_that_expand_too_far_are_refused(
    own_cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("teach_once.views.images.huggingface.FREE_BYTES", 2**20)
    write_parquet(tmp_path / "bomb", 200, bytes(100_000))
    config = write_config(
        tmp_path / "mine.yaml", "huggingface", path="bomb", image="picture", label="kind"
    )
    assert cli(["pack", str(config)]) == 2
    assert re.search(
        r"bomb has .* of files, but more than .* of decompressed rows", capsys.readouterr().err
    )
    assert sum(file.stat().st_size for file in own_cache.rglob("*") if file.is_file()) < 2**22


@pytest.mark.parametrize("outside", ["../elsewhere.parquet", "{}/elsewhere.parquet"])
def test_pack_readme_that_names_files_outside_is_refused(
    outside: str, own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parquet(tmp_path / "table")
    shutil.copy(tmp_path / "table/test-00000-of-00001.parquet", tmp_path / "elsewhere.parquet")
    config = write_config(
        tmp_path / "mine.yaml", "huggingface", path="table", image="picture", label="kind"
    )
    (tmp_path / "table/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: "
        f'"train*.parquet"\n  - split: test\n    path: "{outside.format(tmp_path)}"\n---\n'
    )
    assert cli(["pack", str(config)]) == 2
    assert "names a file outside of itself" in (told := capsys.readouterr().err)
    assert "elsewhere.parquet" in told
    (tmp_path / "table/README.md").unlink()
    assert cli(["pack", str(config)]) == 0


@pytest.mark.parametrize("name", ["../../elsewhere.arrow", "/etc/passwd", ".."])
def test_pack_saved_table_that_names_files_outside_is_refused(
    name: str, saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = saved(LABELS, None)
    file = tmp_path / "saved/train/state.json"
    state = json.loads(file.read_text())
    state["_data_files"][0]["filename"] = name
    file.write_text(json.dumps(state))
    assert cli(["pack", str(config)]) == 2
    assert "state.json names a file outside of its folder" in capsys.readouterr().err
    (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["../saved/train"]}))
    assert cli(["pack", str(config)]) == 2
    assert "dataset_dict.json names a file outside" in capsys.readouterr().err


def rewrite_as_paths(folder: Path) -> None:
    """As a forger would: a table of plain structs, which its description calls images."""
    text = datasets.Value("string")
    plain = {"picture": {"bytes": datasets.Value("binary"), "path": text}, "kind": text}
    rows = {"picture": [{"bytes": None, "path": "/etc/passwd"}] * 2, "kind": ["a", "b"]}
    shutil.rmtree(folder)
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(plain))
    made.save_to_disk(folder)
    description = json.loads((folder / "dataset_info.json").read_text())
    description["features"]["picture"] = {"_type": "Image"}
    (folder / "dataset_info.json").write_text(json.dumps(description))


def test_a_name_that_cannot_be_downloaded_is_one_message(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli(["pack", str(saved(LABELS, None, path="nobody/nothing-here"))]) == 2
    assert "dataset.path: nobody/nothing-here cannot be loaded: " in capsys.readouterr().err
