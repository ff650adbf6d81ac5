"""The project for scripts in other folders: `from teach_once import DistillationDataset`.

The project's packages have plain names (train, store, configs, ...), and Python looks for a name in
the folder of the script first: a `train.py` there, often the script itself, hides the package.
Importing this one makes those names mean the project's packages for the whole process, wherever
they lie. A module of yours that has such a name can then be run as a script, but not imported;
where it was imported before, importing this package is an error that names it.

torchvision and timm can be imported after this package also where torch is of another build than
torchvision (`torchvision_shim`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configs.load import load_student, load_teacher
    from nets.zoo import build
    from store import TeacherCache
    from train import losses
    from train.dataset import DistillationDataset, EvaluationDataset, RunOrder
    from train.schedule import learning_rate_at, weight_at

__all__ = [
    "DistillationDataset",
    "EvaluationDataset",
    "RunOrder",
    "TeacherCache",
    "build",
    "learning_rate_at",
    "load_student",
    "load_teacher",
    "losses",
    "weight_at",
]

ROOT = Path(__file__).parent.parent
# What is installed, from the ground up; `benchmarks` and `examples` stay in the repository.
PACKAGES = ("runtime", "configs", "views", "nets", "store", "precompute", "train", "report")
MODULES = (*PACKAGES, "torchvision_shim")

# Where each exported name comes from; loaded at first use, as most of them load torch.
_HOMES = {
    **dict.fromkeys(("DistillationDataset", "EvaluationDataset", "RunOrder"), "train.dataset"),
    **dict.fromkeys(("load_student", "load_teacher"), "configs.load"),
    **dict.fromkeys(("learning_rate_at", "weight_at"), "train.schedule"),
    "TeacherCache": "store",
    "build": "nets.zoo",
}


class _OwnModules:
    """Finds the project's modules beside this package, before Python looks anywhere else."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)]) if name in MODULES else None


def _refuse_others() -> None:
    """Raise ImportError where one of the names is another module's already."""
    for name in MODULES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and not Path(file).resolve().is_relative_to(ROOT.resolve()):
            raise ImportError(
                f"the module {name!r} is {file}, not Teach Once's\n"
                f"  fix: rename that file, or run it as a script instead of importing it"
            )


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("train.losses")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'teach_once' has no attribute {name!r}")


_refuse_others()
if not any(isinstance(finder, _OwnModules) for finder in sys.meta_path):
    sys.meta_path.insert(0, _OwnModules())
import_module("torchvision_shim").install()
