// Tables are sorted by a click on a header, and curves shown against one axis at a time.
const key = (row, column) => {
  const cell = row.cells[column], number = parseFloat(cell.dataset.key);
  return isNaN(number) ? cell.textContent : number;
};
const compare = (x, y) => typeof x === "number" && typeof y === "number"
  ? x - y
  : String(x).localeCompare(String(y), undefined, {numeric: true});
const empty = x => x === "" || x === "\u2013"; // last, either way
const sort = header => {
  const body = header.closest("table").tBodies[0], ascending = header.getAttribute("aria-sort") !== "ascending";
  body.append(...[...body.rows].sort((one, other) => {
    const x = key(one, header.cellIndex), y = key(other, header.cellIndex);
    if (empty(x) || empty(y)) return empty(x) - empty(y);
    return ascending ? compare(x, y) : compare(y, x);
  }));
  for (const cell of header.parentNode.cells) cell.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
};
for (const header of document.querySelectorAll("thead th")) {
  header.tabIndex = 0;
  header.addEventListener("click", () => sort(header));
  header.addEventListener("keydown", event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    sort(header);
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
