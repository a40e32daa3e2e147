// The pages of markup.py: tables are sorted by a click on a header, and curves shown against one axis at a time.
const sorted = (table, column, ascending) => {
  const key = row => {
    const cell = row.cells[column], number = parseFloat(cell.dataset.key);
    return isNaN(number) ? cell.textContent : number;
  };
  const compare = (x, y) => typeof x === "number" && typeof y === "number"
    ? x - y
    : String(x).localeCompare(String(y), undefined, {numeric: true});
  const empty = x => x === "" || x === "\u2013"; // last, either way
  return [...table.tBodies[0].rows].sort((one, other) => {
    const x = key(one), y = key(other);
    if (empty(x) || empty(y)) return empty(x) - empty(y);
    return ascending ? compare(x, y) : compare(y, x);
  });
};

for (const header of document.querySelectorAll("thead th")) {
  const sort = () => {
    const table = header.closest("table"), ascending = header.getAttribute("aria-sort") !== "ascending";
    table.tBodies[0].append(...sorted(table, header.cellIndex, ascending));
    for (const each of header.parentNode.cells) each.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  };
  header.tabIndex = 0;
  header.addEventListener("click", sort);
  header.addEventListener("keydown", event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    sort();
  });
}

const axes = document.querySelector(".axes");
if (axes) {
  const show = () => {
    const chosen = axes.querySelector("input:checked").value;
    for (const part of document.querySelectorAll("[data-axis]")) part.hidden = part.dataset.axis !== chosen;
  };
  axes.hidden = false; // without scripts all axes are shown, and there is nothing to choose
  axes.addEventListener("change", show);
  show();
}
