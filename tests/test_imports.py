"""Who may import whom (the map in the README), and that this test can fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("runtime", "configs", "views", "nets", "store", "precompute", "train")
SHARED = ("runtime", "configs", "views", "nets", "store")

# Stages use the shared rooms; shared rooms stay apart, but for types from configs.schema and, in
# the configs' favour, nothing else.
ALLOWED = {
    "runtime": set(),
    "configs": {"runtime"},
    "views": {"configs.schema", "runtime"},
    "nets": {"configs.schema", "runtime"},
    "store": {"runtime"},
    "precompute": set(SHARED),
    "train": set(SHARED),
}


def imports_of(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def violations(room: str, source: str, also: frozenset[str] = frozenset()) -> list[str]:
    found = []
    for module in imports_of(source):
        top = module.split(".")[0]
        if room == "store" and top in ("torch", "torchvision"):
            found.append(f"{room} imports {module}")
        if top in ROOMS and top != room and not {module, top} & (ALLOWED[room] | also):
            found.append(f"{room} imports {module}")
    if room == "nets" and "read_stages" in source and "class CifarResNet" in source:
        found.append("model code knows of taps")
    return found


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_imports_only_what_it_may(room: str) -> None:
    files = files_of(room)
    assert files
    for file in files:
        # A room's own command may read configs by name; no module of it may.
        also = frozenset({"configs.load"} if file.name == "__main__.py" else set())
        also = also if room == "views" else frozenset()
        assert violations(room, file.read_text(), also) == []


def test_model_code_does_not_import_tap_code() -> None:
    modules = set(imports_of((ROOT / "nets" / "zoo.py").read_text()))
    assert not any("taps" in module for module in modules)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("train", "import precompute.run"),
        ("precompute", "def f():\n    from train import losses"),
        ("store", "import torch"),
        ("store", "from configs.load import load_teacher"),
        ("views", "from nets.zoo import build"),
        ("nets", "import store"),
        ("configs", "from train.schedule import weight_at"),
        ("runtime", "from store.journal import read_journal"),
        ("views", "from configs.load import load_teacher"),
    ],
)
def test_the_import_test_fails_where_a_rule_is_broken(room: str, source: str) -> None:
    assert violations(room, source) != []


@pytest.mark.parametrize(
    "module", ["store", "precompute.__main__", "train.__main__", "views.augment"]
)
def test_what_must_start_fast_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_nothing_unpickles_or_evaluates() -> None:
    for room in ROOMS:
        for file in files_of(room):
            tree = ast.parse(file.read_text())
            assert "pickle" not in set(imports_of(file.read_text())), file
            for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
                name = ast.unparse(call.func)
                assert name not in ("eval", "exec"), file
                if name == "torch.load":
                    assert "weights_only=True" in ast.unparse(call), file


def test_no_test_imports_a_test() -> None:
    for file in (ROOT / "tests").rglob("*.py"):
        modules = (module.split(".") for module in imports_of(file.read_text()))
        assert not any(part.startswith("test_") for parts in modules for part in parts), file
