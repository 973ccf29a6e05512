// The picture of pages against time, and the rate below it. One figure: they share the time.

const SCALE = [[0, "#fff3c4"], [0.25, "#fdc466"], [0.5, "#f98043"], [0.75, "#d32f34"], [1, "#7a0a2e"]];
const INK = "#30363d";
const GRID = "#e6e8eb";
const FONT = { family: "system-ui, 'Segoe UI', 'Liberation Sans', Arial, sans-serif", size: 12, color: INK };
const HEIGHT = 660;
const MARGIN = { l: 160, r: 16, t: 34, b: 46 };
// Shares of the figure's height: the rate, and the picture from where the rate ends.
const RATE_TOP = 0.2;
const MAP_BOTTOM = 0.25;

// The buttons are named one by one: among Plotly's own is one that sends the picture to its makers.
function chartConfig(filename) {
  return {
    responsive: true, displaylogo: false, doubleClick: "reset", plotlyServerURL: "", toImageButtonOptions: { format: "png", scale: 2, filename },
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
  };
}

class Heat {
  constructor(recording, node, pointed) {
    this.recording = recording;
    this.node = node;
    this.pointed = pointed;
    const { edges } = recording.writes;
    this.whole = { x0: edges[0], x1: edges[edges.length - 1], y0: 0, y1: recording.npages };
    this.view = { ...this.whole };
    this.bins = cells(recording, this.view);
    this.logarithmic = wantsLogarithm(shares(this.bins));
  }

  async draw() {
    await Plotly.newPlot(this.node, this.traces(), this.layout(), chartConfig("dirtylog-pages"));
    this.node.on("plotly_relayout", (change) => this.changed(change));
    this.node.on("plotly_hover", ({ points }) => this.point(points[0]));
    this.node.on("plotly_unhover", () => { this.pointed.textContent = "\u00a0"; });
  }

  // The user zoomed, moved or resized: what is seen now is binned anew.
  changed(change) {
    if (Object.keys(change).some((key) => key.includes("axis") || key === "autosize")) {
      const { xaxis, yaxis } = this.node.layout;
      this.show({ x0: xaxis.range[0], x1: xaxis.range[1], y0: yaxis.range[0], y1: yaxis.range[1] });
    }
  }

  show(view) {
    this.view = this.within(view);
    return this.redraw();
  }

  redraw() {
    return Plotly.react(this.node, this.traces(), this.layout());
  }

  // No further out than the recording, nor further in than a round and a few pages.
  within({ x0, x1, y0, y1 }) {
    const fit = (low, high, from, to, least) => {
      if (!(high > low)) [low, high] = [high, low];
      const length = Math.min(to - from, Math.max(high - low, least));
      const start = Math.min(Math.max(high - low < length ? (low + high - length) / 2 : low, from), to - length);
      return [start, start + length];
    };
    const { whole } = this;
    const [left, right] = fit(Math.max(x0, whole.x0 - 1e9), Math.min(x1, whole.x1 + 1e9), whole.x0, whole.x1, (whole.x1 - whole.x0) * 1e-6);
    const [bottom, top] = fit(y0, y1, whole.y0, whole.y1, Math.min(4, whole.y1));
    return { x0: left, x1: right, y0: bottom, y1: top };
  }

  traces() {
    const { recording, view } = this;
    const bins = (this.bins = cells(recording, view));
    let z = shares(bins);
    let [low, high] = extremes(z);
    const bar = { title: { text: "share of the pages written in a round", side: "right" }, thickness: 12, len: 1 - MAP_BOTTOM, y: 1, yanchor: "top", outlinewidth: 0, x: 1.01, xpad: 4 };
    if (this.logarithmic) {
      z = z.map((line) => line.map((share) => (share === null ? null : Math.log10(share))));
      [low, high] = [Math.log10(low), Math.log10(high)];
      if (high - low < 0.3) low = high - 0.3;
      Object.assign(bar, decades(low, high));
    } else {
      low = 0;
      bar.tickformat = high < 0.02 ? ".2~%" : ".0%";
      if (high < 0.02) bar.tickformat = ".2~p";
    }
    const part = view.y0 > 0 || view.y1 < recording.npages;
    const { mean, peak } = rates(recording, bins, part);
    const step = (values) => (values.length ? [...values, values[values.length - 1]] : []);
    const line = { type: "scatter", mode: "lines", yaxis: "y2", hoverinfo: "none" };
    const rate = { ...line, x: bins.x, y: step(mean), line: { shape: "hv", width: 1.2, color: "#a61b32" }, fill: "tozeroy", fillcolor: "rgba(211,47,52,0.18)" };
    const highest = peak && { ...line, x: bins.x, y: step(peak), line: { shape: "hv", width: 0.8, color: "#f0a58a" } };
    return [
      { type: "heatmap", x: bins.x, y: bins.y, z, zmin: low, zmax: high, colorscale: SCALE, colorbar: bar, hoverinfo: "none", hoverongaps: true },
      ...(highest ? [highest] : []),
      rate,
    ];
  }

  layout() {
    const { recording, view } = this;
    const pixels = (HEIGHT - MARGIN.t - MARGIN.b) * (1 - MAP_BOTTOM);
    const ticks = memoryTicks(recording, view.y0, view.y1, pixels);
    const top = Math.max(...this.peakShown(), 0) || 1;
    const rate = rateTicks(top);
    const line = { showline: true, linecolor: "#9aa1a9", linewidth: 1, ticks: "outside", ticklen: 4, tickcolor: "#9aa1a9", zeroline: false };
    return {
      height: HEIGHT, margin: MARGIN, font: FONT, showlegend: false, paper_bgcolor: "white", plot_bgcolor: "white",
      hovermode: "closest", dragmode: "zoom",
      xaxis: { ...line, range: [view.x0, view.x1], anchor: "y2", title: { text: "time (s)", standoff: 8 }, gridcolor: GRID, mirror: false },
      yaxis: {
        ...line, range: [view.y0, view.y1], domain: [MAP_BOTTOM, 1], tickvals: ticks.values, ticktext: ticks.texts, showgrid: false, mirror: true,
        title: { text: ticks.title, standoff: 4 },
      },
      yaxis2: { ...line, range: [0, top * 1.08], domain: [0, RATE_TOP], tickvals: rate.values, ticktext: rate.texts, gridcolor: GRID, fixedrange: true, title: { text: "rate", standoff: 4 } },
      shapes: [
        ...ticks.dividers.map((page) => ({ type: "line", xref: "x domain", x0: 0, x1: 1, yref: "y", y0: page, y1: page, line: { color: "#8a929b", width: 0.7 } })),
        ...this.marks().map(([seconds]) => ({ type: "line", xref: "x", x0: seconds, x1: seconds, yref: "paper", y0: 0, y1: 1, line: { color: "#2b5fb3", width: 1, dash: "dot" } })),
      ],
      annotations: this.markTexts(),
    };
  }

  peakShown() {
    const { mean, peak } = rates(this.recording, this.bins, this.view.y0 > 0 || this.view.y1 < this.recording.npages);
    return peak || mean;
  }

  marks() {
    return this.recording.marks.filter(([seconds]) => seconds >= this.view.x0 && seconds <= this.view.x1);
  }

  // As many texts as have room; all are in the table below.
  markTexts() {
    const width = (this.node.clientWidth || 1200) - MARGIN.l - 90;
    let free = -Infinity;
    const texts = [];
    for (const [seconds, text] of this.marks()) {
      const at = ((seconds - this.view.x0) / (this.view.x1 - this.view.x0)) * width;
      const short = shortened(text, 28);
      if (at < free) continue;
      free = at + short.length * 6.5 + 10;
      texts.push({ xref: "x", x: seconds, yref: "paper", y: 1, xanchor: "left", yanchor: "bottom", showarrow: false, text: plain(short), font: { size: 11, color: "#2b5fb3" } });
    }
    return texts;
  }

  point({ pointNumber, pointIndex, data }) {
    const { recording, bins } = this;
    if (data.type !== "heatmap") {
      const column = Math.min(pointNumber, bins.columns - 1);
      const { mean } = rates(recording, bins, this.view.y0 > 0 || this.view.y1 < recording.npages);
      this.pointed.textContent = `${this.when(column)}: ${sized(mean[column])}/s`;
      return;
    }
    const [row, column] = pointIndex || pointNumber;
    const first = bins.y[row];
    const end = bins.y[row + 1];
    const size = cellSize(bins, row, column);
    const written = bins.pages[row * bins.columns + column] / (size.tall * size.wide);
    const names = [regionAt(recording, first), regionAt(recording, end - 1)].map((index) => shortened(recording.regions[index].label, 60));
    const where = names[0] === names[1] ? names[0] : `${names[0]} … ${names[1]}`;
    this.pointed.textContent = `${where}, ${counted(end - first, "page")} ${rangeText(recording, first, end)}, ${this.when(column)}: ${percent(written)} written`;
  }

  when(column) {
    const { bins, recording } = this;
    const merged = recording.writes.merged;
    const from = bins.round0 + column * bins.wide;
    const to = Math.min(from + bins.wide, bins.round1);
    const rounds = to - from === 1 && merged === 1 ? `round ${from + 1}` : `rounds ${from * merged + 1} to ${Math.min(to * merged, recording.rounds.count)}`;
    return `${rounds} (${bins.x[column].toFixed(3)} to ${bins.x[column + 1].toFixed(3)} s)`;
  }
}

function extremes(z) {
  let low = Infinity;
  let high = 0;
  for (const line of z) {
    for (const share of line) {
      if (share === null) continue;
      if (share < low) low = share;
      if (share > high) high = share;
    }
  }
  return high ? [low, high] : [0.01, 1];
}

// Where most cells would be as good as white beside the fullest.
function wantsLogarithm(z) {
  const [, high] = extremes(z);
  const written = z.flat().filter((share) => share !== null);
  return written.filter((share) => share < high / 20).length > written.length / 2;
}

function decades(low, high) {
  const tickvals = [];
  const ticktext = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
    for (const digit of high - low < 1.5 ? [1, 2, 5] : [1]) {
      const value = power + Math.log10(digit);
      if (value < low - 1e-9 || value > high + 1e-9) continue;
      tickvals.push(value);
      ticktext.push(percent(digit * 10 ** power));
    }
  }
  return { tickvals, ticktext };
}

function rateTicks(top) {
  const unit = 1024 ** Math.floor(Math.log(Math.max(top, 1)) / Math.log(1024));
  const raw = top / unit / 3;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((digit) => digit * power >= raw) * power * unit;
  const values = [];
  for (let value = 0; value <= top * 1.05; value += step) values.push(value);
  return { values, texts: values.map((value) => (value ? `${sized(value)}/s` : "0")) };
}
