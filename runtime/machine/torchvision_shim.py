"""Make `import torchvision` and `import timm` work with a torch of another build.

PyPI's torchvision is built for CUDA torch. With a CPU-only torch its compiled operators do not
load, and the import fails while it registers abstract versions of two of them. Declaring their
schemas first is sufficient, because classifiers never call them. If the operators do load, nothing
is declared here: torchvision declares them itself, and a second declaration would end the process.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[Any] = []  # torch libraries; a declaration lasts as long as its object


def import_torchvision() -> ModuleType:
    """Import torchvision, for any build of torch."""
    install()
    return importlib.import_module("torchvision")


def install() -> None:
    """Make later imports of torchvision in this process succeed; loads nothing itself.

    `import teach_once` calls it. In an installed project torch also calls it, through an entry
    point.
    """
    if not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


class _BeforeTorchvision:
    """An import hook that declares the operators before torchvision registers abstract versions.

    It waits for the submodule that registers them, because `import torchvision` without torch
    imports torch, and so calls `install`, when torchvision itself is already being imported.
    """

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        wanted = name == "torchvision._meta_registrations" and not _declared
        if wanted and not _operators_load(path or ()):
            _declare()
        return None


def _operators_load(folders: Sequence[str]) -> bool:
    """Load torchvision's compiled operators as its import does; returns False on failure."""
    import torch

    for folder in folders:
        for library in (*Path(folder).glob("_C*.so"), *Path(folder).glob("_C*.pyd")):
            try:
                torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
            except OSError:
                return False
            return True
    return False


def _declare() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(library)
