// Sorting by clicking a heading, and the filter of tables and runs.

const filterListeners = [];

function sortKey(cell) {
  return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
}

function compareCells(first, second, sign) {
  const [a, b] = [sortKey(first), sortKey(second)];
  if (first.tagName === "TH") return sign * first.textContent.localeCompare(second.textContent);
  if (a === null || b === null) return (a === null) - (b === null); // without a value: last in both orders
  return sign * (a - b);
}

function sortBy(heading) {
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  const column = [...heading.parentNode.children].indexOf(heading);
  const body = heading.closest("table").tBodies[0];
  const rows = [...body.rows].sort((a, b) =>
    compareCells(a.cells[column], b.cells[column], ascending ? 1 : -1));
  body.append(...rows);
  for (const other of heading.parentNode.children) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
}

for (const button of document.querySelectorAll(".ranking th button")) {
  button.addEventListener("click", () => sortBy(button.parentNode));
}

// Every word must occur in a row or in the title of its table.
function matches(text) {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = text.toLowerCase();
  return words.every((word) => found.includes(word));
}

function applyFilter() {
  let shown = 0;
  let total = 0;
  for (const article of document.querySelectorAll("#leaderboard article[data-words]")) {
    const rows = [...article.querySelectorAll("tbody tr")];
    for (const row of rows) {
      const name = row.cells[0];
      row.hidden = !matches(`${name.textContent} ${name.title} ${article.dataset.words}`);
    }
    const visible = rows.filter((row) => !row.hidden).length;
    article.hidden = visible === 0;
    shown += visible;
    total += rows.length;
  }
  byId("filter-count").textContent = byId("filter").value ? `${shown} of ${total} rows` : "";
  for (const listener of filterListeners) listener();
}

byId("filter").addEventListener("input", applyFilter);
