// The first drawing, and for a served page: keep the choices and reload when the runs have changed.

const live = document.documentElement.dataset.live;
const KEPT = [
  "filter", "setting", "metric", "guidance", "x-axis", "paid", "seeds", "log-x", "log-y",
  "feature-view", "feature-measure", "feature-time", "feature-where",
];
const POLL_SECONDS = 2;

function restoreChoices() {
  const stored = sessionStorage.getItem("choices");
  if (!stored) return;
  const { values, off } = JSON.parse(stored);
  for (const [id, value] of Object.entries(values)) {
    const control = byId(id);
    if (control.type === "checkbox") control.checked = value;
    else if (control.tagName !== "SELECT" || [...control.options].some((o) => o.value === value)) {
      control.value = value;
    }
    if (id === "feature-view" && features) fillFeatureChoices();
  }
  hidden.clear();
  off.forEach((style) => hidden.add(style));
}

function storeChoices() {
  const values = Object.fromEntries(KEPT.map((id) => {
    const control = byId(id);
    return [id, control.type === "checkbox" ? control.checked : control.value];
  }));
  sessionStorage.setItem("choices", JSON.stringify({ values, off: [...hidden] }));
}

async function poll() {
  try {
    const answer = await fetch("version", { cache: "no-store" });
    if (answer.ok && (await answer.text()) !== live) {
      storeChoices();
      location.reload();
      return;
    }
  } catch {
    // The server has stopped; the page stays usable.
  }
  setTimeout(poll, 1000 * POLL_SECONDS);
}

if (live) restoreChoices();
applyFilter();
drawLegend();
drawCharts();
if (data.samples.length) drawSamples();
if (features) drawFeatures();
if (live) setTimeout(poll, 1000 * POLL_SECONDS);
document.documentElement.dataset.ready = "true";
