// A section per run, filled when it is opened.

const shortened = (value) => (typeof value === "string" ? value : JSON.stringify(value));

function facts(pairs) {
  const cells = pairs.flatMap(([name, value]) => [
    element("dt", { textContent: name }), element("dd", { textContent: shortened(value) })]);
  return element("dl", {}, cells);
}

const fieldsOf = (index) => Object.entries(data.shared[index] || {});

function part(title, content) {
  return element("section", {}, [element("h4", { textContent: title }), content]);
}

function costTable(run) {
  const header = ["stage", "steps", "images", "time", "student", "heads", "teachers", "origin"];
  const rows = run.stages.map(([name, steps, images, seconds, student, heads, teachers, reused]) => [
    name, String(steps), count(images), duration(seconds), flop(student), flop(heads), flop(teachers),
    reused ? "reused" : "trained"]);
  return scrolling("Cost of the stages", table(header, rows, [0, 7]));
}

function evaluationTable(run) {
  const rows = [];
  const names = new Set();
  for (const [protocol, byGuidance] of Object.entries(run.curves)) {
    for (const [guidance, columns] of Object.entries(byGuidance)) {
      Object.keys(columns.metrics).forEach((name) => names.add(name));
      columns.step.forEach((step, i) => rows.push({ protocol, guidance, columns, step, i }));
    }
  }
  const several = Object.keys(run.curves).length > 1;
  rows.sort((a, b) =>
    a.protocol.localeCompare(b.protocol) || a.step - b.step || compareGuidance(a.guidance, b.guidance));
  const header = [...(several ? ["protocol"] : []), "step", "images", "guidance", "time", ...[...names].map(metricName)];
  const cells = rows.map(({ protocol, guidance, columns, step, i }) => [
    ...(several ? [protocol] : []), String(step), count(columns.images[i]), guidance,
    duration(columns.seconds[i]),
    ...[...names].map((name) => number((columns.metrics[name] || [])[i]))]);
  return scrolling("Evaluations", table(header, cells, []));
}

function commandOf(run) {
  const code = element("code", { textContent: run.command });
  const button = element("button", { type: "button", textContent: "Copy" });
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(run.command);
      button.textContent = "Copied";
    } catch {
      window.getSelection().selectAllChildren(code); // pages from files may not write to the clipboard
    }
  });
  return element("p", { className: "command" }, [code, button]);
}

function fillRun(place, run) {
  const network = fieldsOf(run.network).map(([name, value]) => `${name} ${shortened(value)}`).join(", ");
  const main = [
    ["folder", run.folder], ["state", run.state],
    ["setting", `${run.setting}, ${run.steps} steps of ${run.batch} images, ${run.precision}, seed ${run.seed}`],
    ["backbone", network ? `${run.backbone}: ${network}` : run.backbone],
    ["needs", run.needs || "nothing from outside the model"],
    ["hashes", `setting ${run.hashes[0]}, train ${run.hashes[1]}`]];
  place.append(
    facts(main), part("Command", commandOf(run)),
    ...(run.stages.length ? [part("Cost", costTable(run))] : []),
    ...(Object.keys(run.curves).length ? [part("Evaluations of the last stage", evaluationTable(run))] : []),
    ...(fieldsOf(run.recipe).length ? [part("Recipe options", facts(fieldsOf(run.recipe)))] : []),
    ...Object.entries(run.protocols).map(([name, index]) => part(`Protocol ${name}`, facts(fieldsOf(index)))),
    part("Training", facts(fieldsOf(run.train))), part("Environment", facts(fieldsOf(run.environment))));
}

const runSections = data.runs.map((run) => {
  const name = element("span", { className: "id", textContent: run.id });
  const words = `${run.label}, ${run.backbone}, seed ${run.seed}, ${run.steps} steps, ${run.state}`;
  const body = element("div", {});
  const details = element("details", { className: "run" }, [element("summary", {}, [name, ` ${words}`]), body]);
  details.addEventListener("toggle", () => {
    if (details.open && !body.children.length) fillRun(body, run);
  });
  details.dataset.words = `${run.id} ${words} ${run.setting}`;
  return details;
});
byId("run-list").append(...runSections);
if (!runSections.length) byId("run-list").append(element("p", { textContent: "No runs." }));
filterListeners.push(() => {
  for (const details of runSections) details.hidden = !matches(details.dataset.words);
});
