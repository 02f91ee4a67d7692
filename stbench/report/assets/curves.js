// The charts of all settings, their common controls and the legend.

const MOST_CHARTS = 6;
const MOST_ROWS = 12;
const order = new Map(
  [...new Set(data.tables.flatMap((shown) => shown.rows.filter((row) => !row.baseline).map((row) => row.style)))]
    .sort().map((style, i) => [style, i]));
const baselines = new Set(
  data.tables.flatMap((shown) => shown.rows.filter((row) => row.baseline).map((row) => row.style)));
// With many rows the first ones are shown: the tables are sorted, the baseline and the best first.
const everyStyle = [...new Set(data.tables.flatMap((shown) => shown.rows.map((row) => row.style)))];
const hidden = new Set(everyStyle.slice(MOST_ROWS));
const rowsOfStyle = new Map(data.tables.flatMap((shown) => shown.rows.map((row) => [row.style, row])));
const dark = window.matchMedia("(prefers-color-scheme: dark)");
let printing = false;
let charts = [];

const theme = () => (dark.matches && !printing ? "dark" : "light");

function choice() {
  return {
    metric: byId("metric").value, guidance: byId("guidance").value, axis: byId("x-axis").value,
    paid: byId("paid").value === "paid", seeds: byId("seeds").value,
    logX: byId("log-x").checked, logY: byId("log-y").checked,
  };
}

function chosenTables() {
  const value = byId("setting").value;
  return value === "all" ? data.tables.slice(0, MOST_CHARTS) : [data.tables[Number(value)]].filter(Boolean);
}

function legendButton(style) {
  const row = rowsOfStyle.get(style);
  const { colour } = styleOf({ ...row, baseline: baselines.has(style) }, order, theme());
  const dot = element("span", { className: "dot" });
  dot.style.background = colour;
  const button = element("button", { type: "button", "aria-pressed": String(!hidden.has(style)) }, [dot, style]);
  button.addEventListener("click", () => {
    if (!hidden.delete(style)) hidden.add(style);
    button.setAttribute("aria-pressed", String(!hidden.has(style)));
    drawCharts();
  });
  return button;
}

function drawLegend() {
  const styles = [...new Set(chosenTables().flatMap((shown) => shown.rows.map((row) => row.style)))];
  const all = element("button", { type: "button", className: "every", textContent: "all" });
  const none = element("button", { type: "button", className: "every", textContent: "none" });
  all.addEventListener("click", () => { hidden.clear(); drawLegend(); drawCharts(); });
  none.addEventListener("click", () => { styles.forEach((style) => hidden.add(style)); drawLegend(); drawCharts(); });
  byId("legend").replaceChildren(...styles.map(legendButton), ...(styles.length > 1 ? [all, none] : []));
}

function placeOf(shown, chosen) {
  const label = `${metricName(chosen.metric)} against ${AXIS_LABELS[chosen.axis]}: ${shown.title}`;
  const place = element("div", { className: "chart", tabIndex: 0, role: "group", "aria-label": label });
  byId("charts").append(element("figure", {}, [element("figcaption", { textContent: shown.title }), place]));
  return place;
}

function drawChart(place, shown, chosen) {
  const lines = linesOf(shown, chosen, hidden);
  if (!lines.length) {
    place.append(element("p", { className: "note", textContent: "No values for this choice." }));
    return;
  }
  charts.push(makeChart(place, shown, lines, chosen, order, theme()));
}

function drawCharts() {
  for (const { plot } of charts) plot.destroy();
  charts = [];
  byId("charts").replaceChildren();
  const chosen = choice();
  // All places first: their width depends on how many there are.
  const places = chosenTables().map((shown) => [placeOf(shown, chosen), shown]);
  for (const [place, shown] of places) drawChart(place, shown, chosen);
  const left = data.tables.length - MOST_CHARTS;
  const notes = [];
  if (byId("setting").value === "all" && left > 0) notes.push(`${left} more settings: choose one above.`);
  if (everyStyle.length > MOST_ROWS && hidden.size) notes.push(`${hidden.size} rows are hidden.`);
  if (!data.tables.length) notes.push("No finished runs yet.");
  byId("curves-note").textContent = notes.join(" ");
}

function fillChoices() {
  const titles = data.tables.map((shown, i) => [String(i), shown.title]);
  fill(byId("setting"), [["all", `all (${data.tables.length})`], ...titles], "all");
  const metrics = choicesOf(data.tables, (guidance, columns, found) =>
    Object.keys(columns.metrics).forEach((name) => found.add(name)));
  const first = data.tables.length ? data.tables[0].metric : "fid";
  fill(byId("metric"), metrics.map((name) => [name, metricName(name)]), first);
  const guidances = choicesOf(data.tables, (guidance, columns, found) => found.add(guidance));
  guidances.sort(compareGuidance);
  fill(byId("guidance"), guidances.map((name) => [name, name]), "none");
}

fillChoices();
for (const id of ["metric", "guidance", "x-axis", "paid", "seeds", "log-x", "log-y"]) {
  byId(id).addEventListener("change", drawCharts);
}
byId("setting").addEventListener("change", () => { drawLegend(); drawCharts(); });
dark.addEventListener("change", () => { drawLegend(); drawCharts(); });
window.addEventListener("beforeprint", () => { printing = true; drawCharts(); });
window.addEventListener("afterprint", () => { printing = false; drawCharts(); });
window.addEventListener("resize", () => charts.forEach(fitChart));
