// The axis of memory: which region has a page, where it lies, and what stands beside the picture.

function regionAt(recording, page) {
  let low = 0;
  let high = recording.regions.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (recording.regions[middle].start <= page) low = middle; else high = middle - 1;
  }
  return low;
}

// Addresses have 64 bits.
function addressOf(recording, page, region = recording.regions[regionAt(recording, page)]) {
  return BigInt(region.address) + BigInt(page - region.start) * BigInt(recording.page_size);
}

function rangeText(recording, first, end) {
  const last = recording.regions[regionAt(recording, end - 1)];
  return `0x${addressOf(recording, first).toString(16)} – 0x${addressOf(recording, end, last).toString(16)}`;
}

function regionTitle(recording, region) {
  const end = addressOf(recording, region.start + region.npages, region);
  return `${shortened(region.label, 60)}  0x${BigInt(region.address).toString(16)}–0x${end.toString(16)}`;
}

// Ticks for the pages low to high of an axis so many pixels tall: addresses within one region, else the regions' names.
function memoryTicks(recording, low, high, pixels) {
  const from = regionAt(recording, low);
  const to = regionAt(recording, Math.max(low, high - 1));
  if (from === to) return addressTicks(recording, low, high);
  const shown = [];
  for (let index = from; index <= to; index++) {
    const region = recording.regions[index];
    const bottom = Math.max(low, region.start);
    const top = Math.min(high, region.start + region.npages);
    shown.push({ region, middle: (bottom + top) / 2, height: ((top - bottom) / (high - low)) * pixels });
  }
  shown.sort((a, b) => b.height - a.height);
  const labelled = [];
  for (const one of shown) {
    const far = (other) => (Math.abs(one.middle - other.middle) / (high - low)) * pixels > 13;
    if (labelled.every(far)) labelled.push(one);
    if (labelled.length > pixels / 14) break;
  }
  const dividers = to - from < 150 ? recording.regions.slice(from + 1, to + 1).map((region) => region.start) : [];
  return {
    values: labelled.map((one) => one.middle),
    texts: labelled.map((one) => plain(shortened(one.region.label, 20))),
    dividers,
    title: "",
  };
}

function addressTicks(recording, low, high) {
  const region = recording.regions[regionAt(recording, low)];
  const step = 2 ** Math.max(0, Math.ceil(Math.log2((high - low) / 9)));
  const base = Number((BigInt(region.address) / BigInt(recording.page_size)) % BigInt(step));
  const values = [];
  const texts = [];
  for (let page = region.start - base + Math.ceil((low - region.start + base) / step) * step; page < high; page += step) {
    if (page < low) continue;
    values.push(page);
    texts.push(`0x${addressOf(recording, page, region).toString(16)}`);
  }
  return { values, texts, dividers: [], title: plain(shortened(region.label, 40)) };
}
