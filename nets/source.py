"""The digest of a user's own network, without importing it."""

from __future__ import annotations

from nets.archs import PYTHON_PREFIX
from runtime.own_code import module_sha256


def arch_source(arch: str) -> dict[str, str | None]:
    """{module: sha256 of its file} for a `python:module:function` network, {} for any other."""
    if not arch.startswith(PYTHON_PREFIX):
        return {}
    module = arch.removeprefix(PYTHON_PREFIX).partition(":")[0]
    return {module: module_sha256(module)}
