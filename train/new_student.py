"""python -m configs new-student ARCH --teacher FILE > my-student.yaml

Writes a student's file: a network, a recipe, and the methods that work between it and the teacher's
cache. Nothing is trained or downloaded, and no cache is needed.

It stands here because it needs networks and losses; `python -m configs` hands over to it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from configs.load import load_student, load_teacher
from configs.schema import StudentConfig, TeacherConfig
from configs.yaml_subset import yaml_text
from nets.archs import TORCHVISION_RESNETS
from nets.names import check_arch
from runtime.commands import new_app, run_command
from runtime.errors import UserError
from views.augment import view_shape
from views.datasets import load_dataset

app = new_app()
_SMALL_PX = 64  # smaller images have no pixels to spare for a stem with stride
# From the simplest on. The first terms are what all of them have.
_METHODS = {
    "ce": "[{loss: ce}]",
    "kd": "[{loss: ce, weight: 0.1}, {loss: kd, weight: 0.9, temperature: 4}]",
    "cd": "[{loss: ce}, {loss: cd, weight: 6}]",
    "cd+gkd": "[{loss: ce}, {loss: gkd}, {loss: cd, weight: 6}]",
    "embedding": "[{loss: ce}, {loss: embedding}]",
    "cd+embedding": "[{loss: ce}, {loss: cd, weight: 6}, {loss: embedding}]",
}


@app.command()
def main(
    arch: Annotated[str, typer.Argument(help="see python -m nets list")],
    teacher: Annotated[str, typer.Option(help="the teacher's file, or a name in configs/teacher")],
    epochs: Annotated[int, typer.Option(min=1, help="passes over the images")] = 30,
    batch_size: Annotated[int, typer.Option(min=2, help="images per step")] = 64,
) -> None:
    """Print a student's file."""
    print(student_file(arch, teacher, epochs, batch_size), end="")


def student_file(arch: str, teacher: str, epochs: int, batch_size: int) -> str:
    """The file's text. Raises UserError where no method works."""
    check_arch(arch)
    config = load_teacher(teacher)
    draft = _Draft(arch, teacher, epochs, batch_size, _stem(arch, config))
    stages, why_not = _methods_that_work(draft, config)
    working = {name: terms for name, terms in _METHODS.items() if name not in why_not}
    lines = draft.lines(stages, working)
    left_out = [f"# {name} is left out: {why}" for name, why in why_not.items()]
    return "\n".join([f"# {arch}, taught by {teacher}.", *left_out, *lines, ""])


@dataclass(frozen=True)
class _Draft:
    arch: str
    teacher: str
    epochs: int
    batch_size: int
    stem: str

    def lines(self, stages: str, methods: Mapping[str, str]) -> list[str]:
        """The file without its comments above."""
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
            "",
            "training:",
            f"  epochs: {self.epochs}",
            f"  batch_size: {self.batch_size}",
            f"  learning_rate: {rate:g}",
            "  optimizer: {kind: adamw}",
            "  weight_decay: 0.05",
            "  decay_norms_and_biases: false",
            f"  schedule: {{kind: cosine, warmup_epochs: {warmup}, last_learning_rate: 1e-5}}",
            "  precision: float32  # bfloat16 on a GPU",
            "",
            "methods:",
            *(f"  {name}: {terms}" for name, terms in methods.items()),
        ]


def _methods_that_work(draft: _Draft, teacher: TeacherConfig) -> tuple[str, dict[str, str]]:
    """The stages to write, "" for the architecture's own; and why methods do not work.

    Raises ArchError where not even labels can be learned from.
    """
    from train.check import check_before_the_pass, check_student, check_teacher

    dataset = load_dataset(teacher.dataset)
    taps = check_teacher(teacher, dataset)
    shape = view_shape(dataset.train.first_shape, teacher.views.augment)
    stages = _stages(draft.arch, sum(name.startswith("stage") for name in taps))
    config = _config_of(draft, stages, teacher)
    why_not: dict[str, str] = {}
    for name, terms in config.methods.items():
        try:
            check_before_the_pass(config, teacher, [name])
            check_student(config, terms, taps, shape, dataset.num_classes)
        except UserError as error:
            if name == "ce":
                raise
            why_not[name] = error.problem.split(";")[0].splitlines()[-1].strip()
    return stages, why_not


def _stages(arch: str, wanted: int) -> str:
    """As many of the architecture's stages as the teacher has, the last ones; "" for all of them.

    "" too where there are fewer, which the check of the methods then tells.
    """
    from nets.names import default_stages

    own = default_stages(arch)
    if not wanted or len(own) <= wanted:
        return ""
    return f"[{', '.join(own[-wanted:])}]"


def _config_of(draft: _Draft, stages: str, teacher: TeacherConfig) -> StudentConfig:
    """The file as it would be loaded, whatever its teacher's path means from where it will lie."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "new.yaml"
        file.write_text("\n".join(draft.lines(stages, _METHODS)), encoding="utf-8")
        return load_student(
            file,
            [f"teacher={json.dumps(str(Path(draft.teacher).absolute()))}"]
            if Path(draft.teacher).suffix in (".yaml", ".yml")
            else [],
        )


def _stem(arch: str, teacher: TeacherConfig) -> str:
    """Of the networks that have one, what suits the size of the images; "" of the others."""
    from nets.archs import has_stem

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


if __name__ == "__main__":
    sys.exit(cli())
