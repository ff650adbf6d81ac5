"""A picture of a cache: channel means, the teacher's confidence and accuracy, and its views."""

from __future__ import annotations

import io
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from teach_once.runtime.safe.text import in_plot, one_line
from teach_once.store.format.spec import kind_of
from teach_once.store.identity import field_of
from teach_once.store.read.reader import TeacherCache

_SHOWN_CLASSES = 20
_LONGEST_NAME = 40  # in characters
_MOST_VIEWS = 12
_BLUE, _GREEN = "#1b4f8f", "#2a7f3f"


def picture(cache: TeacherCache) -> bytes:
    """Draw the picture as PNG bytes. Reads view 0, and sample 0 of the other views."""
    records = cache.read_view(0)
    figure = Figure(figsize=(11, 8.5), dpi=110, layout="constrained")
    figure.suptitle(_title(cache), fontsize=11)
    upper, lower = cast(Any, figure.subfigures(2, 1, height_ratios=[1.25, 1]))
    means, confidence, right = upper.subplots(1, 3, width_ratios=[1.2, 1, 1])
    _draw_means(means, cache, records)
    if {"logits", "correct"} <= records.keys():
        _draw_confidence(confidence, records)
        _draw_agreement(right, cache, records)
    else:
        upper.delaxes(confidence)
        upper.delaxes(right)
    _draw_views(lower, cache)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _title(cache: TeacherCache) -> str:
    measured = cache.measured
    arch, top1 = field_of(cache.identity, "teacher", "arch"), measured.get("test_top1_error")
    error = "" if top1 is None else f", test error {top1:.2f} % top-1"
    return in_plot(
        f"{cache.path.name}: {arch}{error}; {cache.num_views} views x {cache.num_samples:,} samples"
    )


def _draw_means(axes: Axes, cache: TeacherCache, records: dict[str, NDArray[Any]]) -> None:
    vectors = [name for name in cache.taps if kind_of(name) in ("stage", "embedding")]
    values = [records[name].mean(axis=0) for name in vectors]
    axes.boxplot(values, tick_labels=vectors, showfliers=True, flierprops={"ms": 3})
    axes.set_title("channel means, one point per channel,\naveraged over the samples", fontsize=9)
    axes.set_ylabel("spatial mean of the activation")
    axes.grid(axis="y", alpha=0.3)


def _draw_confidence(axes: Axes, records: dict[str, NDArray[Any]]) -> None:
    top = _softmax(records["logits"]).max(axis=1)
    correct = records["correct"].astype(bool)
    bins = np.linspace(0, 1, 26).tolist()
    axes.hist(
        [top[correct], top[~correct]],
        bins=bins,
        stacked=True,
        color=[_GREEN, "#b03a2e"],
        label=["right", "wrong"],
    )
    axes.set_yscale("log")
    axes.set_title("confidence of the teacher, view 0", fontsize=9)
    axes.set_xlabel("probability of its first class")
    axes.set_ylabel("samples")
    axes.legend(fontsize=8)


def _draw_agreement(axes: Axes, cache: TeacherCache, records: dict[str, NDArray[Any]]) -> None:
    names, labels_of_samples = cache.class_names, cache.labels
    assert names is not None  # caches with `correct` have classes
    assert labels_of_samples is not None
    counts = np.bincount(labels_of_samples, minlength=len(names))
    hits = np.bincount(labels_of_samples, weights=records["correct"], minlength=len(names))
    right = hits / np.maximum(counts, 1)
    shown = np.argsort(right)[:_SHOWN_CLASSES] if len(names) > _SHOWN_CLASSES else range(len(names))
    labels = [_class_name(names[i]) for i in shown]
    axes.barh(labels, 100 * right[list(shown)], color=_BLUE)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    which = f"its {_SHOWN_CLASSES} hardest classes" if len(names) > _SHOWN_CLASSES else "per class"
    axes.set_title(f"teacher agrees with the label, {which},\nview 0 (%)", fontsize=9)
    axes.tick_params(axis="y", labelsize=8)


def _draw_views(figure: SubFigure, cache: TeacherCache) -> None:
    names, labels = cache.class_names, cache.labels
    title = "views of sample 0"
    if names is not None and labels is not None:
        label = _class_name(names[labels[0]])
        title += f" (label: {label}), with the teacher's first class"
    figure.suptitle(title, fontsize=9)
    views = cache.preview[: min(cache.num_views, _MOST_VIEWS)]
    columns = min(6, len(views))
    grid = figure.subplots(-(-len(views) // columns), columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for view, (axes, pixels) in enumerate(zip(grid, views, strict=False)):
        colored = pixels.shape[2] == 3
        axes.imshow(pixels if colored else pixels[..., 0], cmap=None if colored else "gray")
        axes.set_title(f"{view}{_first_class(cache, view)}", fontsize=8)


def _first_class(cache: TeacherCache, view: int) -> str:
    """Return the teacher's first class of sample 0 and its probability; "" without classes."""
    names = cache.manifest.class_names
    if names is None or "logits" not in cache.taps:
        return ""
    first = _softmax(cache.read([0], view, ["logits"])["logits"])[0]
    return f": {_class_name(names[first.argmax()])} {100 * first.max():.0f} %"


def _class_name(name: str) -> str:
    return in_plot(one_line(name, _LONGEST_NAME))


def _softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))
