// Runs into cells: what share of a stretch's pages was written in a round, the mean over a cell's rounds.

const COLUMNS = 400;
const ROWS = 250;

// The number of edges that are not above a value, less one: the interval that has it.
function intervalOf(edges, value) {
  let low = 0;
  let high = edges.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (edges[middle] <= value) low = middle; else high = middle - 1;
  }
  return low;
}

// The cells for seconds x0 to x1 and pages y0 to y1, or somewhat more, for cells lie at multiples of their size.
function cells(recording, { x0, x1, y0, y1 }) {
  const { first, end, starts, edges } = recording.writes;
  const count = edges.length - 1;
  let round0 = Math.min(intervalOf(edges, x0), count - 1);
  let round1 = Math.min(Math.max(intervalOf(edges, x1) + (edges[intervalOf(edges, x1)] < x1 ? 1 : 0), round0 + 1), count);
  const wide = Math.ceil((round1 - round0) / COLUMNS);
  round0 -= round0 % wide;
  const tall = Math.ceil((Math.ceil(y1) - Math.floor(y0)) / ROWS);
  const low = Math.max(0, Math.floor(Math.floor(y0) / tall) * tall);
  const high = Math.min(recording.npages, Math.ceil(Math.ceil(y1) / tall) * tall);
  round1 = Math.min(count, round0 + Math.ceil((round1 - round0) / wide) * wide);
  const columns = Math.ceil((round1 - round0) / wide);
  const rows = Math.ceil((high - low) / tall);
  const pages = new Float64Array(rows * columns);
  for (let round = round0; round < round1; round++) {
    const column = Math.floor((round - round0) / wide);
    const stop = starts[round + 1];
    let run = starts[round];
    // The first run that ends above the lowest page.
    for (let past = stop; run < past;) {
      const middle = (run + past) >>> 1;
      if (end[middle] > low) past = middle; else run = middle + 1;
    }
    for (; run < stop && first[run] < high; run++) {
      let at = Math.max(first[run], low);
      const last = Math.min(end[run], high);
      while (at < last) {
        const row = Math.floor((at - low) / tall);
        const next = Math.min(last, low + (row + 1) * tall);
        pages[row * columns + column] += next - at;
        at = next;
      }
    }
  }
  return {
    pages, rows, columns, tall, wide, low, high, round0, round1,
    x: Array.from({ length: columns + 1 }, (_, column) => edges[Math.min(round0 + column * wide, round1)]),
    y: Array.from({ length: rows + 1 }, (_, row) => Math.min(low + row * tall, high)),
  };
}

function cellSize(bins, row, column) {
  const tall = Math.min(bins.tall, bins.high - bins.low - row * bins.tall);
  const wide = Math.min(bins.wide, bins.round1 - bins.round0 - column * bins.wide);
  return { tall, wide };
}

function shares(bins) {
  const { pages, rows, columns } = bins;
  const z = [];
  for (let row = 0; row < rows; row++) {
    const line = new Array(columns);
    for (let column = 0; column < columns; column++) {
      const written = pages[row * columns + column];
      const { tall, wide } = cellSize(bins, row, column);
      line[column] = written ? written / (tall * wide) : null;
    }
    z.push(line);
  }
  return z;
}

// Bytes a second in each column. For all memory as the rounds had it, for a part of it from the runs.
function rates(recording, bins, part) {
  const { rounds, writes } = recording;
  const mean = [];
  const peak = [];
  for (let column = 0; column < bins.columns; column++) {
    const from = (bins.round0 + column * bins.wide) * writes.merged;
    const to = Math.min(rounds.count, (bins.round0 + Math.min((column + 1) * bins.wide, bins.round1 - bins.round0)) * writes.merged);
    let nbytes = 0;
    let seconds = 0;
    let highest = 0;
    for (let round = from; round < to; round++) {
      nbytes += rounds.nbytes[round];
      seconds += rounds.seconds[round];
      highest = Math.max(highest, rounds.seconds[round] ? rounds.nbytes[round] / rounds.seconds[round] : 0);
    }
    if (part) {
      nbytes = 0;
      for (let row = 0; row < bins.rows; row++) nbytes += bins.pages[row * bins.columns + column];
      nbytes *= recording.page_size;
    }
    mean.push(seconds ? nbytes / seconds : 0);
    peak.push(highest);
  }
  return { mean, peak: part || bins.wide * writes.merged === 1 ? null : peak };
}
