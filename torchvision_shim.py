"""Makes `import torchvision` work beside a CPU-only torch.

PyPI's torchvision is built against CUDA torch. Beside a CPU-only torch its compiled operators do
not load, and the import then fails while it registers abstract versions of two of them that it
takes for granted. Declaring their schemas first is enough: classifiers never call them. Beside a
matching torch the operators come from torchvision itself, and nothing is declared here.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # the declarations live as long as these objects


def import_torchvision() -> ModuleType:
    """torchvision, importable also beside a CPU-only torch."""
    if torch.version.cuda is None and not _libraries:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in _SCHEMAS:
            library.define(schema)  # type: ignore[no-untyped-call]
        _libraries.append(library)
    return importlib.import_module("torchvision")
