"""The page's script: a click on a header sorts its table, up, down, and back as it was.

Without scripts the headers are plain text. Cells with a `data-value` are compared as numbers,
others as text; empty ones come last either way.
"""

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
