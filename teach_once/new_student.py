"""teach-once new-student ARCH --teacher FILE > my-student.yaml

Writes a student's config: a network, a recipe, and the methods that work with the network and the
teacher's cache. Nothing is trained or downloaded, and no cache is needed. If a cache exists, the
weight of `cd` is measured on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from teach_once.configs.load import load_student, load_teacher
from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.configs.yaml_subset import yaml_text
from teach_once.nets.networks.archs import TORCHVISION_RESNETS, timm_model
from teach_once.nets.networks.names import check_arch
from teach_once.nets.teacher.taps import in_order
from teach_once.runtime.command.frame import new_app, run_command
from teach_once.runtime.command.options import Caches
from teach_once.runtime.command.program import program_text
from teach_once.runtime.errors import UserError
from teach_once.runtime.formats import counted
from teach_once.store.errors import CacheError
from teach_once.views.augment.augment import view_shape
from teach_once.views.datasets import load_dataset

app = new_app()
_SMALL_PX = 64  # smaller images are too small for a stem with stride
# From the simplest to the most complex.
_METHODS = {
    "ce": "[{loss: ce}]",
    "kd": "[{loss: ce, weight: 0.1}, {loss: kd, weight: 0.9, temperature: 4}]",
    "cd": "[{loss: ce}, CD]",
    "cd+gkd": "[{loss: ce}, {loss: gkd}, CD]",
    "embedding": "[{loss: ce}, {loss: embedding}]",
    "cd+embedding": "[{loss: ce}, CD, {loss: embedding}]",
}
_WITHOUT_LABELS = {
    "cd": "[CD]",
    "kd": "[{loss: kd, temperature: 4}]",
    "embedding": "[{loss: embedding}]",
    "cd+embedding": "[CD, {loss: embedding}]",
}
_BEST_FIRST = ("cd+gkd", "cd+embedding", "kd", "embedding", "cd")
_BEST_WITHOUT_LABELS = ("embedding", "cd+embedding", "kd", "cd")
_DISTILL = "distill"
_INIT = "  # init: timm:pretrained  # start from its published weights, downloaded once"


@app.command()
def main(
    arch: Annotated[str, typer.Argument(help=f"see {program_text('nets')} list")],
    teacher: Annotated[str, typer.Option(help="the teacher's file, or a name in configs/teacher")],
    epochs: Annotated[int, typer.Option(min=1, help="passes over the images")] = 30,
    batch_size: Annotated[int, typer.Option(min=2, help="images per step")] = 64,
    caches: Caches = Path("caches"),
) -> None:
    """Print a student's config file."""
    print(student_file(arch, teacher, epochs, batch_size, caches), end="")


def student_file(
    arch: str, teacher: str, epochs: int, batch_size: int, caches: Path = Path("caches")
) -> str:
    """Return the file's text. Raises UserError if no method works."""
    check_arch(arch)
    config = load_teacher(teacher)
    has_labels = load_dataset(config.dataset).has_labels
    methods = _METHODS if has_labels else _WITHOUT_LABELS
    draft = _Draft(arch, teacher, epochs, batch_size, _stem(arch, config), methods)
    stages, why_not = _methods_that_work(draft, config)
    works = {name: terms for name, terms in methods.items() if name not in why_not}
    working = _with_distill(works, _BEST_FIRST if has_labels else _BEST_WITHOUT_LABELS)
    needs_weight = has_labels and any("CD" in terms for terms in working.values())
    cd = _cd_term(draft, stages, config, caches) if needs_weight else None
    lines = draft.lines(stages, working, cd)
    left_out = [f"# {name} is left out: {why}" for name, why in why_not.items()]
    return "\n".join([f"# {arch}, taught by {teacher}.", *left_out, *lines, ""])


def _with_distill(working: Mapping[str, str], best_first: Sequence[str]) -> dict[str, str]:
    """Rename the first of `best_first` that works to `distill`.

    Every file then has a method of that name, if any method but `ce` works.
    """
    best = next((name for name in best_first if name in working), None)
    renamed = {name: terms for name, terms in working.items() if name != best}
    return renamed | ({_DISTILL: working[best]} if best else {})


@dataclass(frozen=True)
class _CdTerm:
    """The loss term `cd`.

    weight: makes the term's first value equal `target`. reason: origin of the weight.
    """

    weight: float = 1.0
    target: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{{loss: cd, weight: {self.weight:.3g}, normalize: true}}"

    def comment(self) -> list[str]:
        """Return the reason for this weight as lines of YAML comments."""
        return [
            "  # cd: normalize divides the loss of a stage by the mean square of its means;",
            f"  # with weight {self.weight:.3g} the term begins at {self.target}, as ce does:",
            f"  # {self.reason}",
        ]


@dataclass(frozen=True)
class _Draft:
    arch: str
    teacher: str
    epochs: int
    batch_size: int
    stem: str
    methods: Mapping[str, str]  # all that are tried

    def lines(
        self, stages: str, methods: Mapping[str, str], cd: _CdTerm | None = None
    ) -> list[str]:
        """Return the file without its head comments. cd: None in drafts and without the term."""
        stem = [f"  stem: {self.stem}"] if self.stem else []
        warmup = min(5, self.epochs // 6)
        rate = 1e-3 * self.batch_size / 256
        return [
            f"teacher: {yaml_text(self.teacher)}",
            "",
            "student:",
            f"  arch: {self.arch}",
            *stem,
            *([f"  stages: {stages}"] if stages else []),
            *([_INIT] if _has_published_weights(self.arch) else []),
            "",
            "training:",
            f"  epochs: {self.epochs}",
            f"  batch_size: {self.batch_size}",
            f"  learning_rate: {rate:g}",
            "  optimizer: {type: adamw}",
            "  weight_decay: 0.05",
            "  weight_decay_norm_bias: false",
            f"  schedule: {{type: cosine, warmup_epochs: {warmup}, final_learning_rate: 1e-5}}",
            "  precision: float32  # bfloat16 on a GPU",
            "",
            "methods:",
            *(cd.comment() if cd else []),
            *(
                f"  {name}: {terms.replace('CD', str(cd or _CdTerm()))}"
                for name, terms in methods.items()
            ),
        ]


def _has_published_weights(arch: str) -> bool:
    if not (model := timm_model(arch)):
        return False
    from teach_once.nets.networks.timm_models import pretrained_cfg

    return bool(pretrained_cfg(model).has_weights)


def _methods_that_work(draft: _Draft, teacher: TeacherConfig) -> tuple[str, dict[str, str]]:
    """Return the stages to write ("": the architecture's own), and why some methods do not work.

    Raises UserError if the student cannot even learn from labels, or, without labels, at all.
    """
    from teach_once.train.method.ensemble_taps import combine_taps
    from teach_once.train.runs.check_methods import (
        TapsOfTeacher,
        check_student,
        check_teacher,
    )

    dataset = load_dataset(teacher.dataset)
    taps = check_teacher(teacher, dataset)
    shape = view_shape(dataset.train.first_shape, teacher.views.augment)
    stages = _stages(draft.arch, sum(name.startswith("stage") for name in taps))
    config = _config_of(draft, stages, teacher)
    planned = TapsOfTeacher.of_config(teacher, Path("caches"))
    why_not: dict[str, str] = {}
    for name in config.methods:
        try:
            planned.check(config, [name])
            check_student(config, name, combine_taps([taps], [1.0]), shape, dataset.num_classes)
        except UserError as error:
            if name == "ce" or len(why_not) == len(config.methods) - 1:
                raise
            why_not[name] = error.problem.split(";")[0].splitlines()[-1].strip()
    return stages, why_not


def _cd_term(draft: _Draft, stages: str, teacher: TeacherConfig, caches: Path) -> _CdTerm:
    """Return the term `cd` with the weight that makes its first value ln K, for K classes.

    The first value is measured with the cache, or estimated if there is none: a student that
    predicts zeros has a loss of 1 per stage.
    """
    from teach_once.runtime.machine.devices import pick_device
    from teach_once.train.runs.check_methods import check_teacher
    from teach_once.train.runs.study import open_study
    from teach_once.train.sessions.trial import first_losses

    dataset = load_dataset(teacher.dataset)
    classes, num_stages = (
        dataset.num_classes,
        len(in_order(check_teacher(teacher, dataset), "stage")),
    )
    value, how = float(num_stages), f"estimated as 1 for each of {counted(num_stages, 'stage')}"
    config = _config_of(draft, stages, teacher)
    with suppress(CacheError):
        study = open_study(config, teacher, caches_dir=caches, runs_dir=Path("runs"))
        value = first_losses(study.run("cd", 0), pick_device("cpu"))["cd"]
        how = f"measured as {value:.3g} with {study.cache.path.name}"
    target = math.log(max(2, classes))
    return _CdTerm(
        target / value,
        f"ln {classes:,} = {target:.3g}",
        f"its first value without a weight is {how}.",
    )


def _stages(arch: str, wanted: int) -> str:
    """Return the architecture's last stages, as many as the teacher has; "" for all of them.

    Returns "" also if the architecture has fewer; the check of the methods reports that.
    """
    from teach_once.nets.networks.names import default_stages

    own = default_stages(arch)
    if not wanted or len(own) <= wanted:
        return ""
    return f"[{', '.join(own[-wanted:])}]"


def _config_of(draft: _Draft, stages: str, teacher: TeacherConfig) -> StudentConfig:
    """Return the config that would be loaded from the file in the current folder."""
    return load_student("my-student.yaml", text="\n".join(draft.lines(stages, draft.methods)))


def _stem(arch: str, teacher: TeacherConfig) -> str:
    """Return the stem that suits the image size; "" for a network without a stem."""
    from teach_once.nets.networks.archs import has_stem

    if not has_stem(arch):
        return ""
    height, width, _ = view_shape(
        load_dataset(teacher.dataset).train.first_shape, teacher.views.augment
    )
    is_small = arch in TORCHVISION_RESNETS and min(height, width) <= _SMALL_PX
    return "cifar" if is_small else "imagenet"


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)
