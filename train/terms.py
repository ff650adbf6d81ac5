"""Loss terms: registered functions whose parameters define their inputs.

A custom loss takes a `Batch`; its other parameters are its options:

    @loss_term(teacher_taps=["logits"])
    def my_loss(batch: Batch, sharpness: float = 1.0) -> Tensor: ...

A config refers to it as `{loss: my_package.my_module:my_loss, options: {sharpness: 2.0}}`. A loss
may also name its inputs as parameters, see `INPUTS`. It is then a pure function of tensors, and the
taps that it needs follow from its signature:

    @loss_term()
    def my_loss(student_logits: Tensor, teacher_logits: Tensor, sharpness: float = 1.0): ...

The built-in losses in `train.losses` are registered this way: `kd` is short for
`teach_once.train.losses:kd`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch.nn.functional as F
from pydantic import StrictBool, TypeAdapter, ValidationError
from torch import Tensor

from teach_once.configs.schema import Fraction, LossTerm, NonNegativeFloat, PositiveFloat
from teach_once.configs.schema.scalars import Float
from teach_once.nets.networks.layout import size_like
from teach_once.nets.teacher.taps import Tap, channel_means, in_order, spatial_attention
from teach_once.runtime.command.user_code import CannotImport, import_named
from teach_once.runtime.errors import did_you_mean
from teach_once.store.format.spec import TapSpec
from teach_once.train.errors import TrainError

StudentOutput = Literal["logits", "means", "attention", "embedding", "hint", "pre_logits", "parts"]
Function = TypeVar("Function", bound=Callable[..., Tensor])

_LOSS = "__teach_once_loss__"  # attribute of a registered function
_BUILT_IN = "teach_once.train.losses"
# In a checkout's root, the short name can be imported too, as a second copy of the module.
_BUILT_IN_NAMES = ("", "train.losses", _BUILT_IN)
# Types of options that are checked, if they are in a loss's signature.
_OPTION_TYPES = {
    "PositiveFloat": PositiveFloat,
    "NonNegativeFloat": NonNegativeFloat,
    "Fraction": Fraction,
    "float": Float,
    "bool": StrictBool,
}


@dataclass(frozen=True)
class Batch:
    """A batch of B samples in the form that losses read.

    labels: (B,) int64; for mixed images the label with the larger fraction, while other_labels and
    other_shares (B,) contain the second label. logits: the student's, (B, K). means: after its
    connectors, per stage (B, C_l). maps: its feature maps, "stageN" -> (B, C, H, W). hint: after
    the regressor, in the teacher's channels. pre_logits: the input of its classifier, after a
    linear connector, in the size of the teacher's `embedding`. parts: the maps of student and
    assistant in the teacher's channels, see `nets.student`. teacher: name of a tap -> (B,
    ...). mean_squares: of the teacher's means in the cache, a number per stage. All tensors are on
    one device.
    """

    labels: Tensor
    logits: Tensor
    means: Sequence[Tensor] = ()
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    hint: Tensor | None = None
    pre_logits: Tensor | None = None
    parts: tuple[Tensor, Tensor] | None = None
    teacher: Mapping[str, Tensor] = field(default_factory=dict)
    other_labels: Tensor | None = None
    other_shares: Tensor | None = None
    mean_squares: Sequence[float] = ()

    def of_teacher(self, kind: Literal["stage", "attention"]) -> list[Tensor]:
        """Return the loaded taps `kind`1, `kind`2, ... in order."""
        return [self.teacher[name] for name in in_order(self.teacher, kind)]

    @property
    def embedding(self) -> Tensor:
        """Return (B, C), the channel means of the student's last stage, without a connector."""
        return channel_means(self.maps[in_order(self.maps, "stage")[-1]])

    @functools.cached_property
    def attentions(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return attention maps of both networks, per stage (B, positions), in the smaller size."""
        maps = [self.maps[stage] for stage in in_order(self.maps, "stage")]
        pairs = [
            _same_size(spatial_attention(map_), theirs, map_)
            for map_, theirs in zip(maps, self.of_teacher("attention"), strict=True)
        ]
        return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]

    @functools.cached_property
    def hints(self) -> tuple[Tensor, Tensor]:
        """Return the hints of student and teacher, (B, C, H, W), in the smaller size."""
        assert self.hint is not None
        ours, theirs = _same_map_size(self.hint, self.teacher["hint"])
        return ours, theirs

    @functools.cached_property
    def parts_and_hint(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the maps of student, assistant and teacher, (B, C, H, W), in the smaller size."""
        assert self.parts is not None
        student, assistant, teacher = _same_map_size(*self.parts, self.teacher["hint"])
        return student, assistant, teacher


@dataclass(frozen=True)
class Input:
    """The value of a loss's parameter, and what it requires from the cache and the student."""

    of: Callable[[Batch], object]
    taps: frozenset[str] = frozenset()
    student: frozenset[StudentOutput] = frozenset()


def _teachers(tap: str, of: Callable[[Batch], object]) -> Input:
    return Input(of, taps=frozenset({tap}))


def _students(output: StudentOutput, of: Callable[[Batch], object]) -> Input:
    return Input(of, student=frozenset({output}))


# Parameters with which a loss requests a part of the batch.
INPUTS: dict[str, Input] = {
    "labels": Input(lambda batch: batch.labels),
    "other_labels": Input(lambda batch: batch.other_labels),
    "other_shares": Input(lambda batch: batch.other_shares),
    "student_logits": _students("logits", lambda batch: batch.logits),
    "student_means": _students("means", lambda batch: batch.means),
    "student_attention": _students("attention", lambda batch: batch.attentions[0]),
    "student_embedding": _students("embedding", lambda batch: batch.embedding),
    "student_pre_logits": _students("pre_logits", lambda batch: batch.pre_logits),
    "student_hint": _students("hint", lambda batch: batch.hints[0]),
    "teacher_logits": _teachers("logits", lambda batch: batch.teacher["logits"]),
    "teacher_correct": _teachers("correct", lambda batch: batch.teacher["correct"]),
    "teacher_means": _teachers(
        "stages", lambda batch: batch.of_teacher("stage")[: len(batch.means)]
    ),
    "teacher_mean_squares": Input(lambda batch: batch.mean_squares),
    "teacher_attention": _teachers("attentions", lambda batch: batch.attentions[1]),
    "teacher_pre_logits": _teachers("embedding", lambda batch: batch.teacher["embedding"]),
    "teacher_embedding": _teachers("last_stage", lambda batch: batch.of_teacher("stage")[-1]),
    "student_part": _students("parts", lambda batch: batch.parts_and_hint[0]),
    "assistant_part": _students("parts", lambda batch: batch.parts_and_hint[1]),
    "teacher_hint": _teachers(
        "hint", lambda batch: batch.hints[1] if batch.parts is None else batch.parts_and_hint[2]
    ),
}


@dataclass(frozen=True)
class Loss:
    """A registered function and its requirements.

    teacher_taps: names of taps; "stages" means stage1 ... stageL, "attentions" means attention1 ...
    attentionL, and "last_stage" means stageL. student: parts of the student that it reads; "logits"
    also means that its gradient reaches the classifier. inputs: parameters that are `INPUTS`; empty
    if it takes the whole `Batch`. per_sample: it is a mean of values that each depend on one sample
    only.
    """

    function: Callable[..., Tensor]
    teacher_taps: frozenset[str]
    student: frozenset[StudentOutput]
    inputs: tuple[str, ...]
    per_sample: bool = False

    def compute(self, batch: Batch, **options: float) -> Tensor:
        """Compute the loss of a batch, a scalar. Raises TrainError if the function returns no
        scalar.
        """
        if not self.inputs:
            return self.scalar(self.function(batch, **options))
        return self.computed({name: INPUTS[name].of(batch) for name in self.inputs}, options)

    def computed(self, inputs: Mapping[str, object], options: Mapping[str, float]) -> Tensor:
        """Compute the loss from inputs named as in `INPUTS`; otherwise as `compute`."""
        return self.scalar(self.function(**inputs, **options))

    def scalar(self, returned: object) -> Tensor:
        """Return the value that the function returned. Raises TrainError unless it is a scalar
        tensor.
        """
        if isinstance(returned, Tensor) and returned.ndim == 0:
            return returned
        what = type(returned).__name__
        if isinstance(returned, Tensor):
            what = f"a tensor of shape {tuple(returned.shape)}"
        raise TrainError(
            f"the loss {self.function.__module__}:{self.function.__name__} returned {what}, "
            f"expected a scalar tensor",
            fix="return its mean over the batch, such as loss.mean()",
        )

    @property
    def needs_labels(self) -> bool:
        """True if it reads labels, or which samples the teacher classifies correctly.

        A function of the whole `Batch` may read labels without declaring it: they are -1 for images
        without labels, which torch's cross-entropy rejects.
        """
        return "labels" in self.inputs or "correct" in self.teacher_taps

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """Parameters that a config may set, by name."""
        parameters = inspect.signature(self.function).parameters
        of_batch = self.inputs or list(parameters)[:1]
        return {name: each for name, each in parameters.items() if name not in of_batch}


def loss_term(
    teacher_taps: Collection[str] = (),
    student: Collection[StudentOutput] = (),
    *,
    per_sample: bool = False,
) -> Callable[[Function], Function]:
    """Register a function as a loss, and return it unchanged.

    A function of a `Batch` must declare its inputs: teacher_taps and student as in `Loss`; default:
    only the student's logits. Parameters named as in `INPUTS` declare themselves. per_sample: see
    `Loss`. If several processes train one student, a per-sample loss is computed on each process's
    samples, and any other loss on all samples, which are exchanged for it.
    """

    def register(function: Function) -> Function:
        loss = _loss(function, teacher_taps, student)
        # Stored on the function, so that a module imported under two names has one registry.
        setattr(function, _LOSS, replace(loss, per_sample=per_sample))
        return function

    return register


def _loss(
    function: Callable[..., Tensor],
    teacher_taps: Collection[str],
    student: Collection[StudentOutput],
) -> Loss:
    parameters = inspect.signature(function).parameters
    inputs = tuple(name for name in parameters if name in INPUTS)
    if not inputs:
        return Loss(function, frozenset(teacher_taps), frozenset(student or ("logits",)), inputs)
    for name, each in parameters.items():
        is_named = name in inputs or each.default is not each.empty
        if not is_named and each.kind is each.POSITIONAL_OR_KEYWORD:
            raise TrainError(
                f"the loss {function.__name__!r} takes {name!r}, which is neither an input nor an "
                f"option with a default{did_you_mean(name, INPUTS)}",
                fix=f"use parameters among {', '.join(INPUTS)}, or only the whole batch",
            )
    return Loss(
        function,
        frozenset(teacher_taps).union(*(INPUTS[name].taps for name in inputs)),
        frozenset(student).union(*(INPUTS[name].student for name in inputs)),
        inputs,
    )


@functools.cache
def loss_named(name: str) -> Loss:
    """Find a built-in loss, or the user's own `package.module:name`. Raises TrainError."""
    module, _, attribute = name.rpartition(":")
    try:
        function = import_named(_BUILT_IN if module in _BUILT_IN_NAMES else module, attribute)
    except CannotImport as error:
        raise TrainError(
            f"loss {name!r} cannot be imported: {error.problem}",
            fix=error.fix,
        ) from None
    loss: Loss | None = getattr(function, _LOSS, None)
    if loss is None:
        raise TrainError(
            f"loss {name!r} is not registered",
            fix="add @loss_term(...) of teach_once.train.terms above it",
        )
    return loss


def check_options(where: str, term: LossTerm) -> None:
    """Raise TrainError if a term has unknown options or lacks an option without a default.

    where: the term's key in its file, such as "methods.kd.1".
    """
    known = loss_named(term.loss).options
    takes_any = any(each.kind is each.VAR_KEYWORD for each in known.values())
    for name in term.options:
        if name not in known and not takes_any:
            near = did_you_mean(name, known)
            raise TrainError(f"{where}: the loss {term.loss!r} has no option {name!r}{near}")
        if name in known:
            _check_value(f"{where}.options.{name}", term.options[name], known[name])
    for name, each in known.items():
        is_required = each.default is each.empty and each.kind is not each.VAR_KEYWORD
        if is_required and name not in term.options:
            raise TrainError(
                f"{where}: the loss {term.loss!r} has no default for {name!r}",
                fix=f"set {where}.options.{name}=NUMBER",
            )


def _check_value(where: str, value: float, parameter: inspect.Parameter) -> None:
    """Raise TrainError if a value does not have its parameter's type."""
    kind = _OPTION_TYPES.get(str(parameter.annotation))
    if kind is None:
        return
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise TrainError(f"{where}: {error.errors()[0]['msg']}") from None


def expanded_taps(loss: Loss, stages: Sequence[str]) -> set[str]:
    """Return the names of the taps that a loss needs of a cache with these stages."""
    groups = {
        "stages": set(stages),
        "attentions": {Tap("attention", stage).name for stage in stages},
        "last_stage": set(stages[-1:]) or {"the means of a stage"},
    }
    return set().union(*(groups.get(tap, {tap}) for tap in loss.teacher_taps))


def looked_at(terms: Iterable[LossTerm]) -> set[str]:
    """Return the parts of the student that the losses read."""
    return {output for term in terms for output in loss_named(term.loss).student}


def head_classes(
    method: str, terms: Iterable[LossTerm], num_classes: int, taps: Mapping[str, TapSpec]
) -> int:
    """Return the number of the student's logits; 0 if no loss reads logits: it has no classifier.

    num_classes: of the images; without labels (0) the student has the classes of the teacher's
    logits in `taps`. Raises TrainError if a loss reads logits of unknown classes.
    """
    if "logits" not in looked_at(terms):
        return 0
    if not num_classes and "logits" not in taps:
        raise TrainError(
            f"methods.{method} reads the student's logits, but neither the images nor the cache "
            f"have classes",
            fix="set teacher.num_classes and taps.logits in the teacher's file, or omit the method",
        )
    return num_classes or taps["logits"].shape[0]


def taps_of(terms: Iterable[LossTerm], stages: Sequence[str]) -> set[str]:
    """Return the names of the taps that a method needs of a cache with these stages."""
    return {tap for term in terms for tap in expanded_taps(loss_named(term.loss), stages)}


def _same_map_size(*maps: Tensor) -> Sequence[Tensor]:
    """Average maps (B, C, H, W) to the size of the smallest, if they differ."""
    sizes = {tuple(each.shape[2:]) for each in maps}
    if len(sizes) == 1:
        return maps
    height, width = min(sizes)
    return [F.adaptive_avg_pool2d(each.float(), (height, width)) for each in maps]


def _same_size(ours: Tensor, theirs: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Average the larger of two attention maps (B, positions) to the size of the smaller one.

    maps: the student's, (B, C, H, W). The teacher's map is assumed to have the same aspect ratio,
    because both networks process the same images.
    """
    if ours.shape == theirs.shape:
        return ours, theirs
    height, width = maps.shape[2:]
    size = size_like(height, width, theirs.shape[1])
    assert size is not None  # checked before the run: `train.method.connectors`
    smaller = min(height, size[0]), min(width, size[1])
    pooled = []
    for attention, shape in ((ours, (height, width)), (theirs, size)):
        map_ = F.adaptive_avg_pool2d(attention.float().reshape(-1, 1, *shape), smaller)
        pooled.append(F.normalize(map_.flatten(1), dim=1, eps=1e-12))
    return pooled[0], pooled[1]
