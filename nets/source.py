"""The digest of a user's own module, without importing it.

Covers the named file, not what it imports in turn.
"""

from __future__ import annotations

import hashlib
import importlib.util
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from nets.archs import PYTHON_PREFIX


def arch_source(arch: str) -> dict[str, str | None]:
    """{module: sha256 of its file} for a `python:module:function` network, {} for any other."""
    if not arch.startswith(PYTHON_PREFIX):
        return {}
    module = arch.removeprefix(PYTHON_PREFIX).partition(":")[0]
    return {module: module_sha256(module)}


def module_sha256(module: str) -> str | None:
    """sha256 of the file of `package.module`; None if there is no such file."""
    spec = _spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def _spec(module: str) -> ModuleSpec | None:
    """Found folder by folder: `importlib.util.find_spec` would import the packages above it."""
    spec, folders, name = None, None, ""
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        spec = PathFinder.find_spec(name, folders)
        if spec is None:
            break
        folders = spec.submodule_search_locations or []
    return spec or _spec_by_any_finder(module)


def _spec_by_any_finder(module: str) -> ModuleSpec | None:
    """Packages in editable installs have finders of their own."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
