"""Teach Once: run the teacher once, then train any number of students from its stored outputs.

This is the only importable package: `from teach_once import DistillationDataset`. All other modules
are inside it, for example `teach_once.train.losses`. In a checkout its parts are the folders next
to it, reached through links; in an installation they are inside it. Therefore your own train.py,
configs/ or store/ never conflicts with a part of it.

After importing this package, torchvision and timm can be imported even if torch is of another build
than torchvision (`teach_once.runtime.machine.torchvision_shim`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from teach_once.runtime.machine.torchvision_shim import install as _install_shim

if TYPE_CHECKING:
    from teach_once.configs.load import load_student, load_teacher
    from teach_once.nets.networks.zoo import build
    from teach_once.store import TeacherCache
    from teach_once.train import losses
    from teach_once.train.dataset import DistillationDataset, EvaluationDataset, RunOrder
    from teach_once.train.schedule import learning_rate_at, weight_at

__version__ = "1.0.0.dev0"

__all__ = [
    "DistillationDataset",
    "EvaluationDataset",
    "RunOrder",
    "TeacherCache",
    "__version__",
    "build",
    "learning_rate_at",
    "load_student",
    "load_teacher",
    "losses",
    "weight_at",
]

_DATASETS = ("DistillationDataset", "EvaluationDataset", "RunOrder")
# Module of each exported name, loaded at first use because most modules load torch.
_MODULES = {
    **dict.fromkeys(_DATASETS, "teach_once.train.dataset"),
    **dict.fromkeys(("load_student", "load_teacher"), "teach_once.configs.load"),
    **dict.fromkeys(("learning_rate_at", "weight_at"), "teach_once.train.schedule"),
    "TeacherCache": "teach_once.store",
    "build": "teach_once.nets.networks.zoo",
}


def __getattr__(name: str) -> object:
    if name == "losses":
        return import_module("teach_once.train.losses")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'teach_once' has no attribute {name!r}")


_install_shim()
