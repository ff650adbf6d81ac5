"""The network of Residual KD: a student and an assistant, each a thinner copy of the plain student.

The student's map at one stage is trained to be the teacher's, the assistant's to be what is left of
it; their sum goes through the rest of the student. Which stage is the cache's: that of its hint.

    images -> student up to the stage   -> F_S --+
    images -> assistant up to the stage -> F_A --+-> the rest of the student -> logits

Source: Gao, Shen, Loy et al. 2020, "Residual Knowledge Distillation"; docs/how-to/methods.md has
the choices that the paper leaves open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from teach_once.configs.schema import LossTerm, StudentConfig, StudentNet, ThinNet
from teach_once.nets.networks.archs import CIFAR_RESNETS, ArchError
from teach_once.nets.networks.zoo import build_net
from teach_once.nets.teacher.taps import stage_modules
from teach_once.store.format.spec import TapSpec
from teach_once.train.errors import TrainError
from teach_once.train.method.pretrained import listed_until
from teach_once.train.terms import looked_at

_THINNER = (
    0.7  # of the channels, and so half of the products: two such networks cost as much as one
)
_ASSISTANT = 0x9E3779B9  # tells its seed from the student's; torch seeds by the lowest 32 bits
# Where the maps of both are read, by their names among a train state's maps.
PARTS = {"student": "of_student", "assistant": "of_assistant"}


class StudentAndAssistant(nn.Module):
    """Images (B, C, H, W) -> logits (B, K).

    stage: the module, of both networks, at which their maps are added. What the assistant lists
    behind it is left out. `of_student` and `of_assistant` pass the two maps through, to be read.
    """

    def __init__(self, student: nn.Module, assistant: nn.Module, stage: str) -> None:
        super().__init__()
        self.student, self.assistant = student, assistant
        self.of_student, self.of_assistant = nn.Identity(), nn.Identity()
        self._stage = stage
        _cut_behind(assistant, stage)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the two networks, as timm's do, except from weight decay."""
        parts = {"student": self.student, "assistant": self.assistant}
        return {
            f"{name}.{parameter}"
            for name, network in parts.items()
            for parameter in getattr(network, "no_weight_decay", set)()
        }

    def forward(self, images: Tensor) -> Tensor:
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: object, features: Tensor) -> None:
            found.append(self.of_assistant(features))

        def add(module: nn.Module, inputs: object, features: Tensor) -> Tensor:
            of_student: Tensor = self.of_student(features)
            return of_student + found.pop()

        theirs = self.assistant.get_submodule(self._stage).register_forward_hook(keep)
        # In front of the hooks of others, who are to see the sum.
        ours = self.student.get_submodule(self._stage).register_forward_hook(add, prepend=True)
        with theirs, ours:
            self.assistant(images)
            logits: Tensor = self.student(images)
        return logits


def build_student(
    config: StudentConfig,
    terms: Sequence[LossTerm],
    hint_stage: str | None,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    seed: int = 0,
) -> nn.Module:
    """Build the network that a method trains: the config's, or Residual KD's pair of thinner ones.

    hint_stage: of the cache, as "stage2"; None: it has none. image_shape: (H, W, C). The weights
    depend on `seed` alone. Raises ArchError, TapError, TrainError.
    """
    net = config.student
    if not is_pair(terms):
        return build_net(net, num_classes=num_classes, image_shape=image_shape, seed=seed)
    if net.init is not None:
        raise TrainError(
            "student.init is for one network, and the loss residual trains two thinner ones",
            fix="student.init=null",
        )
    thin = thinner(net)
    stages = stage_modules(thin.arch, net.stages, key="student.stages")
    if hint_stage not in stages:
        raise TrainError(f"residual: the cache's hint is {hint_stage}, which the student lacks")

    student, assistant = (
        build_net(thin, num_classes=num_classes, image_shape=image_shape, seed=own)
        for own in (seed, seed ^ _ASSISTANT)
    )
    return StudentAndAssistant(student, assistant, stages[hint_stage])


def hint_stage(taps: Mapping[str, TapSpec]) -> str | None:
    """Return the stage of the hint of a cache with these taps."""
    return taps["hint"].stage if "hint" in taps else None


def is_pair(terms: Sequence[LossTerm]) -> bool:
    """Return True if these losses read the two maps of student and assistant."""
    return "parts" in looked_at(terms)


def thinner(net: StudentNet) -> ThinNet:
    """Return the network of student and assistant. Raises ArchError if nothing determines it."""
    if net.thinner is not None:
        return net.thinner
    if net.arch not in CIFAR_RESNETS:
        raise ArchError(
            f"residual: no thinner copy of {net.arch} is known; name a network of half its cost",
            fix="student.thinner.arch=NETWORK",
        )
    width = float(net.options.get("width", 1.0)) * _THINNER
    return ThinNet(arch=net.arch, stem=net.stem, options={**net.options, "width": width})


def _cut_behind(network: nn.Module, stage: str) -> None:
    """Replace each module that the network lists behind a stage by nothing."""
    names = [name for name, _ in network.named_modules()]
    cut: list[str] = []
    for name in names[listed_until(network, stage) :]:
        if not any(name.startswith(f"{other}.") for other in cut):
            cut.append(name)
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, nn.Identity())
