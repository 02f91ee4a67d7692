// The data of the page, elements and numbers. Text from the data becomes text nodes, never markup.

async function readData() {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

const data = await readData();
document.documentElement.dataset.script = "on";
const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, children = []) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function fill(select, choices, selected) {
  select.replaceChildren(...choices.map(([value, label]) => element("option", { value, textContent: label })));
  if (choices.some(([value]) => value === selected)) select.value = selected;
}

function table(header, rows, words = [0]) {
  const heads = header.map((name) => element("th", { scope: "col", textContent: name }));
  const body = rows.map((row) =>
    element("tr", {}, row.map((cell, i) =>
      element("td", { textContent: cell, className: words.includes(i) ? "words" : "" }))));
  return element("table", {}, [
    element("thead", {}, [element("tr", {}, heads)]),
    element("tbody", {}, body),
  ]);
}

function scrolling(label, content) {
  return element("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": label }, [content]);
}

// --- Numbers ---

function decimalsOf(value) {
  const size = Math.abs(value);
  return size > 0 && size < 0.1 ? 4 : size < 10 ? 3 : size < 100 ? 2 : 1;
}

function number(value, decimals) {
  if (value === null || value === undefined) return "-";
  return value.toFixed(decimals === undefined ? decimalsOf(value) : decimals);
}

function scaled(value, prefixes = ["", "k", "M", "G", "T", "P", "E"], gap = "") {
  let power = 0;
  while (Math.abs(value) >= 999.95 && power < prefixes.length - 1) {
    value /= 1000;
    power += 1;
  }
  return `${Number(value.toPrecision(Math.abs(value) < 100 ? 3 : 4))}${gap}${prefixes[power]}`;
}

const count = (value) => scaled(value);
const flop = (value) => `${scaled(value, undefined, " ")}FLOP`;

function duration(seconds) {
  for (const [size, unit] of [[3600, "h"], [60, "min"]]) {
    if (seconds >= 2 * size) return `${Number((seconds / size).toPrecision(3))} ${unit}`;
  }
  return `${Number(seconds.toPrecision(3))} s`;
}

const scaleOf = (guidance) => (guidance === "none" ? 1 : Number.parseFloat(guidance));
const compareGuidance = (a, b) => scaleOf(a) - scaleOf(b) || a.localeCompare(b);

const METRIC_NAMES = {
  fid: "FID", is: "IS", kid: "KID", val_loss: "val loss", fid_all: "FID (all)", sfid: "sFID",
};
const metricName = (name) => METRIC_NAMES[name] || name.replaceAll("_", " ");
