// What is in the page, unpacked: the counterpart of payload.py.

async function inflate(id) {
  const text = document.getElementById(id).textContent;
  const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")));
}

function varints(bytes, count, Kind) {
  const out = new Kind(count);
  let place = 0;
  for (let index = 0; index < count; index++) {
    let byte = bytes[place++];
    let value = byte & 127;
    // Multiplied, not shifted: a shift has 32 bits, and these numbers up to 53.
    for (let unit = 128; byte > 127; unit *= 128) {
      byte = bytes[place++];
      value += (byte & 127) * unit;
    }
    out[index] = value;
  }
  return out;
}

function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const recording = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let place = 4 + length;
  const columns = {};
  for (const [name, [count, nbytes]] of Object.entries(recording.columns)) {
    columns[name] = varints(new Uint8Array(buffer, place, nbytes), count, Float64Array);
    place += nbytes;
  }
  recording.marks.sort((a, b) => a[0] - b[0]);
  recording.rounds = roundsOf(columns);
  recording.writes = writesOf(columns, recording);
  recording.npages = recording.regions.reduce((sum, region) => sum + region.npages, 0);
  return recording;
}

// The rounds as they were, in seconds and bytes. Round i is drawn from edges[i] to edges[i + 1].
function roundsOf(columns) {
  const count = columns.began.length;
  const rounds = { count, edges: new Float64Array(count + 1), seconds: new Float64Array(count), gets: new Float64Array(count) };
  let began = 0;
  for (let index = 0; index < count; index++) {
    began += columns.began[index];
    rounds.edges[index] = began / 1e6;
    rounds.seconds[index] = columns.seconds[index] / 1e6;
    rounds.gets[index] = columns.get_seconds[index] / 1e6;
  }
  if (count) rounds.edges[count] = rounds.edges[count - 1] + rounds.seconds[count - 1];
  rounds.pages = columns.pages;
  rounds.nbytes = columns.nbytes;
  return rounds;
}

// Runs first[i] to end[i] of the axis; those of (merged) round r are starts[r] to starts[r + 1].
function writesOf(columns, recording) {
  const { run_counts: counts, run_gaps: gaps, run_lengths: lengths } = columns;
  const merged = 2 ** recording.merged_rounds;
  const writes = { first: new Float64Array(gaps.length), end: new Float64Array(gaps.length), starts: new Uint32Array(counts.length + 1) };
  writes.edges = new Float64Array(counts.length + 1);
  writes.merged = merged;
  let run = 0;
  for (let round = 0; round < counts.length; round++) {
    writes.edges[round] = recording.rounds.edges[round * merged];
    let end = 0;
    for (const stop = run + counts[round]; run < stop; run++) {
      writes.first[run] = end + gaps[run];
      writes.end[run] = end = writes.first[run] + lengths[run] + 1;
    }
    writes.starts[round + 1] = run;
  }
  if (counts.length) writes.edges[counts.length] = recording.rounds.edges[recording.rounds.count];
  return writes;
}
