// What `stbench inspect` measured: one chart with a table of its values, and maps per run.

const features = data.features;
const FEATURE_VIEWS = { block: "by block", images: "along training", scale: "by guidance scale" };
const LAST_STEPS = "last";
Object.assign(AXIS_LABELS, { block: "block", scale: "guidance scale: 0 unconditional, 1 conditional" });
Object.assign(AXIS_VALUES, { block: (value) => `${Math.round(value)}`, scale: (value) => `${Number(value.toPrecision(3))}` });

// Rows of the leaderboard keep their colours, unless other rows were inspected, too.
function featureOrder() {
  const known = features.rows.every((name) => order.has(name) || baselines.has(name));
  return known ? order : new Map(features.rows.map((name, i) => [name, i]));
}

// Points [x, mean, low, high, deviation] of every row for the choice; without those that are unknown.
function featurePoints(axis, measure, time, where) {
  const triple = (x, mean, std) => [x, mean, mean - (std || 0), mean + (std || 0), std];
  const known = (points) => points.filter(([, mean]) => mean !== null && mean !== undefined);
  if (axis === "scale") {
    return features.scales[measure][time].map(({ scale: xs, mean, std }) =>
      known(xs.map((x, i) => triple(x, mean[i], std[i]))));
  }
  return features.points[measure][time].map((points) => {
    if (axis === "images") {
      return known(points.map(({ images, mean, std }) => triple(images, mean[where], std[where])));
    }
    const at = where === LAST_STEPS ? points.at(-1) : points.find(({ step }) => String(step) === where);
    return at ? known(at.mean.map((mean, block) => triple(block, mean, at.std[block]))) : [];
  });
}

function featureTable(lines, axis, title) {
  const xs = [...new Set(lines.flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
  const cells = lines.map(({ row, points }) => {
    const found = new Map(points.map((point) => [point[0], point]));
    return [row.name, ...xs.map((x) => {
      const [, mean, , , std] = found.get(x) || [];
      return number(mean) + (std ? ` ±${number(std, decimalsOf(mean))}` : "");
    })];
  });
  return scrolling(title, table(["row", ...xs.map(AXIS_VALUES[axis])], cells));
}

function drawFeatures() {
  const [axis, measure] = [byId("feature-view").value, byId("feature-measure").value];
  const time = Number(byId("feature-time").value);
  const points = featurePoints(axis, measure, time, byId("feature-where").value);
  const lines = features.rows
    .map((name, i) => ({ row: { name, style: name, baseline: baselines.has(name) }, seed: null, points: points[i] }))
    .filter((line) => line.points.length);
  const words = (axis === "scale" ? features.guided_measures : features.measures)[measure];
  const title = `${words} ${FEATURE_VIEWS[axis]}, time ${features.times[time]}`;
  const place = element("div", { className: "chart", tabIndex: 0, role: "group", "aria-label": title });
  const caption = element("figcaption", { textContent: title });
  if (featureChart) featureChart.plot.destroy();
  featureChart = null;
  byId("feature-chart").replaceChildren(element("figure", {}, [caption, place]));
  byId("feature-table").replaceChildren(...(lines.length ? [featureTable(lines, axis, title)] : []));
  if (!lines.length) {
    place.append(element("p", { className: "note", textContent: "No values for this choice." }));
    return;
  }
  const choice = { axis, metric: words, seeds: "band", paid: false, logX: false, logY: false };
  if (axis === "block") choice.xAxis = { incrs: [1, 2, 5, 10, 20] };
  const drawn = lines.map((line) => ({ ...line, points: line.points.map((point) => point.slice(0, 4)) }));
  featureChart = makeChart(place, { unit: null }, drawn, choice, featureOrder(), theme());
}

// The choices that depend on the view; a value that still exists is kept.
function fillFeatureChoices() {
  const axis = byId("feature-view").value;
  const measures = axis === "scale" ? features.guided_measures : features.measures;
  fill(byId("feature-measure"), Object.entries(measures), byId("feature-measure").value);
  const points = features.points[Object.keys(features.measures)[0]].flat(2);
  const steps = [...new Set(points.map(({ step }) => step))].sort((a, b) => a - b);
  const depth = Math.max(...points.map(({ mean }) => mean.length));
  const choices = axis === "block"
    ? [...steps.map((step) => [String(step), `step ${step}`]), [LAST_STEPS, "last of each row"]]
    : Array.from({ length: depth }, (_, block) => [String(block), `block ${block}`]);
  const common = features.common_step === null ? LAST_STEPS : String(features.common_step);
  fill(byId("feature-where"), choices, axis === "block" ? common : String(Math.floor(depth / 2)));
  byId("feature-where").parentNode.hidden = axis === "scale";
}

function fillFeatureMaps() {
  const sets = features.maps.map(({ title, pictures }) => {
    const figures = pictures.map(([words, uri]) => element("figure", {}, [
      element("figcaption", { textContent: words }), element("img", { src: uri, alt: `${title}: ${words}` })]));
    return element("details", {}, [element("summary", { textContent: `Maps of ${title}` }), ...figures]);
  });
  byId("feature-maps").replaceChildren(...sets);
}

let featureChart = null;
if (features) {
  byId("features").hidden = false;
  byId("features-link").hidden = false;
  fill(byId("feature-view"), Object.entries(FEATURE_VIEWS).filter(([axis]) =>
    axis !== "scale" || features.scales.norm.some((rows) => rows.some(({ scale: xs }) => xs.length))), "block");
  fill(byId("feature-time"), features.times.map((time, i) => [String(i), `${time}`]),
    String(Math.floor(features.times.length / 2)));
  fillFeatureChoices();
  fillFeatureMaps();
  byId("features-note").textContent = features.notes.join(" ");
  byId("feature-view").addEventListener("change", () => { fillFeatureChoices(); drawFeatures(); });
  for (const id of ["feature-measure", "feature-time", "feature-where"]) {
    byId(id).addEventListener("change", drawFeatures);
  }
  dark.addEventListener("change", drawFeatures);
  window.addEventListener("resize", () => { if (featureChart) fitChart(featureChart); });
  window.addEventListener("beforeprint", drawFeatures);
  window.addEventListener("afterprint", drawFeatures);
}
