"""The report's intervals, learning curves and paired differences."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest
from scipy import stats

from teach_once.report.differences import difference_cells, interval_bars
from teach_once.report.intervals import t_interval
from teach_once.report.learning_curves import (
    NARROW,
    WIDE,
    Size,
    curves_of,
    epochs_of,
    errors_by_epoch,
    errors_by_time,
    from_zero,
    learning_curves,
    of_errors,
    seconds_of,
    spread_apart,
)
from teach_once.report.page import Report, html_page
from teach_once.report.runs import Point, Result
from teach_once.report.table import rows_of
from tests.report.test_report import result
from tests.support.training.written_run import errors

SVG = "{http://www.w3.org/2000/svg}"


def run_of(method: str, seed: int, top1: Sequence[float | None]) -> Result:
    """Tested after each epoch, unless the error is None; a second and a tenth per seed long."""
    points = tuple(
        Point(n, n * (1 + seed / 10), None if error is None else errors(error))
        for n, error in enumerate(top1, 1)
    )
    return dataclasses.replace(result(method, seed, top1[-1] or 0.0), curve=points)


TWO_SEEDS = [run_of("kd", 0, [40, None, 9]), run_of("kd", 1, [50, 30, 13])]
THREE_SEEDS = [*TWO_SEEDS, run_of("kd", 2, [45, 20, 11])]


def series_of(svg: str) -> list[ElementTree.Element]:
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    return [group for group in groups if group.get("class", "").startswith("series ")]


def labels_of(svg: str) -> dict[str, tuple[float, float]]:
    """{text: (x, y)} of the labels at the lines' ends."""
    labels = [group.find(f"{SVG}text") for group in series_of(svg)]
    return {
        str(label.text): (float(label.attrib["x"]), float(label.attrib["y"]))
        for label in labels
        if label is not None
    }


def test_intervals_are_those_of_students_t() -> None:
    values = [7.0, 12.0, 9.0, 8.5]
    found = t_interval(values)
    assert found is not None
    expected = stats.t.interval(0.95, 3, loc=9.125, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert t_interval(values[:3]) is not None
    assert t_interval(values[:2]) is None


def test_a_curve_holds_means_over_the_epochs_that_all_seeds_were_tested_in() -> None:
    (by_epoch,), (by_time,) = (curves_of(TWO_SEEDS, x_of) for x_of in (epochs_of, seconds_of))
    assert [(point.x, point.mean) for point in by_epoch.points] == [(1, 45), (3, 11)]
    assert [point.interval for point in by_epoch.points] == [None, None]
    assert [point.x for point in by_time.points] == pytest.approx([1.05, 3.15])
    (of_three,) = curves_of(THREE_SEEDS, epochs_of)
    assert of_three.points[-1].interval == t_interval([9, 13, 11])
    assert curves_of([run_of("kd", 0, [None, None])], epochs_of) == []


def test_a_long_curve_is_thinned_and_keeps_its_end() -> None:
    (curve,) = curves_of([run_of("kd", 0, [50.0] * 2000 + [1.0])], epochs_of)
    assert len(curve.points) <= 400
    assert (curve.points[-1].x, curve.points[-1].mean) == (2001, 1.0)


@pytest.mark.parametrize("size", [WIDE, NARROW])
@pytest.mark.parametrize("count", [1, 12, 60])
def test_every_line_is_named_at_its_end_and_no_two_labels_overlap(size: Size, count: int) -> None:
    runs = [run_of(f"m{n}", 0, [50, 10 + n / 100]) for n in range(count)]
    svg = errors_by_epoch(runs, size)
    labels = labels_of(svg)
    assert list(labels) == [run.method for run in runs]
    heights = sorted(y for _, y in labels.values())
    assert all(b - a >= 15.9 for a, b in itertools.pairwise(heights))
    _, _, width, height = map(float, ElementTree.fromstring(svg).attrib["viewBox"].split())
    assert all(x + 8 * len(name) <= width and 0 < y < height for name, (x, y) in labels.items())


def test_labels_are_spread_no_further_than_they_must() -> None:
    assert spread_apart([50.0, 20.0], 10, 0, 100) == [50.0, 20.0]
    assert spread_apart([50.0, 50.0, 50.0], 10, 0, 100) == [40.0, 50.0, 60.0]
    assert spread_apart([99.0, 100.0, 3.0], 10, 0, 100) == [90.0, 100.0, 3.0]
    draw = random.Random(0)
    for _ in range(300):
        wanted = [draw.uniform(-20, 120) for _ in range(draw.randint(1, 11))]
        places = spread_apart(wanted, 10, 0, 100)
        in_order = [place for _, place in sorted(zip(wanted, places, strict=True))]
        assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(in_order))
        assert min(places) >= -1e-9
        assert max(places) <= 100 + 1e-9


def test_the_best_five_of_forty_methods_have_colors_and_the_others_are_gray() -> None:
    groups = series_of(errors_by_epoch([run_of(f"m{n}", 0, [50, 50 - n]) for n in range(40)]))
    classes = [group.attrib["class"].removeprefix("series ") for group in groups]
    assert classes[:35] == ["others"] * 35
    assert len(set(classes[35:])) == 5
    assert "others" not in classes[35:]


def test_a_method_of_several_seeds_has_a_band_and_a_bar_and_says_of_what() -> None:
    runs = [*THREE_SEEDS, *(run_of("ce", seed, [60, 50, 40 + seed]) for seed in (0, 1))]
    kd, ce = series_of(errors_by_epoch(runs))
    kinds = [[path.get("class") for path in group.iter(f"{SVG}path")] for group in (kd, ce)]
    assert {"band", "interval"} <= set(kinds[0])
    assert not {"band", "interval"} & set(kinds[1])
    low, high = stats.t.interval(0.95, 2, loc=11, scale=2 / 3**0.5)
    told = kd.find(f"{SVG}title")
    assert told is not None
    assert told.text == (f"kd: 11.00 % at the end, 95% interval {low:.2f} to {high:.2f}, 3 seeds")
    section = learning_curves(runs)[-1]
    assert "Bars next to the last epoch, and bands:" in section
    assert "95% confidence intervals of the mean (Student's t, n = 3 seeds)" in section
    assert "Lines without a bar have fewer than 3 seeds." in section
    assert "Lines without a bar" not in learning_curves(THREE_SEEDS)[-1]
    assert "No method has 3 seeds" in learning_curves(TWO_SEEDS)[-1]


def test_the_bands_of_many_methods_are_hidden_until_one_is_pointed_at() -> None:
    runs = [run_of(f"m{n}", seed, [50, 10 + seed]) for n in range(7) for seed in range(3)]
    assert 'class="chart wide crowded"' in errors_by_epoch(runs)
    assert 'class="chart wide"' in errors_by_epoch(runs[:-3])
    assert "Point at a line or its name" in learning_curves(runs)[-1]
    assert "Point at a line or its name" not in learning_curves(runs[:-3])[-1]


def test_axes_of_epochs_tick_at_whole_numbers_and_those_of_seconds_need_not() -> None:
    runs = [run_of("kd", 0, [5.0, 5.0])]
    ticks = [
        [float(text.text or "") for text in ElementTree.fromstring(svg).iter(f"{SVG}text")
         if text.get("class") == "centered" and re.fullmatch(r"[\d.]+", text.text or "")]
        for svg in (errors_by_epoch(runs), errors_by_time(runs))
    ]  # fmt: skip
    assert ticks[0] == [0, 1, 2]
    assert len(ticks[1]) > 3


@pytest.mark.parametrize("highest", [0.0, 1e-300, 0.02, 1, 7, 240, 12345.6, 1e14])
def test_an_axis_has_a_few_round_ticks_whatever_its_length(highest: float) -> None:
    for whole in (False, True):
        axis = from_zero(highest, 40, 600, whole=whole)
        assert 1 <= len(axis.ticks) <= 10
        assert axis.px(axis.ticks[0]) == 40
        assert axis.px(highest) <= 600


@pytest.mark.parametrize("errors", [[0.0], [100.0], [0.2, 0.3], [42.0, 44.0], [3.0, 90.0]])
def test_an_axis_of_errors_holds_them_all_in_order(errors: list[float]) -> None:
    axis = of_errors(errors, 400, 10)
    places = [axis.px(error) for error in errors]
    assert places == sorted(places, reverse=True)
    assert all(10 <= place <= 400 for place in places)
    assert 2 <= len(axis.ticks) <= 14


def test_paired_differences_have_the_interval_of_a_paired_t_test() -> None:
    ours, theirs = [7.0, 12.0, 9.0], [10.0, 14.0, 11.0]
    runs = [result("ce", seed, top1) for seed, top1 in enumerate(theirs)]
    runs += [result("kd", seed, top1) for seed, top1 in enumerate(ours)]
    runs += [result("cd", 1, 6.0)]  # one seed: in no line
    header, *lines = difference_cells(rows_of(runs))
    expected = stats.ttest_rel(ours, theirs)
    low, high = expected.confidence_interval(0.95)
    assert [cell.text for cell in header] == [
        *("method", "against", "seeds", "difference", "95% interval", "p")
    ]
    assert [[cell.text for cell in line] for line in lines] == [
        ["kd", "ce", "3", "-2.33", f"{low:+.2f} to {high:+.2f}", f"{expected.pvalue:.2g}"]
    ]
    assert difference_cells(rows_of([result("ce", 0, 9.0), result("kd", 0, 7.0)])) == []


def test_differences_of_two_seeds_have_no_interval_and_no_bar() -> None:
    runs = [result("ce", seed, top1) for seed, top1 in enumerate((10.0, 14.0, 11.0))]
    runs += [result("kd", seed, top1) for seed, top1 in enumerate((7.0, 12.0))]
    runs += [result("cd", seed, top1) for seed, top1 in enumerate((9.0, 13.0, 12.0))]
    _, *lines = difference_cells(rows_of(runs))
    bars = interval_bars(rows_of(runs))
    found = [
        (line[2].text, bool(line[4].text), bool(bar)) for line, bar in zip(lines, bars, strict=True)
    ]
    assert sorted(found) == [("2", False, False), ("2", False, False), ("3", True, True)]
    assert all(line[5].text for line in lines)
    page = html_page(Report("t", runs, rows_of(runs), {}, "All runs."))
    assert page.count('class="bar"') == 1
    assert "With fewer than 3 seeds, no interval is given." in page


def test_differences_without_any_spread_claim_no_interval() -> None:
    runs = [result(method, seed, 5.0) for method in ("ce", "kd") for seed in range(3)]
    _, (*_, difference, interval, p) = difference_cells(rows_of(runs))
    assert (difference.text, interval.text, p.text) == ("+0.00", "", "")
