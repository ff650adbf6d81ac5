"""Selection of tests that share a worker, start first or are quick, by names of existing files."""

from __future__ import annotations

import pytest

from tests.conftest import pytest_xdist_make_scheduler
from tests.support.project import ROOT
from tests.support.selection import FIRST, GROUPS, NOT_QUICK, QUICK, ByGroup

FILES = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize(
    "names", [QUICK, set(GROUPS), set(FIRST)], ids=["quick", "groups", "first"]
)
def test_selection_names_files_that_exist(names: set[str]) -> None:
    assert names <= FILES


def test_selection_names_tests_that_exist() -> None:
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if file.stem in QUICK]
    text = "".join(file.read_text() for file in files)
    assert [name for name in NOT_QUICK if f"def {name}(" not in text] == []


def test_scheduler_gives_a_worker_whole_files_and_whole_groups() -> None:
    def scope(node: str) -> str:
        return ByGroup._split_scope(object.__new__(ByGroup), node)

    assert scope("tests/store/test_a.py::test_x[a/b::c]") == scope("tests/store/test_a.py::test_y")
    assert scope("tests/store/test_a.py::test_x") != scope("tests/store/test_b.py::test_x")
    documents, make = (
        "tests/project/test_documents.py::test_x",
        "tests/project/test_make.py::test_y",
    )
    assert scope(documents) == scope(make)


def test_scheduler_of_this_run_is_the_one_by_group(request: pytest.FixtureRequest) -> None:
    hook = request.config.pluginmanager.hook
    if not hasattr(hook, "pytest_xdist_make_scheduler"):
        pytest.skip("without xdist there is one worker")
    functions = [each.function for each in hook.pytest_xdist_make_scheduler.get_hookimpls()]
    assert pytest_xdist_make_scheduler in functions
