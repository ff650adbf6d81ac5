"""The page's style sheet (light and dark, wide and narrow), its line colors and its script.

The seven colors are the palette of Okabe and Ito (Color Universal Design, 2008) without yellow,
adjusted so that each has a contrast of at least 3 to the page, and any two are distinct for readers
with protanopia, deuteranopia or tritanopia too. `tests/report/test_report_colors.py` computes both.
"""

from __future__ import annotations

LIGHT_PAPER, DARK_PAPER = "#ffffff", "#14181d"
LIGHT = ("#1c232b", "#e3750e", "#2987ff", "#058051", "#01458e", "#a83100", "#c05797")
DARK = ("#e6eaee", "#ef9e00", "#29d2ff", "#0a9d5a", "#3858e4", "#be3100", "#ae7595")
NUM_COLORS = len(LIGHT)


def _variables(colors: tuple[str, ...], **others: str) -> str:
    numbered = {f"color{number}": color for number, color in enumerate(colors)}
    return " ".join(f"--{name}: {value};" for name, value in (numbered | others).items())


_SCHEMES = f"""
:root {{ color-scheme: light dark;
  {
    _variables(
        LIGHT,
        paper=LIGHT_PAPER,
        ink="#1c232b",
        quiet="#5b6672",
        rule="#e3e7eb",
        code="#f4f6f8",
        link="#0b5cad",
    )
} }}
@media (prefers-color-scheme: dark) {{ :root {{
  {
    _variables(
        DARK,
        paper=DARK_PAPER,
        ink="#e6eaee",
        quiet="#a3adb8",
        rule="#323a43",
        code="#1f252c",
        link="#7db8f5",
    )
} }} }}
{"".join(f".color{n} {{ --line: var(--color{n}); }} " for n in range(NUM_COLORS))}
.others {{ --line: var(--quiet); }}
"""

_LAYOUT = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 24px 20px 60px; color: var(--ink);
       background: var(--paper); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 8px; }
p { margin: 6px 0; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); font-size: 0.9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 8px 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--code); border-radius: 6px; padding: 10px 12px; font-size: 0.82rem;
      white-space: pre-wrap; overflow-wrap: anywhere; }
"""

_TABLES = """
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.84rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 11px 6px 0; text-align: right; white-space: nowrap;
         border-bottom: 1px solid var(--rule); }
th { font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 5.5em; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
                                 background: var(--paper); }
th:nth-child(2), td:nth-child(2) { text-align: left; }
tr.lowest td { font-weight: 600; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0;
            text-align: inherit; cursor: pointer; }
th button:hover { color: var(--link); }
th button::after { content: "\\a0\\2195"; color: var(--quiet); font-weight: 400; }
th[aria-sort="ascending"] button::after { content: "\\a0\\2191"; color: var(--link); }
th[aria-sort="descending"] button::after { content: "\\a0\\2193"; color: var(--link); }
svg.bar { width: 150px; height: 14px; margin-left: 10px; vertical-align: middle; }
svg.bar path { fill: none; stroke: var(--ink); stroke-width: 1.5; }
svg.bar path.zero { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 2 2; }
svg.bar circle { fill: var(--ink); }
"""

_CHARTS = """
svg.chart { width: 100%; height: auto; margin-top: 6px; }
svg.chart text { fill: var(--ink); font-size: 13px; }
svg.chart .to-left { text-anchor: end; fill: var(--quiet); font-size: 12px; }
svg.chart .centered { text-anchor: middle; fill: var(--quiet); font-size: 12px; }
svg.wide { display: block; max-width: 1000px; }
svg.narrow { display: none; max-width: 560px; }
.grid { fill: none; stroke: var(--rule); }
.line { fill: none; stroke: var(--line); stroke-width: 1.8; stroke-linejoin: round; }
.marks { fill: var(--line); stroke: var(--paper); stroke-width: 0.7; }
.leader { fill: none; stroke: var(--line); stroke-width: 0.8; opacity: 0.7; }
.band { fill: var(--line); opacity: 0.09; pointer-events: none; }
svg.crowded .band { opacity: 0; }
svg.chart .series:hover .band { opacity: 0.3; }
.interval { fill: none; stroke: var(--line); stroke-width: 2; }
.series:hover .line { stroke-width: 3; }
svg:has(.series:hover) .series:not(:hover) { opacity: 0.25; }
.curves label { margin: 0 16px 0 5px; }
#by-epoch:checked ~ .by-time, #by-time:checked ~ .by-epoch { display: none; }
@media (max-width: 840px) {
  svg.wide { display: none; }
  svg.narrow { display: block; }
}
@media (max-width: 520px) {
  body { padding: 16px 12px 40px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
}
"""

STYLE = _SCHEMES + _LAYOUT + _TABLES + _CHARTS


SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const original = [...body.rows];
  const compare = (a, b) => a.dataset.value !== undefined && b.dataset.value !== undefined
    ? a.dataset.value - b.dataset.value
    : a.textContent.localeCompare(b.textContent, "en", {numeric: true});
  const sorted = (column, sign) => [...original].sort((rowA, rowB) => {
    const [a, b] = [rowA.cells[column], rowB.cells[column]];
    const [noA, noB] = [a.textContent === "", b.textContent === ""];
    return noA || noB ? noA - noB : sign * compare(a, b);
  });
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = {ascending: "descending", descending: null}[head.getAttribute("aria-sort")];
      const order = next === undefined ? "ascending" : next;
      heads.forEach(each => each.removeAttribute("aria-sort"));
      if (order) head.setAttribute("aria-sort", order);
      body.append(...(order ? sorted(column, order === "ascending" ? 1 : -1) : original));
    });
  });
}
"""
