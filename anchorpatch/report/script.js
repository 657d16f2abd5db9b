"use strict";
// Tables sort by the column whose heading is pressed: up, then down. Rows of totals stay below.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => sort(button.closest("th")));
}

function sort(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const numeric = head.classList.contains("number");
  const keyed = [...table.tBodies[0].rows].map((row) => {
    const key = row.cells[column].dataset.key;
    return { row, key: key === undefined || key === "" ? null : numeric ? Number(key) : key };
  });
  keyed.sort((a, b) => {
    // What has no value stays at the end, whichever way.
    if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
    const order = numeric ? a.key - b.key : a.key.localeCompare(b.key, "en", { numeric: true });
    return down ? -order : order;
  });
  table.tBodies[0].append(...keyed.map(({ row }) => row));
}

// On paper nothing can be unfolded any more.
const unfolded = [];
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    unfolded.push(details);
  }
});
addEventListener("afterprint", () => {
  for (const details of unfolded.splice(0)) details.open = false;
});
