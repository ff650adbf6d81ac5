"""The check of English in `make lint` finds what it is for, and nothing in ordinary sentences."""

from __future__ import annotations

import pytest

from tests.support.english import all_findings, findings


def test_all_findings_project_has_none() -> None:
    assert all_findings() == []


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """Of several ranks each returns its share."""',
        'class A:\n    def f(self):\n        """Whether no sample is alone."""',
        'def f():\n    """As `g`, batch by batch."""',
        "x = 1  # of so many samples",
        '"""A path that is no folder is refused."""',
        'raise ValueError(f"{path} is no cache")',
    ],
)
def test_findings_habit_is_found(source: str) -> None:
    (found,) = findings(source)
    assert found.advice


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """Return True if there is no folder."""',
        "# the run is no longer trained",
        'def f():\n    """Read the first of several files, as `g` does."""',
        'class A:\n    """Of a view: its samples."""\n',
        "whether = 'Of '",
    ],
)
def test_findings_ordinary_sentence_is_not_found(source: str) -> None:
    assert list(findings(source)) == []
