// Curves of rows: points per seed, and mean and deviation over seeds where all seeds were evaluated.

const AXES = { images: 0, seconds: 1, flops: 2 };

function columnsOf(run, protocol, guidance) {
  return ((run.curves[protocol] || {})[guidance]) || null;
}

// Points of one run as [step, x, y]; x includes the earlier stages if they are paid for.
function pointsOf(run, protocol, choice) {
  const columns = columnsOf(run, protocol, choice.guidance);
  const values = columns && columns.metrics[choice.metric];
  if (!values) return [];
  const offset = choice.paid ? run.earlier[AXES[choice.axis]] : 0;
  const unit = choice.axis === "seconds" ? 3600 : 1;
  return columns.step
    .map((step, i) => [step, (columns[choice.axis][i] + offset) / unit, values[i]])
    .filter(([, x, y]) => x !== null && y !== null && usable(x, choice.logX) && usable(y, choice.logY));
}

const usable = (value, log) => !log || value > 0;

function deviation(values, mean) {
  if (values.length < 2) return 0;
  return Math.sqrt(values.reduce((sum, v) => sum + (v - mean) ** 2, 0) / (values.length - 1));
}

// Mean curve of a row as [x, mean, low, high]; x is the mean over seeds as well.
function meanCurve(row, protocol, choice) {
  const seeds = row.runs.map((index) => pointsOf(data.runs[index], protocol, choice));
  const steps = seeds[0].map(([step]) => step);
  const byStep = seeds.map((points) => new Map(points.map(([step, x, y]) => [step, [x, y]])));
  const shared = steps.filter((step) => byStep.every((found) => found.has(step)));
  return shared.map((step) => {
    const found = byStep.map((points) => points.get(step));
    const ys = found.map(([, y]) => y);
    const mean = ys.reduce((a, b) => a + b) / ys.length;
    const spread = deviation(ys, mean);
    const x = found.reduce((sum, [value]) => sum + value, 0) / found.length;
    // In log scale a band that reaches zero ends at the smallest value.
    const low = choice.logY && spread >= mean ? Math.min(...ys) : mean - spread;
    return [x, mean, low, mean + spread];
  });
}

// Lines of a chart: {row, seed, points: [[x, y, low, high]]}.
function linesOf(shownTable, choice, hidden) {
  const lines = [];
  for (const row of shownTable.rows) {
    if (hidden.has(row.style)) continue;
    if (choice.seeds === "lines") {
      for (const index of row.runs) {
        const points = pointsOf(data.runs[index], shownTable.protocol, choice).map(([, x, y]) => [x, y, y, y]);
        if (points.length) lines.push({ row, seed: data.runs[index].seed, points });
      }
    } else {
      const points = meanCurve(row, shownTable.protocol, choice);
      if (points.length) lines.push({ row, seed: null, points });
    }
  }
  return lines;
}

// The budget on the axis of its unit; rows reach it at different values of the other axes.
function budgetOf(shownTable, choice) {
  if (choice.axis !== shownTable.unit) return null;
  const budget = shownTable.budgets[choice.paid ? 1 : 0];
  return choice.axis === "seconds" ? budget / 3600 : budget;
}

function choicesOf(tables, find) {
  const found = new Set();
  for (const shown of tables) {
    for (const row of shown.rows) {
      for (const index of row.runs) {
        const curves = data.runs[index].curves[shown.protocol] || {};
        for (const [guidance, columns] of Object.entries(curves)) find(guidance, columns, found);
      }
    }
  }
  return [...found];
}
