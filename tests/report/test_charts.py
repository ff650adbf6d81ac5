"""Charts: sorted rows, direct labels, axes without outliers, text of a readable size."""

from __future__ import annotations

import itertools
import re

import pytest

from teach_once.report.charts import (
    FONT_PX,
    WIDTH,
    Dot,
    as_png,
    as_svg,
    dot_chart,
    learning_curves,
    range_of,
)
from teach_once.report.learning_curves import BEST, Curve, CurvePoint, color_classes
from teach_once.report.page_assets import DARK, LIGHT

DOTS = [Dot("ce", 32.0, 0.0, (31.9, 32.1)), Dot("kd", 28.0), Dot("cd", 28.5), Dot("at", 90.0)]


def curves(number: int) -> list[Curve]:
    return [
        Curve(f"m{n}", 1, [CurvePoint(1, 40.0 + n, None), CurvePoint(2, 20.0 + n, None)])
        for n in range(number)
    ]


def texts(svg: bytes) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], (1.0, 4.0)),
        ([1.0, 2.0, 3.0, 30.0], (1.0, 3.0)),
        ([-30.0, 1.0, 2.0, 3.0], (1.0, 3.0)),
        ([1.0, 2.0, 30.0], (1.0, 30.0)),  # too few to call one an outlier
        ([5.0], (5.0, 5.0)),
    ],
)
def test_range_of_means_leaves_out_what_alone_doubles_it(
    means: list[float], expected: tuple[float, float]
) -> None:
    assert range_of(means) == expected


def test_dot_chart_sorts_rows_and_names_lines_and_an_outlier_keeps_its_number() -> None:
    figure = dot_chart(DOTS, "error", {"teacher": 5.0, "student alone": 32.0})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["kd", "cd", "ce", "at"]
    assert axes.get_xlim()[1] < 40
    found = texts(as_svg(figure))
    assert {"← teacher 5.00", "student alone 32.00", "90.00", "28.00"} <= set(found)


def test_svg_has_text_of_a_readable_size_and_both_schemes() -> None:
    svg = as_svg(dot_chart(DOTS, "error", {"teacher": 27.0})).decode()
    assert f'width="{WIDTH}"' in svg
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
    assert sizes
    assert min(sizes) >= FONT_PX
    assert FONT_PX * 368 / WIDTH >= 11  # where a phone shows the picture
    style, body = svg.split("</style>", 1)
    assert "prefers-color-scheme: dark" in style
    assert DARK[4] in style
    assert LIGHT[4] not in body


def test_png_has_three_pixels_per_px_and_begins_as_one() -> None:
    assert as_png(dot_chart(DOTS, "error", {})).startswith(b"\x89PNG")


def test_learning_curves_name_the_best_five_in_color_and_count_the_others() -> None:
    figure = learning_curves(curves(8))
    names = [text.get_text() for text in figure.axes[0].texts]
    assert names == [*(f"m{n}" for n in range(BEST)), "3 others"]
    colors = [line.get_color() for line in figure.axes[0].lines][::-1]
    assert colors[:BEST] == list(LIGHT[1 : BEST + 1])
    assert len(set(colors[BEST:])) == 1


def test_color_classes_are_by_rank_at_the_end() -> None:
    by_rank = color_classes(curves(7)[::-1])
    assert by_rank[:2] == ["others", "others"]
    assert by_rank[-1].endswith("1")


LONG = [
    Dot(
        f"cd+gkd+edt (training.optimizer.learning_rate={rate}, training.optimizer.weight_decay="
        f"{rate / 1000}, training.schedule={schedule!r}, training.loss_scale=1.5)",
        8.0 + rate,
    )
    for rate in (0.05, 0.1, 0.2)
    for schedule in ("cosine", "step")
]


@pytest.mark.parametrize(
    "dots", [LONG, [Dot("m" * 5000, 8.0), Dot("x", 9.0)], [Dot("$a " * 60, 8.0)], DOTS]
)
def test_axes_of_a_dot_chart_keep_half_of_the_width(dots: list[Dot]) -> None:
    figure = dot_chart(dots, "error", {"teacher": 7.0})
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_position().width >= 0.5
    labels = axes.get_yticklabels()
    assert len({label.get_text() for label in labels}) == len(dots)
    boxes = [label.get_window_extent() for label in labels]
    assert min(box.x0 for box in boxes) >= 0
    ends = [(box.y0, box.y1) for box in sorted(boxes, key=lambda box: box.y0)]
    assert all(below[1] <= above[0] for below, above in itertools.pairwise(ends))


def test_long_labels_name_settings_by_their_last_part_and_short_ones_stay_whole() -> None:
    (axes,) = dot_chart([*LONG[:1], Dot("kd (training.a=1)", 1.0)], "error", {}).axes
    short, long = (label.get_text() for label in axes.get_yticklabels())
    assert short == "kd (training.a=1)"
    assert long.startswith("cd+gkd+edt\n(learning_rat")
    assert "training." not in long
    assert "…" in long
    assert long.replace("\n", "").endswith("scale=1.5)")


def test_learning_curves_with_long_names_keep_half_of_the_width() -> None:
    points = [CurvePoint(1, 40.0, None), CurvePoint(2, 20.0, None)]
    figure = learning_curves([Curve(dot.label, 1, points) for dot in LONG])
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().width >= 0.5
