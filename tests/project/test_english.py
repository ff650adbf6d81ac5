"""The check of English in `make lint` finds its habits and accepts ordinary sentences."""

from __future__ import annotations

import pytest

from tests.support.english import all_findings, findings, page_findings


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
        'def f():\n    """The cache of a teacher."""',
        'def f():\n    """(B, K) -> (B, K)."""',
        'def f():\n    """rows: name -> (B, ...)."""',
        "x = 1  # the file beside it",
        'raise ValueError("run it again, and whoever is there ends")',
        "# the header says that it is damaged",
        "# bytes that lie in the file",
        "# the records are sound",
    ],
)
def test_findings_habit_is_found(source: str) -> None:
    found, *_ = findings(source)
    assert found.advice


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """Return True if there is no folder."""',
        "# the run is no longer trained",
        'def f():\n    """Read the first of several files, as `g` does."""',
        'class A:\n    """Of a view: its samples."""\n',
        "whether = 'Of '",
        'class A:\n    @property\n    def f(self):\n        """The cache of a teacher."""',
        'class A:\n    """The cache of a teacher."""\n',
        "# the sound of it; a list of many; he says so",
    ],
)
def test_findings_ordinary_sentence_is_not_found(source: str) -> None:
    assert list(findings(source)) == []


def test_findings_unrevised_part_has_only_the_common_rules() -> None:
    source = 'def f():\n    """The cache beside it, of so many samples."""'
    (found,) = findings(source, revised=False)
    assert "num_samples" in found.advice
    assert len(list(findings(source))) == 4


def test_page_findings_phrase_outside_of_code_is_found() -> None:
    page = "# A page\n\nThe file lies in a folder.\n\n```bash\nls beside\n```\n"
    (found,) = page_findings(page)
    assert (found.line, found.text) == (3, "The file lies in a folder.")
