// Numbers and names in words.

function sized(nbytes) {
  let unit = 0;
  let value = nbytes;
  while (Math.abs(value) >= 1023.95 && unit < 5) { value /= 1024; unit++; }
  const digits = unit === 0 ? 0 : value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
  return `${unit ? Number(value.toFixed(digits)) : Math.round(value)} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][unit]}`;
}

function timed(seconds) {
  if (seconds === 0) return "0 s";
  if (seconds < 0.9995e-3) return `${Number((seconds * 1e6).toPrecision(3))} µs`;
  if (seconds < 0.9995) return `${Number((seconds * 1e3).toPrecision(3))} ms`;
  if (seconds < 119.5) return `${Number(seconds.toPrecision(3))} s`;
  if (seconds < 7170) return `${Number((seconds / 60).toPrecision(3))} min`;
  return `${Number((seconds / 3600).toPrecision(3))} h`;
}

function percent(share) {
  return `${Number((share * 100).toPrecision(share < 0.0995 ? 2 : 3))} %`;
}

function counted(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

// Names come from strangers. What controls the direction of text, or breaks lines, could make one look like something else.
function harmless(text) {
  return String(text).replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, "\ufffd");
}

function shortened(text, length) {
  const characters = [...harmless(text)];
  return characters.length > length ? `${characters.slice(0, length - 1).join("")}…` : characters.join("");
}

// Plotly takes some tags in texts, links among them; a name has none.
function plain(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function element(tag, text, attributes = {}) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.textContent = text;
  return made;
}
