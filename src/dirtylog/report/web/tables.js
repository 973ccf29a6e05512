// Tables: the hottest memory, and what is known of the recording.

function fillHottest(recording, show) {
  const table = document.getElementById("hottest");
  const order = document.getElementById("order");
  const rounds = Math.max(recording.rounds.count, 1);
  const fill = () => {
    table.replaceChildren();
    const head = table.createTHead().insertRow();
    for (const name of ["Memory", "Addresses", "Size", "In how many rounds", "Written in all", "Symbols"]) head.append(element("th", name, { scope: "col" }));
    const body = table.createTBody();
    const rows = [...recording.hottest].sort((a, b) => (order.value === "rounds" ? b.heat - a.heat : 0) || b.writes - a.writes);
    for (const stretch of rows.slice(0, 20)) {
      const region = recording.regions[regionAt(recording, stretch.first)];
      const times = stretch.writes / stretch.npages;
      const row = body.insertRow();
      row.tabIndex = 0;
      row.append(
        element("td", shortened(region.label, 48), { title: harmless(region.name || region.label) }),
        element("td", rangeText(recording, stretch.first, stretch.first + stretch.npages), { className: "address" }),
        element("td", sized(stretch.npages * recording.page_size), { className: "number" }),
        element("td", `${Number(times.toFixed(1)).toLocaleString("en")} of ${rounds.toLocaleString("en")} (${percent(times / rounds)})`, { className: "number" }),
        element("td", sized(stretch.writes * recording.page_size), { className: "number" }),
        element("td", stretch.symbols.map((name) => shortened(name, 40)).join(", "), { className: "symbols", title: stretch.symbols.map(harmless).join(", ") }),
      );
      row.addEventListener("click", () => show(stretch));
      row.addEventListener("keydown", (event) => { if (event.key === "Enter") show(stretch); });
    }
  };
  order.addEventListener("change", fill);
  fill();
}

function durationOf({ rounds }) {
  return rounds.count ? rounds.edges[rounds.count] : 0;
}

function fillFacts(recording) {
  const { facts, rounds } = recording;
  const total = (column) => column.reduce((sum, value) => sum + value, 0);
  const duration = durationOf(recording);
  const gets = total(rounds.gets);
  const rows = [
    ["Target", facts.target],
    ["Port", `${facts.port} (${exactness(facts.exactness)})`],
    ["Page size", sized(facts.page_size)],
    ["Started", facts.started === null ? null : `${new Date(facts.started * 1000).toISOString().replace("T", " ").slice(0, 19)} UTC`],
    ["Duration", `${timed(duration)} in ${counted(rounds.count, "round")}`],
    ["Written", `${sized(total(rounds.nbytes))} in ${counted(total(rounds.pages), "page")}, ${counted(recording.runs, "run")}`],
    ["Overhead", `${percent(duration ? gets / duration : 0)} of the time in gets (${timed(gets)})`],
    ["Page faults of the target", facts.faults === null ? null : `${facts.faults.toLocaleString("en")} (${Math.round(facts.faults / (duration || 1)).toLocaleString("en")} a second)`],
    ["Ended", ended(facts.status)],
    ["Guest program", facts.image],
    ["Machine", [facts.machine, facts.kernel].filter(Boolean).join(", ")],
    ["dirtylog", facts.dirtylog],
    ["Cannot be seen", facts.blind_spots],
    ["Incomplete", facts.incomplete.length ? facts.incomplete : null],
    ["Marks", recording.marks.length ? recording.marks.slice(0, 200).map(([seconds, text]) => `${seconds.toFixed(3)} s: ${text}`) : null],
  ];
  const table = document.getElementById("facts");
  for (const [name, value] of rows) {
    if (value === null || value === undefined || value === "") continue;
    const row = table.insertRow();
    row.append(element("th", name, { scope: "row" }));
    const cell = row.insertCell();
    if (Array.isArray(value)) {
      const list = document.createElement("ul");
      list.append(...value.map((text) => element("li", harmless(text))));
      if (value.length) cell.append(list); else cell.textContent = "nothing is known that cannot";
    } else {
      cell.textContent = harmless(value);
    }
  }
}

function exactness(word) {
  return word === "superset" ? "superset: it may report more than was written, never less" : `${word}: what is reported was written`;
}

function ended(status) {
  if (status === null) return "no: it was still going on, or its recorder was killed";
  return status === 0 ? "as planned" : `with exit status ${status}`;
}

function fillWarnings({ facts }) {
  const warnings = document.getElementById("warnings");
  const warn = (text) => warnings.append(element("p", text, { className: "warning" }));
  if (facts.incomplete.length) warn(`Writes may have been missed: ${facts.incomplete.map(harmless).join("; ")}.`);
  if (facts.status === null) warn("The recording was not ended; its last round may be missing.");
}
