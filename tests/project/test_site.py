"""The documentation's site: every page is in its navigation, and every link leads to a heading.

`make docs` checks more; this runs where mkdocs is not installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

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
    assert not {"extra_css", "extra_javascript"} & set(SITE)
