// The counterpart of Curve.at and predict, in dirtylog's observe/footprint.py and observe/precopy.py.

const SHRINKING = 1 - 1e-3;
const SHORTEST = 1e-6;

function curveAt(curve, seconds) {
  const { seconds: times, nbytes, capacity, shape } = curve;
  if (!times.length || seconds <= 0) return 0;
  if (times.length === 1) return Math.min((nbytes[0] * seconds) / times[0], capacity);
  let after = 1;
  while (after < times.length - 1 && times[after] < seconds) after++;
  const [time0, time1, low, high] = [times[after - 1], times[after], nbytes[after - 1], nbytes[after]];
  if (shape && time0 < seconds && seconds < time1) {
    const [before, here, behind] = [time0, seconds, time1].map((time) => interpolated(shape, time));
    if (before < behind) return Math.min(low + ((high - low) * (here - before)) / (behind - before), capacity);
  }
  let value;
  if (low <= 0) {
    value = (high * Math.max(0, seconds - time0)) / (time1 - time0);
  } else {
    const power = Math.min(1, Math.max(0, Math.log(high / low) / Math.log(time1 / time0)));
    value = low * (seconds / time0) ** power;
  }
  return Math.min(value, capacity);
}

// numpy.interp
function interpolated([times, values], time) {
  if (time <= times[0]) return values[0];
  if (time >= times[times.length - 1]) return values[values.length - 1];
  const before = intervalOf(times, time);
  return values[before] + ((values[before + 1] - values[before]) * (time - times[before])) / (times[before + 1] - times[before]);
}

// Bytes, bytes a second, seconds.
function predict(curve, memory, bandwidth, downtime) {
  const shortest = Math.max(SHORTEST, curve.seconds.length ? curve.seconds[0] : 0);
  const lengths = [memory / bandwidth];
  let reached = null;
  let rest;
  for (;;) {
    const before = lengths[lengths.length - 1];
    rest = curveAt(curve, before) / bandwidth;
    if (reached === null && rest <= downtime) reached = lengths.length;
    const shrinks = rest < before * SHRINKING;
    if (shrinks || reached === lengths.length) lengths.push(rest);
    if (!shrinks || (reached !== null && rest < shortest)) break;
  }
  const smallest = lengths.slice(1).reduce((least, length) => Math.min(least, length), rest);
  if (reached === null) {
    return { converges: false, rounds: lengths.length, nbytes: Infinity, seconds: Infinity, downtime: rest, smallest_downtime: smallest, lengths };
  }
  const sent = lengths.slice(0, reached + 1);
  const seconds = sent.reduce((sum, length) => sum + length, 0);
  return { converges: true, rounds: reached, nbytes: seconds * bandwidth, seconds, downtime: sent[reached], smallest_downtime: smallest, lengths: sent };
}
