"""Every key of the YAML files, with its type, range and default.

Each YAML block is a frozen dataclass, and each file covers one topic. Unknown keys are rejected.
Numbers, booleans and strings are not converted into one another. Values derived from other settings
are properties, not keys.
"""

from teach_once.configs.schema.augment import (
    AugmentConfig,
    Border,
    CenterCrop,
    ColorJitter,
    Extras,
    Mix,
    PadCropFlip,
    RandomErasing,
    RandomResizedCrop,
    Squash,
    TrivialAugment,
)
from teach_once.configs.schema.dataset import (
    Cifar,
    DatasetConfig,
    Digits,
    HuggingFace,
    ImageFolder,
    Images,
    Normalization,
    Packed,
    PackedOnce,
    WebDataset,
)
from teach_once.configs.schema.methods import LossTerm
from teach_once.configs.schema.scalars import (
    ConfigSource,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    as_plain,
)
from teach_once.configs.schema.student import (
    StudentConfig,
    StudentNet,
    ThinNet,
)
from teach_once.configs.schema.teacher import (
    Hint,
    Probe,
    TapsConfig,
    TeacherConfig,
    TeacherNet,
    TopLogits,
)
from teach_once.configs.schema.training import (
    AdamW,
    Cosine,
    Ema,
    MultiStep,
    OneCycle,
    Optimizer,
    Schedule,
    Sgd,
    StudentTraining,
    TeacherTraining,
    Training,
)
from teach_once.configs.schema.views import ViewsConfig

__all__ = [
    "AdamW",
    "AugmentConfig",
    "Border",
    "CenterCrop",
    "Cifar",
    "ColorJitter",
    "ConfigSource",
    "Cosine",
    "DatasetConfig",
    "Digits",
    "Ema",
    "Extras",
    "Fraction",
    "Hint",
    "HuggingFace",
    "ImageFolder",
    "Images",
    "LossTerm",
    "Mix",
    "MultiStep",
    "NonNegativeFloat",
    "Normalization",
    "OneCycle",
    "Optimizer",
    "Packed",
    "PackedOnce",
    "PadCropFlip",
    "PositiveFloat",
    "Probe",
    "RandomErasing",
    "RandomResizedCrop",
    "Schedule",
    "Sgd",
    "Squash",
    "StudentConfig",
    "StudentNet",
    "StudentTraining",
    "TapsConfig",
    "TeacherConfig",
    "TeacherNet",
    "TeacherTraining",
    "ThinNet",
    "TopLogits",
    "Training",
    "TrivialAugment",
    "ViewsConfig",
    "WebDataset",
    "as_plain",
]
