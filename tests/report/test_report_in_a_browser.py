"""The report in a real browser: light and dark, wide and narrow, with and without scripts."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from teach_once.report.learning_curves import BEST
from teach_once.report.page import Report, html_page
from teach_once.report.page_assets import DARK, DARK_PAPER, LIGHT, LIGHT_PAPER
from teach_once.report.runs import Result
from teach_once.report.table import rows_of
from tests.report.test_report import TEACHER
from tests.report.test_report_curves import run_of

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium (.ci/run installs it)")
SCHEMES = {"dark": 0, "light": 1}  # Chromium's numbers

# Opens the page in frames of either width, with scripts and without.
PROBE = """<!doctype html><body><script>
const page = PAGE;
const open = (width, may_run) => new Promise(done => {
  const frame = document.createElement("iframe");
  Object.assign(frame, {width, height: 1200, srcdoc: page});
  if (!may_run) frame.sandbox = "allow-same-origin";
  frame.onload = () => done(frame.contentDocument);
  document.body.append(frame);
});
const shown = inside => [...inside.querySelectorAll("svg.chart")]
  .filter(chart => chart.getClientRects().length)
  .map(chart => `${chart.classList[1]} ${chart.parentElement.className}`);
const methods = inside => [...inside.querySelector("table").tBodies[0].rows]
  .map(row => row.cells[0].textContent);
const look = inside => {
  const seen = {charts: shown(inside)};
  const chart = [...inside.querySelectorAll("svg.chart")].find(c => c.getClientRects().length);
  const texts = [...chart.querySelectorAll("text")].map(text => text.getBoundingClientRect());
  seen.overlaps = texts.some((a, at) => texts.slice(at + 1).some(b =>
    a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom));
  seen.cut = texts.some(text => text.right > chart.getBoundingClientRect().right + 1);
  const root = inside.documentElement;
  seen.wide = root.scrollWidth > root.clientWidth;
  seen.paper = getComputedStyle(inside.body).backgroundColor;
  seen.lines = [...chart.querySelectorAll(".line")].map(line => getComputedStyle(line).stroke);
  inside.getElementById("by-time").click();
  seen.after_the_switch = shown(inside);
  return seen;
};
const sort = (inside, column) => {
  const orders = [];
  const head = inside.querySelector("table").tHead.rows[0].cells[column];
  for (let click = 0; click < 3; click++) {
    head.querySelector("button").click();
    orders.push([head.getAttribute("aria-sort"), methods(inside)]);
  }
  return orders;
};
(async () => {
  const found = {};
  for (const width of [1280, 390]) {
    const inside = await open(width, true);
    found[width] = {...look(inside), by_error: sort(inside, 3), by_name: sort(inside, 0)};
    const still = await open(width, false);
    found[width].still = {...look(still), buttons: still.querySelectorAll("button").length};
  }
  document.body.dataset.probe = JSON.stringify(found);
})();
</script>"""


def page_runs() -> list[Result]:
    """Twelve methods, some with three seeds; one has a long name with markup in it."""
    names = ["ce", "kd", "m10", "m9", *(f"cd+{n}" for n in range(7)), "<b>a long name</b>" * 3]
    return [
        run_of(name, seed, [60, 20, 9 + seed + number / 8])
        for number, name in enumerate(names)
        for seed in range(1 + 2 * (number % 2))
    ]


def page() -> str:
    runs = page_runs()
    return html_page(Report("Ablation of small", runs, rows_of(runs), TEACHER, "All runs.", ["x"]))


def mean_errors() -> dict[str, float]:
    means = {row.method: row.cells["last_top1_error"].mean for row in rows_of(page_runs())}
    return {"teacher": TEACHER["test_top1_error"], **means}


def browse(text: str, tmp_path: Path, scheme: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "page.html"
    file.write_text(text)
    quiet = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    quiet += ["disable-component-update", "disable-sync", "no-sandbox", "headless"]
    return subprocess.run(
        [
            str(BROWSER),
            *(f"--{flag}" for flag in quiet),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            "--window-size=1400,1200",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def rgb(color: str) -> str:
    return f"rgb({', '.join(str(int(color[at : at + 2], 16)) for at in (1, 3, 5))})"


def probed(tmp_path: Path, scheme: str) -> Any:
    probe = PROBE.replace("PAGE", json.dumps(page()).replace("</", "<\\/"))
    result = browse(probe, tmp_path, scheme)
    told = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert all("Blocked script execution" in line for line in told)  # in the frames without
    (found,) = re.findall(r'data-probe="([^"]*)"', result.stdout)
    return json.loads(html.unescape(found))


def expected_lines(scheme: str) -> list[str]:
    """A color for each of the five methods with the lowest error, gray for the others."""
    colors, quiet = (DARK, "#a3adb8") if scheme == "dark" else (LIGHT, "#5b6672")
    methods = [row.method for row in rows_of(page_runs())]
    by_error = sorted(methods, key=mean_errors().__getitem__)
    ranks = map(by_error.index, methods)
    return [colors[rank + 1] if rank < BEST else quiet for rank in ranks]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_browser_shows_sorts_and_switches_the_page_without_an_error(
    tmp_path: Path, scheme: str
) -> None:
    paper = DARK_PAPER if scheme == "dark" else LIGHT_PAPER
    names = [row.method for row in rows_of(page_runs())]
    for width, seen in probed(tmp_path, scheme).items():
        size = "narrow" if width == "390" else "wide"
        for each in (seen, seen["still"]):
            assert each["charts"] == [f"{size} by-epoch"]
            assert each["after_the_switch"] == [f"{size} by-time"]
            assert (each["overlaps"], each["cut"], each["wide"]) == (False, False, False)
            assert each["paper"] == rgb(paper)
            assert each["lines"] == list(map(rgb, expected_lines(scheme)))
        assert seen["still"]["buttons"] == 0
        by_error = sorted(["teacher", *names], key=mean_errors().__getitem__)
        assert seen["by_error"][0][1] == by_error
        assert seen["by_error"][1][1] == by_error[::-1]
        assert [order for order, _ in seen["by_error"]] == ["ascending", "descending", None]
        assert seen["by_error"][2][1] == ["teacher", *names]
        assert seen["by_name"][0][1].index("m9") < seen["by_name"][0][1].index("m10")


def test_a_browser_runs_no_script_but_the_pages_own(tmp_path: Path) -> None:
    forged = "<script>document.body.dataset.ran = 1</script>"
    forged += '<img src="data:," onerror="document.body.dataset.failed = 1">'
    text = page().replace("</body>", f"{forged}</body>")
    result = browse(text, tmp_path, "light")
    assert not re.search('data-(ran|failed)="1"', result.stdout)
    assert "Content Security Policy" in result.stderr
    assert "<button" in result.stdout  # our own did run
    without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    ran = browse(without, tmp_path, "light").stdout
    assert set(re.findall('data-(ran|failed)="1"', ran)) == {"ran", "failed"}
