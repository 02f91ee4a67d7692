// Sample pictures side by side; the slider chooses the evaluation.

function drawSamples() {
  const guidance = byId("sample-guidance").value;
  const images = sampleImages[Number(byId("sample-step").value)];
  byId("sample-value").textContent = `${count(images)} images`;
  byId("sample-step").setAttribute("aria-valuetext", `${count(images)} images`);
  const figures = [];
  for (const { title, pictures } of data.samples) {
    // The last picture up to the chosen images: rows may be evaluated at other steps.
    const found = pictures.filter(([, seen, scale]) => String(scale) === guidance && seen <= images);
    if (!found.length) continue;
    const [step, seen, , uri] = found.reduce((a, b) => (b[1] > a[1] ? b : a));
    const alt = `Samples of ${title} at step ${step}`;
    const caption = `${title}: step ${step}, ${count(seen)} images`;
    figures.push(element("figure", {}, [
      element("img", { src: uri, alt }), element("figcaption", { textContent: caption }),
    ]));
  }
  byId("sample-grid").replaceChildren(...figures);
}

const sampleImages = [...new Set(data.samples.flatMap(({ pictures }) => pictures.map(([, seen]) => seen)))]
  .sort((a, b) => a - b);

if (data.samples.length) {
  byId("samples").hidden = false;
  byId("samples-link").hidden = false;
  const scales = [...new Set(data.samples.flatMap(({ pictures }) => pictures.map(([, , scale]) => scale)))]
    .sort((a, b) => a - b);
  fill(byId("sample-guidance"), scales.map((scale) => [String(scale), scale === 1 ? "none" : String(scale)]), "1");
  byId("sample-step").max = sampleImages.length - 1;
  byId("sample-step").value = sampleImages.length - 1;
  byId("sample-guidance").addEventListener("change", drawSamples);
  byId("sample-step").addEventListener("input", drawSamples);
  const left = data.pictures_left_out;
  byId("samples-note").textContent =
    `The first seed of each row.${left ? ` ${left} pictures are left out: unreadable, or too large in sum.` : ""}`;
}
