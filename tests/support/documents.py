"""Code blocks, commands and links of README.md, CONTRIBUTING.md, docs/ and other pages."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.project import ROOT


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def code_blocks(language: str) -> dict[str, str]:
    """Return the blocks of a language by the file name in their first line, `# name.py`."""
    blocks: dict[str, str] = {}
    for document in documents():
        for block in re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL):
            name = re.match(r"# ([\w.-]+)", block)
            assert name, f"{document.name}: a block without a file name: {block[:60]!r}"
            assert name[1] not in blocks, f"two blocks are called {name[1]}"
            blocks[name[1]] = block
    return blocks


def commands(document: Path) -> list[str]:
    """Return the lines of a page's `bash` blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL)
    lines = [re.split(r"\s+# ", line)[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def links(document: Path) -> list[str]:
    """Return the targets of a page's links and pictures inside the project, without anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", document.read_text())
    found = [(one or other).partition("#")[0] for one, other in targets]
    return [target for target in found if target and "://" not in target]
