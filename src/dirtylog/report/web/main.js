// Puts the page together.

async function start() {
  const library = inflate("plotly-data").then((response) => response.text());
  const recording = unpack(await (await inflate("data")).arrayBuffer());
  fillHead(recording);
  fillWarnings(recording);
  fillFacts(recording);
  captions(recording);
  const report = document.getElementById("report");
  if (!recording.regions.length) {
    trouble("No page was written while this was recorded.");
    for (const section of [...report.querySelectorAll("section")].slice(0, -1)) section.hidden = true;
    report.hidden = false;
    return { recording };
  }
  report.hidden = false;
  const script = element("script", await library);
  // What is there already is shown before the library is compiled, which takes longer than all else.
  await new Promise((resolve) => { setTimeout(resolve); });
  document.head.append(script);
  const heat = new Heat(recording, document.getElementById("heat"), document.getElementById("pointed"));
  const region = chooseRegion(recording, heat);
  chooseColours(heat);
  document.getElementById("whole").addEventListener("click", () => { region.value = ""; heat.show(heat.whole); });
  fillHottest(recording, (stretch) => {
    const margin = Math.max(2, stretch.npages / 8);
    heat.show({ ...heat.whole, y0: stretch.first - margin, y1: stretch.first + stretch.npages + margin });
    heat.node.scrollIntoView({ block: "center" });
  });
  await heat.draw();
  const footprint = new Footprint(recording, document.getElementById("curve"));
  await footprint.update();
  return { recording, heat, predict: (memory, bandwidth, downtime) => predict(recording.curve, memory, bandwidth, downtime) };
}

function fillHead(recording) {
  const { facts, rounds } = recording;
  const target = harmless(facts.target || "recording");
  document.title = `${target} – dirtylog`;
  document.getElementById("target").textContent = target;
  const nbytes = rounds.nbytes.reduce((sum, value) => sum + value, 0);
  const seconds = rounds.seconds.reduce((sum, value) => sum + value, 0);
  document.getElementById("summary").textContent = [
    `${facts.port} (${facts.exactness})`, `pages of ${sized(facts.page_size)}`, `${timed(durationOf(recording))} in ${counted(rounds.count, "round")}`,
    `${sized(seconds ? nbytes / seconds : 0)}/s written`,
  ].join(" · ");
}

function chooseRegion(recording, heat) {
  const select = document.getElementById("region");
  select.append(element("option", "all that was written", { value: "" }));
  recording.regions.forEach((region, index) => select.append(element("option", regionTitle(recording, region), { value: String(index) })));
  select.addEventListener("change", () => {
    const chosen = select.value === "" ? { start: 0, npages: recording.npages } : recording.regions[Number(select.value)];
    heat.show({ ...heat.view, y0: chosen.start, y1: chosen.start + chosen.npages });
  });
  return select;
}

function chooseColours(heat) {
  const select = document.getElementById("colours");
  select.value = heat.logarithmic ? "log" : "linear";
  select.addEventListener("change", () => { heat.logarithmic = select.value === "log"; heat.redraw(); });
}

function captions(recording) {
  const merged = [];
  if (recording.merged_rounds) merged.push(`${2 ** recording.merged_rounds} rounds at a time`);
  if (recording.merged_pages) merged.push(`${2 ** recording.merged_pages} pages at a time`);
  const coarse = merged.length ? ` The recording has ${recording.runs.toLocaleString("en")} runs: to keep this page small, it is drawn as if they had been logged ${merged.join(" and ")}.` : "";
  document.getElementById("heat-caption").textContent =
    `Above: memory by address, without what was never written; a cell's colour is the share of its pages that a round wrote, on average over its rounds; white: none. Below: what was written in a second, of the memory shown; the pale line is the highest round.${coarse}`;
  document.getElementById("curve-caption").textContent =
    "D(t): how much is written at least once within a time t, the mean over windows of that length. Where the line of what is sent lies above it, the next round is shorter.";
}

function trouble(text) {
  const node = document.getElementById("trouble");
  node.textContent = text;
  node.hidden = false;
}

window.dirtylog = start().catch((error) => {
  trouble(typeof DecompressionStream === "undefined" ? "This page needs a browser of 2023 or later." : `This page could not be drawn: ${error.message}`);
  throw error;
});
