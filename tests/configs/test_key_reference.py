"""docs/reference/config.md describes every key and is up to date."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from teach_once.configs import schema
from teach_once.configs.command import cli
from teach_once.configs.load import available, load_student, load_teacher
from teach_once.configs.reference import meanings, reference
from teach_once.configs.schema import as_plain
from teach_once.configs.schema.losses import BUILT_IN_LOSSES
from tests.support.project import ROOT

PAGE = ROOT / "docs" / "reference/config.md"
# Keys that choose a variant of their block: they are the variants' headings, not rows.
VARIANTS = {
    "dataset.type",
    "views.augment.type",
    "training.schedule.type",
    "training.optimizer.type",
}
BLOCKS = [each for each in vars(schema).values() if dataclasses.is_dataclass(each)]


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["reference"]) == 0
    printed = capsys.readouterr().out
    assert PAGE.read_text() == printed, f"fix: python -m configs reference > {PAGE}"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_every_key_has_a_meaning(block: type) -> None:
    if block is schema.ConfigSource:  # names a config; not a block of one
        return
    texts = meanings(block)
    assert set(texts) == {field.name for field in dataclasses.fields(block)} - {"source"}
    assert all(text.endswith(".") for text in texts.values())


def test_a_change_of_a_key_makes_the_page_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teach_once.configs.reference.default_in_words", lambda *_: "another")
    assert reference() != PAGE.read_text()


def test_the_page_has_every_key_of_every_file_that_comes_with_the_project() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    described = {row.split("`")[1] for row in rows} | VARIANTS
    used = {path for name in available("teacher") for path in paths_of(load_teacher(name))}
    used |= {path for name in available("student") for path in paths_of(load_student(name))}
    of_kind_center = {path.replace("views.evaluation.", "views.augment.") for path in used}
    assert {path for path in of_kind_center if not path.startswith("methods.")} <= described


def test_the_page_has_every_loss_with_its_options() -> None:
    page = PAGE.read_text()
    for name, block in BUILT_IN_LOSSES.items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        for option, default in as_plain(block()).items():
            kind = "`true` or `false`" if isinstance(default, bool) else "number"
            assert f"`{option}`: {kind}" in row
            assert f"default `{json.dumps(default)}`" in row


@pytest.mark.parametrize("block", BUILT_IN_LOSSES.values(), ids=BUILT_IN_LOSSES)
def test_every_option_of_a_loss_has_a_meaning(block: type) -> None:
    assert set(meanings(block)) == set(as_plain(block()))


def paths_of(config: schema.TeacherConfig | schema.StudentConfig) -> set[str]:
    """The dotted paths of all keys in a file."""
    return set(_paths_within(as_plain(config))) - {"name"}


def _paths_within(block: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in block.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _paths_within(value, f"{prefix}{key}.")
