"""The documentation's site: every page is in its navigation, and every link leads to a heading.

`make docs` checks more; this runs where mkdocs is not installed.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from teach_once.__main__ import COMMANDS, PROGRAMS
from tests.support.documents import documents
from tests.support.project import ROOT

DOCS = ROOT / "docs"
SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def pages_in(navigation: object) -> Iterator[str]:
    if isinstance(navigation, str):
        yield navigation
    elif isinstance(navigation, list):
        for entry in navigation:
            yield from pages_in(entry)
    elif isinstance(navigation, dict):
        yield from pages_in(list(navigation.values()))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as both GitHub and mkdocs form them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {re.sub(r"\s+", "-", heading.strip()) for heading in words}


def test_navigation_lists_every_page_once() -> None:
    assert sorted(pages_in(SITE["nav"])) == PAGES


@pytest.mark.parametrize("document", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_headings_lead_to_one(document: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", document.read_text())
    for path, anchor in targets:
        target = document.parent / path if path else document
        if "://" not in path and target.suffix == ".md":
            assert anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_page_begins_with_one_heading_and_an_answer(page: str) -> None:
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(), flags=re.DOTALL)
    assert re.match(r"# .*\n\n[^#\n|!]", text), "a heading, then a sentence"
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1


def test_site_needs_no_network() -> None:
    assert SITE["theme"]["font"] is False
    assert all((DOCS / path).is_file() for path in SITE["extra_css"])
    assert "extra_javascript" not in SITE


USERS_PAGES = [page for page in PAGES if not page.startswith(("development/", "reference/config"))]


@pytest.mark.parametrize("page", USERS_PAGES)
def test_lines_of_prose_are_at_most_120_characters(page: str) -> None:
    text = (DOCS / page).read_text()
    prose = (line for line in text.splitlines() if not line.startswith(("|", "<!--", "#SBATCH")))
    assert [line for line in prose if len(line) > 120] == []


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_reference_has_every_program_with_its_options(hooks: ModuleType) -> None:
    text = "\n".join(hooks.commands())
    headings = set(re.findall(r"^##+ teach-once (.*)$", text, re.MULTILINE))
    assert {*COMMANDS, *PROGRAMS} <= headings
    assert {"store trim", "train student", "views pack"} <= headings
    assert "| `--drop-taps` |" in text
    assert "python -m" not in text.partition("teach-once runtime.launch")[0]


def test_numbers_of_a_spread_stay_on_one_line_in_tables_only(hooks: ModuleType) -> None:
    text = "1 to 3 or\n| a to b | 1.20 ± 0.28 | -0.10 to +2.77 |"
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    shown = hooks.on_page_markdown(text, page=page, config={"repo_url": None}, files=None)
    spread, interval = "1.20\u00a0±\u00a00.28", "-0.10\u00a0to\u00a0+2.77"
    assert shown == f"1 to 3 or\n| a to b | {spread} | {interval} |"


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        (None, "see `train/losses.py`"),
        ("https://x.org", "see [it](https://x.org/blob/main/train/losses.py)"),
    ],
)
def test_links_to_source_files_become_text_without_a_repository(
    repository: str | None, expected: str, hooks: ModuleType
) -> None:
    page = Path("how-to/methods.md")
    text = "see [it](../../train/losses.py)"
    assert hooks.with_source_links(text, page, repository) == expected
    assert hooks.with_source_links("[a](loss.md#b)", page, repository) == "[a](loss.md#b)"
