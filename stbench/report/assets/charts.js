// One uPlot chart: lines with bands, axes, a cursor that the mouse and the arrow keys move, and a readout.

const COLOURS = {
  light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b87a00", "#2e9bd6", "#8c510a", "#5e3c99"],
  dark: ["#4aa3df", "#ff8a3d", "#2fc79a", "#e59ac4", "#f0b429", "#8fd3ff", "#d39a5b", "#a58bdb"],
};
const GREY = { light: "#444444", dark: "#d0d0d0" };
const INK = { light: ["#333333", "#00000018"], dark: ["#cccccc", "#ffffff22"] };
const DOTS = [[], [3, 3], [10, 4, 2, 4]];
const CHART_HEIGHT = 320;

// Position of a row among all rows -> colour and dashes; the baseline is grey.
function styleOf(row, order, theme) {
  if (row.baseline) return { colour: GREY[theme], dash: [], width: 2.6 };
  const place = order.get(row.style) || 0;
  const cycle = Math.floor(place / 8) % DOTS.length;
  const dash = DOTS[cycle];
  return { colour: COLOURS[theme][place % 8], dash, width: 1.8 };
}

function evenTicks(low, high) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i += 1) ticks.push(Number((i * step).toPrecision(6)));
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const factor of [1, 2, 3, 5, 7]) ticks.push(Number(`${factor}e${power}`));
  }
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  if (inside.length < 3) return evenTicks(low, high);
  if (inside.length <= 10) return inside;
  return inside.filter((tick) => /^1(e|$)/.test(tick.toExponential().replace(/\.0+/, "")));
}

function scale(values, log) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (log) return { distr: 3, log: 10, range: () => [low / 1.08, high * 1.08] };
  const margin = (high - low || Math.abs(high) || 1) * 0.05;
  const start = low >= 0 ? Math.max(0, low - margin) : low - margin;
  return { distr: 1, range: () => [start, high + margin] };
}

function axisOf(log, theme, values, label, size) {
  const [ink, grid] = INK[theme];
  const axis = {
    label, labelSize: 22, size, stroke: ink, font: "12px system-ui", labelFont: "12px system-ui",
    grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 },
    values: (u, ticks) => ticks.map((tick) => (tick === null ? "" : values(tick))),
  };
  if (log) {
    axis.splits = (u, index, low, high) => logTicks(low, high);
    axis.filter = (u, ticks) => ticks;
  }
  return axis;
}

const AXIS_LABELS = { images: "training images", seconds: "training hours", flops: "training FLOPs" };
const AXIS_VALUES = { images: count, seconds: (hours) => `${Number(hours.toPrecision(3))}`, flops: scaled };

// uPlot takes one x column: the union of all x, with null where a line has no point.
function aligned(lines, bands) {
  const xs = [...new Set(lines.flatMap((line) => line.points.map(([x]) => x)))].sort((a, b) => a - b);
  const place = new Map(xs.map((x, i) => [x, i]));
  const columns = [xs];
  for (const line of lines) {
    for (const part of bands ? [1, 2, 3] : [1]) {
      const column = new Array(xs.length).fill(null);
      for (const point of line.points) column[place.get(point[0])] = point[part];
      columns.push(column);
    }
  }
  return columns;
}

function seriesOf(lines, bands, order, theme) {
  const series = [{}];
  for (const line of lines) {
    const { colour, dash, width } = styleOf(line.row, order, theme);
    const label = line.seed === null ? line.row.name : `${line.row.name} seed ${line.seed}`;
    const points = { show: true, size: 6, stroke: colour, fill: colour };
    series.push({ label, stroke: colour, width, dash, spanGaps: true, points });
    const edge = { stroke: "transparent", width: 0, spanGaps: true, points: { show: false } };
    if (bands) series.push({ ...edge, label: "low" }, { ...edge, label: "high" });
  }
  return series;
}

function bandsOf(lines, order, theme) {
  return lines.map((line, i) => ({
    series: [3 * i + 3, 3 * i + 2], fill: `${styleOf(line.row, order, theme).colour}28`,
  }));
}

function drawBudget(budget, theme) {
  return (u) => {
    if (budget === null) return;
    const x = Math.round(u.valToPos(budget, "x", true));
    u.ctx.save();
    u.ctx.strokeStyle = INK[theme][0];
    u.ctx.setLineDash([2, 4]);
    u.ctx.beginPath();
    u.ctx.moveTo(x, u.bbox.top);
    u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
    u.ctx.stroke();
    u.ctx.restore();
  };
}

// Draw a chart into `place`, whose cursor the arrow keys move; returns {plot, place}.
function makeChart(place, shownTable, lines, choice, order, theme) {
  const bands = choice.seeds !== "lines";
  const xs = lines.flatMap((line) => line.points.map(([x]) => x));
  const ys = lines.flatMap((line) => line.points.flatMap(([, ...values]) => values));
  const budget = budgetOf(shownTable, choice);
  const readout = element("div", { className: "readout" });
  const show = (u) => readOut(readout, lines, choice, u, order, theme);
  const plot = new uPlot({
    width: Math.max(260, place.clientWidth), height: CHART_HEIGHT,
    scales: {
      x: { time: false, ...scale(budget === null ? xs : [...xs, budget], choice.logX) },
      y: scale(ys, choice.logY),
    },
    axes: [
      { ...axisOf(choice.logX, theme, AXIS_VALUES[choice.axis], AXIS_LABELS[choice.axis], 34), ...choice.xAxis },
      axisOf(choice.logY, theme, (v) => `${Number(v.toPrecision(3))}`, metricName(choice.metric), 52),
    ],
    series: seriesOf(lines, bands, order, theme),
    bands: bands ? bandsOf(lines, order, theme) : [],
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
    hooks: { setCursor: [show], draw: [drawBudget(budget, theme)] },
  }, aligned(lines, bands), place);
  place.append(readout);
  place.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    moveCursor(plot, step);
  });
  return { plot, place };
}

function fitChart({ plot, place }) {
  const width = Math.max(260, place.clientWidth);
  if (width !== plot.width) plot.setSize({ width, height: CHART_HEIGHT });
}

function moveCursor(plot, step) {
  const last = plot.data[0].length - 1;
  const from = plot.cursor.left < 0 || plot.cursor.idx == null ? (step > 0 ? -1 : last + 1) : plot.cursor.idx;
  const index = Math.min(last, Math.max(0, from + step));
  plot.setCursor({ left: plot.valToPos(plot.data[0][index], "x"), top: 10 });
}

// The values of every line at its point nearest to the cursor.
function readOut(place, lines, choice, u, order, theme) {
  if (u.cursor.left < 0 || u.cursor.idx == null) {
    place.replaceChildren();
    return;
  }
  const x = u.posToVal(u.cursor.left, "x");
  const distance = (value) => Math.abs(u.valToPos(value, "x") - u.cursor.left);
  const items = lines.map((line) => {
    const nearest = line.points.reduce((a, b) => (distance(b[0]) < distance(a[0]) ? b : a));
    const spread = line.seed === null && nearest[3] > nearest[1] ? `±${number(nearest[3] - nearest[1], decimalsOf(nearest[1]))}` : "";
    const name = line.seed === null ? line.row.name : `${line.row.name} s${line.seed}`;
    return [nearest[1], `${name} ${number(nearest[1])}${spread} @ ${AXIS_VALUES[choice.axis](nearest[0])}`, line];
  });
  items.sort(([a], [b]) => a - b);
  const children = items.map(([, text, line]) => {
    const dot = element("span", { className: "dot" });
    dot.style.background = styleOf(line.row, order, theme).colour;
    return element("span", { className: "item" }, [dot, text]);
  });
  place.replaceChildren(element("strong", { textContent: `at ${AXIS_VALUES[choice.axis](x)}` }), ...children);
}
