// D(t) and the prediction beside it.

class Footprint {
  constructor(recording, node) {
    this.curve = recording.curve;
    this.node = node;
    this.inputs = ["bandwidth", "downtime", "memory"].map((id) => document.getElementById(id));
    this.inputs[2].value = Number(((recording.facts.held || this.curve.capacity) / 2 ** 20).toFixed(3));
    for (const input of this.inputs) input.addEventListener("input", () => this.update());
  }

  // Bytes a second, seconds, bytes.
  asked() {
    const [bandwidth, downtime, memory] = this.inputs.map((input) => (input.value === "" ? NaN : Number(input.value)));
    return { bandwidth: (bandwidth * 1e9) / 8, downtime: downtime / 1e3, memory: memory * 2 ** 20 };
  }

  async update() {
    const { bandwidth, downtime, memory } = this.asked();
    const table = document.getElementById("prediction");
    const verdict = document.getElementById("verdict");
    table.replaceChildren();
    verdict.className = "";
    if (!(bandwidth > 0 && downtime > 0 && memory > 0) || ![bandwidth, downtime, memory].every(Number.isFinite)) {
      verdict.textContent = "Enter numbers above 0.";
      return;
    }
    const found = predict(this.curve, memory, bandwidth, downtime);
    verdict.className = found.converges ? "good" : "bad";
    verdict.textContent = found.converges ? "Converges." : `Does not converge; smallest pause that would: ${timed(found.smallest_downtime)}.`;
    const rows = found.converges
      ? [
        ["Rounds while it runs", found.rounds.toLocaleString("en")], ["Sent in all", sized(found.nbytes)], ["Total time", timed(found.seconds)],
        ["Pause reached", timed(found.downtime)], ["Smallest pause possible", timed(found.smallest_downtime)],
      ]
      : [["Rounds that help", found.rounds.toLocaleString("en")], ["Pause after these", timed(found.downtime)]];
    for (const [name, value] of rows) {
      const row = table.insertRow();
      row.append(element("th", name, { scope: "row" }), element("td", value));
    }
    await this.draw(found, bandwidth, downtime);
  }

  async draw(found, bandwidth, downtime) {
    const { seconds, nbytes, error } = this.curve;
    const usable = seconds.map((_, index) => index).filter((index) => seconds[index] > 0 && nbytes[index] > 0);
    const shortest = usable.length ? seconds[usable[0]] : 1;
    const longest = usable.length ? seconds[usable[usable.length - 1]] : 1;
    // As far as the rounds of the migration, unless what was measured would become too small to see.
    const from = Math.max(Math.min(shortest, found.lengths[found.lengths.length - 2] ?? shortest) / 2, shortest / 50);
    const to = Math.min(Math.max(longest, found.lengths[0]) * 2, longest * 50);
    const times = Array.from({ length: 160 }, (_, index) => from * (to / from) ** (index / 159));
    const low = Math.max(1, curveAt(this.curve, from) / 2);
    const high = Math.max(curveAt(this.curve, to), low) * 3;
    const measured = usable.map((index) => seconds[index]);
    const inside = times.filter((time) => time >= measured[0] && time <= measured[measured.length - 1]);
    const at = (list) => list.map((time) => curveAt(this.curve, time));
    const line = { type: "scatter", mode: "lines", hoverinfo: "skip" };
    const steps = found.lengths.slice(0, -1).filter((length) => length >= from && length <= to);
    const band = this.curve.tenths ? usable.filter((index) => this.curve.tenths[0][index] > 0) : [];
    const edge = (which) => ({ ...line, x: band.map((index) => seconds[index]), y: band.map((index) => this.curve.tenths[which][index]), line: { width: 0 } });
    const traces = [
      { ...edge(0), showlegend: false },
      { ...edge(1), name: "eight tenths of the windows", fill: "tonexty", fillcolor: "rgba(166,27,50,0.13)", showlegend: band.length > 1 },
      { ...line, x: times, y: at(times), line: { color: "#d9a3a8", width: 1.5, dash: "dot" }, showlegend: false },
      { ...line, x: inside, y: at(inside), line: { color: "#a61b32", width: 1.8 }, showlegend: false },
      {
        type: "scatter", mode: "markers", name: "D(t), measured ± standard error", x: measured, y: usable.map((index) => nbytes[index]),
        error_y: { type: "data", array: usable.map((index) => error[index] || 0), thickness: 1.2, width: 4, color: "#a61b32" },
        marker: { color: "#a61b32", size: 6 }, customdata: usable.map((index) => [timed(seconds[index]), sized(nbytes[index])]),
        hovertemplate: "%{customdata[1]} within %{customdata[0]}<extra></extra>",
      },
      { ...line, name: "sent within t", x: [from, to], y: [from * bandwidth, to * bandwidth], line: { color: "#2b5fb3", width: 1.4 } },
      { ...line, name: "sent within the longest pause", x: [from, to], y: [downtime * bandwidth, downtime * bandwidth], line: { color: "#2b5fb3", width: 1.2, dash: "dash" } },
      {
        type: "scatter", mode: "markers", name: "rounds of the migration", x: steps, y: at(steps), hoverinfo: "skip",
        marker: { color: "white", size: 9, line: { color: "#2b5fb3", width: 1.6 }, symbol: "circle" },
      },
    ];
    const axis = { type: "log", showline: true, linecolor: "#9aa1a9", gridcolor: GRID, ticks: "outside", ticklen: 4, tickcolor: "#9aa1a9", zeroline: false, minor: { ticks: "" } };
    const layout = {
      height: 430, margin: { l: 76, r: 16, t: 10, b: 92 }, font: FONT, paper_bgcolor: "white", plot_bgcolor: "white", hovermode: "closest",
      xaxis: { ...axis, range: [Math.log10(from), Math.log10(to)], title: { text: "time t", standoff: 6 }, ...powers(from, to, 10, timed) },
      yaxis: { ...axis, range: [Math.log10(low), Math.log10(high)], title: { text: "written within t", standoff: 6 }, ...byteTicks(low, high) },
      legend: { orientation: "h", traceorder: "normal", x: 0, y: -0.17, yanchor: "top", font: { size: 11 } },
    };
    await Plotly.react(this.node, traces, layout, chartConfig("dirtylog-footprint"));
  }
}

function powers(low, high, base, text) {
  const tickvals = [];
  for (let power = Math.ceil(Math.log10(low)); power <= Math.log10(high); power++) tickvals.push(base ** power);
  return { tickvals, ticktext: tickvals.map(text) };
}

function byteTicks(low, high) {
  const first = Math.ceil(Math.log2(low));
  const last = Math.floor(Math.log2(high));
  const step = Math.max(1, Math.ceil((last - first) / 8));
  const tickvals = [];
  for (let power = Math.ceil(first / step) * step; power <= last; power += step) tickvals.push(2 ** power);
  return { tickvals, ticktext: tickvals.map(sized) };
}
