"use strict";

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif';
const AXIS = {
  domainColor: "var(--line)", tickColor: "var(--line)", gridColor: "var(--grid)",
  labelColor: "var(--muted)", titleColor: "var(--muted)", titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11,
};
const CONFIG = {
  background: null, font: FONT, axis: AXIS, view: { stroke: null }, text: { fontSize: 11 },
  aria: false,
};

async function draw(plot) {
  if (plot.dataset.state) return;
  plot.dataset.state = "begun";
  const inner = document.createElement("div");  // Vega names what it draws into, and the plot has its name
  plot.append(inner);
  const spec = JSON.parse(document.getElementById(plot.dataset.spec).textContent);
  try {
    await vegaEmbed(inner, spec, { mode: "vega-lite", renderer: "svg", actions: false, config: CONFIG, tooltip: { theme: "page" } });
    plot.dataset.state = "drawn";
  } catch (error) {
    plot.dataset.state = "failed";
    console.error(plot.getAttribute("aria-label"), error);
  }
}

// What is folded away has no width to be drawn in.
function drawOpen() {
  for (const plot of document.querySelectorAll(".plot")) if (!plot.closest("details:not([open])")) draw(plot);
}

function sort(header) {
  const table = header.closest("table"), column = header.cellIndex, body = table.tBodies[0];
  const first = header.classList.contains("number") ? "descending" : "ascending";
  const other = first === "descending" ? "ascending" : "descending";
  const order = header.getAttribute("aria-sort") === first ? other : first;
  for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const both = header.classList.contains("number") ? x - y : x.localeCompare(y, undefined, { numeric: true });
    return sign * both;
  });
  body.append(...rows);
}

for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sort(button.parentElement));
for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", drawOpen);
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  drawOpen();
});
drawOpen();
