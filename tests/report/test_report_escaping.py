"""Text in a run's files appears as text in the report."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from teach_once.report.charts import as_png, errors_by_method
from teach_once.report.escape import as_code, for_csv, for_markdown
from teach_once.report.learning_curves import errors_by_epoch
from teach_once.report.page import Report, html_page, markdown_page
from teach_once.report.page_assets import SCRIPT
from teach_once.report.runs import Point, Result
from teach_once.report.table import csv_table, markdown_table, rows_of
from tests.report.test_report import RUNS, TEACHER
from tests.support.training.written_run import errors

NASTY = [
    r"$\frac{x$",
    "a$b",
    "<script>alert(1)</script>",
    "x | y |\n| forged | row |",
    "`code` ![](http://x) [a](b)",
    "=1+1",
    "@SUM(A1)",
    "a; =1+1;-2|@x",
    "\x1b[31mred\u202e\udcff\0",
    '"><img src=x onerror=alert(1)>',
]


_MORE_SEEDS = [
    dataclasses.replace(RUNS[index], seed=seed) for index, seed in ((-1, 1), (-1, 2), (0, 2))
]


def nasty_results(name: str) -> list[Result]:
    curve = (Point(1, 1.0, errors(9.0)), Point(2, 2.0, errors(5.0)))
    return [
        dataclasses.replace(
            run,
            method=run.method if run.method == "ce" else name,
            model=name,
            student=name,
            cache=name,
            cache_sha256=name,
            device=name,
            versions={name: name, "torch": name},
            curve=curve,
        )
        for run in [*RUNS, *_MORE_SEEDS]
    ]


def nasty_report(name: str) -> Report:
    results = nasty_results(name)
    return Report(f"Ablation of {name}", results, rows_of(results), TEACHER, name, [name])


def all_shown(text: str) -> bool:
    return all(c == "\n" or c.isprintable() for c in text) and "\u202e" not in text


def test_a_formula_behind_a_semicolon_or_with_a_wide_sign_is_text() -> None:
    assert for_csv("a; =1+1;-2|@x") == "a; '=1+1;'-2|'@x"
    assert for_csv("＝1+1") == "'＝1+1"
    assert for_csv("kd (a=1; b)") == "kd (a=1; b)"


@pytest.mark.parametrize("name", NASTY)
def test_a_markdown_table_keeps_its_cells_and_holds_no_markup(name: str) -> None:
    results = nasty_results(name)
    header, rule, *body = markdown_table(rows_of(results), TEACHER).splitlines()
    columns = header.count("|")
    assert len(body) == 1 + len({result.method for result in results})
    for line in [rule, *body]:
        assert len(re.findall(r"(?<!\\)\|", line)) == columns
        assert "<" not in line
        assert not re.search(r"(?<!\\)[`\[]", line)
    page = markdown_page(nasty_report(name))
    assert all_shown(page)
    outside_of_code = re.sub(r"`[^`\n]*`", "", page)
    assert "<" not in outside_of_code
    assert outside_of_code.count("](") == 1 + outside_of_code.count(r"\](")  # the picture


@pytest.mark.parametrize("name", NASTY)
def test_a_page_has_only_its_own_tags(name: str) -> None:
    tags, attributes, text, scripts = [], [], [], []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            attributes.extend(key for key, _ in attrs)

        def handle_data(self, data: str) -> None:
            (scripts if self.cdata_elem == "script" else text).append(data)

    page = html_page(nasty_report(name))
    Parser().feed(page)
    assert all_shown(page.replace("\n", ""))
    assert not {"iframe", "img", "object", "a", "foreignobject", "use"} & set(tags)
    assert not [key for key in attributes if key.startswith("on") or key in ("style", "src")]
    assert tags.count("script") == 1
    assert "".join(scripts) == SCRIPT
    assert tags.count("svg") == 4 + 1  # learning curves and one paired difference
    if name.isprintable():
        assert any(name in data for data in text)


@pytest.mark.parametrize("name", NASTY)
def test_a_spreadsheet_finds_no_formula_in_the_csv(name: str) -> None:
    rows = list(csv.reader(io.StringIO(csv_table(nasty_results(name)))))
    assert len(rows) == 1 + len(nasty_results(name))
    assert len({len(row) for row in rows}) == 1
    assert not [cell for row in rows for cell in row if re.match(r"\s*[=+@-]", cell)]
    assert all_shown("".join(map("".join, rows)))


@pytest.mark.parametrize("name", NASTY)
def test_charts_show_names_literally(name: str) -> None:
    results = nasty_results(name)
    picture = as_png(errors_by_method(rows_of(results), results, TEACHER))
    assert Image.open(io.BytesIO(picture)).format == "PNG"
    svg = ElementTree.fromstring(errors_by_epoch(results))
    assert not [element for element in svg.iter() if element.tag.endswith("script")]


def test_ordinary_names_stay_as_they_are() -> None:
    for escaped in (for_markdown, for_csv):
        assert escaped("cd+gkd+edt_2-live") == "cd+gkd+edt_2-live"
    assert as_code("make ablation ARGS='a=1'") == "`make ablation ARGS='a=1'`"
    assert as_code("a `b` c").count("`") == 2


def test_many_methods_still_fit_into_a_picture() -> None:
    results = [dataclasses.replace(RUNS[0], method=f"m{number}") for number in range(200)]
    picture = as_png(errors_by_method(rows_of(results), results, TEACHER))
    assert max(Image.open(io.BytesIO(picture)).size) < 2**14
