"""teach-once new-teacher timm:MODEL --dataset imagefolder --root FOLDER > my.yaml

Writes a teacher's config for one of timm's models: the normalization, crop and interpolation of its
training, its stages, and the size of a cached record. Nothing is downloaded, and no weights are
needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from teach_once.configs.load import ConfigError, load_teacher
from teach_once.configs.schema import TeacherConfig
from teach_once.configs.yaml_subset import yaml_text
from teach_once.nets.networks.archs import TIMM_PREFIX, ArchError, timm_model
from teach_once.precompute.compute.setup import Setup, setup_of
from teach_once.runtime.command.frame import new_app, run_command
from teach_once.runtime.command.program import program_text
from teach_once.runtime.errors import did_you_mean
from teach_once.runtime.formats import counted, format_size
from teach_once.runtime.safe.text import one_line
from teach_once.views.augment.augment import view_shape
from teach_once.views.datasets import Dataset, load_dataset

app = new_app()
_PRETRAINED = "timm:pretrained"


@app.command()
def main(
    arch: Annotated[
        str, typer.Argument(metavar="timm:MODEL", help=f"see {program_text('nets')} list")
    ],
    dataset: Annotated[
        Literal["imagefolder", "images", "packed"],
        typer.Option(help="type of the dataset; images: a folder without labels"),
    ] = "imagefolder",
    root: Annotated[
        Path | None, typer.Option(help="folder that contains train/ and val/, or images")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="the packed file")] = None,
    weights: Annotated[str, typer.Option(help="file, or timm:pretrained")] = _PRETRAINED,
    count: Annotated[int, typer.Option(min=1, help="views per image")] = 16,
    size: Annotated[
        int | None, typer.Option(min=1, help="pixels of a view (default: as in training)")
    ] = None,
) -> None:
    """Print a teacher's config file for one of timm's models."""
    key, place = ("file", file) if dataset == "packed" else ("root", root)
    if place is None:
        raise ConfigError(f"--dataset {dataset} requires --{key}", fix=f"add --{key} PATH")
    if not timm_model(arch):
        raise _not_timms(arch)
    print(teacher_file(arch, {"type": dataset, key: str(place)}, weights, count, size), end="")


def _not_timms(arch: str) -> ArchError:
    from teach_once.nets.networks.timm_models import import_timm

    problem = f"{one_line(arch)} is not one of timm's models, whose image sizes are known"
    models = [TIMM_PREFIX + name for name in import_timm().list_models()]
    if near := did_you_mean(TIMM_PREFIX + arch, models):
        return ArchError(f"{problem}{near}")
    other = f"{program_text('configs')} teacher imagenet-resnet34"
    return ArchError(problem, fix=f"start from another file: {other}")


def teacher_file(
    arch: str, dataset: Mapping[str, str], weights: str, count: int, size: int | None = None
) -> str:
    """Return the file's text. Raises UserError if the model cannot be used.

    dataset: its `type` and its location. size: pixels of a view.
    """
    draft = Draft(arch, dataset, weights, count, size)
    data = load_dataset(draft.config({"logits": None, "embedding": "float16"}).dataset)
    taps: dict[str, Any] = {"logits": None, "channel_means": "float16", "embedding": "float16"}
    why = _why_no_logits(draft, data)
    if not why:
        taps = {"logits": "float16", "channel_means": "float16"}
    return _text(draft, data, taps, why)


@dataclass(frozen=True)
class Draft:
    """The settings of a file. dataset: its `type` and its location."""

    arch: str
    dataset: Mapping[str, str]
    weights: str
    count: int
    size: int | None = None

    @property
    def pixels(self) -> Any:
        """timm's configuration of the model's published weights."""
        from teach_once.nets.networks.timm_models import pretrained_cfg

        return pretrained_cfg(timm_model(self.arch))

    @property
    def size_px(self) -> int:
        if self.size is not None:
            return self.size
        _, height, width = self.pixels.input_size
        if height != width:
            raise ArchError(
                f"{self.arch} needs images of {height}x{width} pixels, but views are square",
                fix="choose another model",
            )
        return int(height)

    def lines(self, taps: Mapping[str, Any], stages: str = "null") -> list[str]:
        """Return the file without its head comments; taps: key -> dtype."""
        cfg, size = self.pixels, self.size_px
        (key, place) = next(item for item in self.dataset.items() if item[0] != "type")
        resize = math.floor(size / cfg.crop_pct)
        fit = f"size_px: {size}, interpolation: {_interpolation(cfg)}"
        shown = f"crop_px: {size}, interpolation: {_interpolation(cfg)}"
        return [
            "dataset:",
            f"  type: {self.dataset['type']}",
            f"  {key}: {yaml_text(place)}",
            f"  normalization: {{mean: {list(cfg.mean)}, std: {list(cfg.std)}}}{self._whose()}",
            "",
            "views:",
            f"  augment: {{type: random-resized-crop, {fit}}}",
            "  seed: 0",
            f"  count: {self.count}  # epochs cycle through them; more can be added later",
            f"  evaluation: {{{_crop_type(cfg)}, resize_px: {resize}, {shown}{_fill(cfg)}}}",
            "",
            "teacher:",
            f"  arch: {self.arch}",
            f"  weights: {yaml_text(self.weights)}{_weights_comment(self.weights)}",
            "  # expected_error: 20.0  # known top-1 error (%) of these weights on test images:",
            "  # the pass warns if it measures a different error",
            "",
            "taps:",
            *(f"  {name}: {dtype or 'null'}" for name, dtype in taps.items()),
            f"  stages: {stages}",
        ]

    def _whose(self) -> str:
        """Return a comment on the normalization."""
        if self.weights == _PRETRAINED:
            return "  # the model's own"
        return "  # from timm's weights for this model: check that yours were trained with it"

    def config(self, taps: Mapping[str, Any]) -> TeacherConfig:
        """Return the config that would be loaded from the file in the current folder."""
        return load_teacher("my-teacher.yaml", text="\n".join(self.lines(taps)))


def _text(draft: Draft, data: Dataset, taps: dict[str, Any], why_no_logits: str) -> str:
    from teach_once.nets.networks.layout import TapError

    try:
        setup, shapes = _shapes(draft, data, taps)
    except TapError as error:
        taps |= {"channel_means": None, "embedding": "float16"}
        why_no_logits += f"\n# Its stages cannot be tapped: {error.problem}."
        setup, shapes = _shapes(draft, data, taps)
    stages = f"[{', '.join(setup.stages.values())}]" if taps.get("channel_means") else "null"
    return "\n".join([*_head(draft, setup, shapes, why_no_logits), *draft.lines(taps, stages), ""])


def _shapes(
    draft: Draft, data: Dataset, taps: Mapping[str, Any]
) -> tuple[Setup, dict[str, tuple[int, ...]]]:
    """Return the setup of the file, and the shapes of its taps."""
    from teach_once.nets.teacher.teacher import fresh_teacher

    config = draft.config(taps)
    setup = setup_of(config, data, Path())
    shape = view_shape(data.train.first_shape, config.views.augment)
    teacher = fresh_teacher(
        config.teacher,
        setup.stages,
        num_classes=setup.num_classes,
        image_shape=shape,
        has_embedding=bool(config.taps.embedding),
    )
    return setup, teacher.tap_shapes(shape, setup.taps)


def _head(
    draft: Draft, setup: Setup, shapes: Mapping[str, tuple[int, ...]], why_no_logits: str
) -> list[str]:
    """Return the file's head comments: the taps, their size, and what is missing."""
    specs = {tap.name: setup.tap_spec(tap, shapes[tap.name]) for tap in setup.taps}
    record = sum(spec.bytes_per_record for spec in specs.values())
    samples, views = len(setup.dataset.train), draft.count
    sizes = ", ".join(f"{name} {'x'.join(map(str, s.shape)) or 1}" for name, s in specs.items())
    total = format_size(record * samples * views)
    classes = setup.dataset.num_classes
    of_classes = f"of {classes:,} classes" if classes else "without labels"
    return [
        f"# {draft.arch} on {samples:,} images {of_classes}.",
        f"# A record takes {record:,} bytes ({sizes}):",
        f"# {counted(views, 'view')} x {samples:,} images: {total}.",
        *([f"# {why_no_logits}"] if why_no_logits else []),
    ]


def _why_no_logits(draft: Draft, data: Dataset) -> str:
    """Return why logits are not stored; "" if the classifier fits the dataset's classes."""
    cfg = draft.pixels
    if not data.has_labels:
        _load_if_there(draft, data)
        return (
            "No logits: the images have no labels. To store logits of the weights' own classes, "
            "for kd,\n# set taps.logits: float16 and teacher.num_classes."
        )
    if draft.weights == _PRETRAINED:
        if cfg.num_classes == data.num_classes:
            return ""
        has = f"have {cfg.num_classes:,} classes" if cfg.num_classes else "are without a classifier"
        return (
            f"No logits: the weights {has}, the images have {data.num_classes:,}. Students learn "
            f"from features."
        )
    try:
        _load_weights(draft, data, data.num_classes)
    except ArchError as error:
        if not Path(draft.weights).is_file():
            raise
        _load_weights(draft, data, 0)  # raises if more than the classifier differs
        return f"No logits: {' '.join(error.problem.split())}."
    return ""


def _load_if_there(draft: Draft, data: Dataset) -> None:
    """Raise ArchError if the weights are a file that does not fit the model without classifier."""
    if draft.weights != _PRETRAINED:
        _load_weights(draft, data, 0)


def _load_weights(draft: Draft, data: Dataset, num_classes: int) -> None:
    """Raise ArchError unless the weights fit the model; num_classes 0: without its classifier."""
    import torch

    from teach_once.nets.teacher.teacher import load_teacher_network

    config = draft.config({"embedding": "float16"})
    load_teacher_network(
        config.teacher,
        {},
        num_classes=num_classes,
        image_shape=view_shape(data.train.first_shape, config.views.augment),
        device=torch.device("cpu"),
        calibration=(),
    )


def _interpolation(cfg: Any) -> str:
    """Return timm's interpolation, or the nearest one that views support."""
    return "bilinear" if cfg.interpolation == "bilinear" else "bicubic"


def _crop_type(cfg: Any) -> str:
    """Return the evaluation transform for timm's `crop_mode`."""
    return f"type: {'center-crop' if cfg.crop_mode == 'center' else cfg.crop_mode}"


def _fill(cfg: Any) -> str:
    """Return the color of a border: the mean color, rounded as in timm."""
    color = [round(255 * channel) for channel in cfg.mean]
    return f", fill: {color}" if cfg.crop_mode == "border" else ""


def _weights_comment(weights: str) -> str:
    return "  # downloaded by the pass" if weights == _PRETRAINED else ""


def cli(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)
