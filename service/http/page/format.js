// Numbers, times and verdicts in words.

export const known = (x) => typeof x === "number" && Number.isFinite(x);

export function number(x, digits = 3) {
  if (!known(x)) return "–";
  if (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e7)) return x.toExponential(1);
  const whole = String(Math.trunc(Math.abs(x))).length;
  return new Intl.NumberFormat("en", { maximumSignificantDigits: Math.max(digits, whole) }).format(x);
}

export const percent = (x) => (known(x) ? `${number(100 * x, 2)} %` : "–");

export function seconds(x) {
  if (!known(x)) return "–";
  return x < 1 ? `${number(1000 * x, 2)} ms` : `${number(x, 2)} s`;
}

export function duration(s) {
  if (s >= 3600 && s % 3600 === 0) return `${s / 3600} h`;
  return s >= 60 && s % 60 === 0 ? `${s / 60} min` : `${number(s)} s`;
}

export const clock = (unix) => new Date(1000 * unix).toLocaleTimeString("en-GB");
export const minute = (unix) => clock(unix).slice(0, 5);

/** Verdict -> the word for people, the tone of its colour, and the runbook that says what to do. */
const VERDICTS = {
  healthy: ["healthy", "good", null],
  insufficient_data: ["not enough data yet", "none", "EmbeddingInsufficientData"],
  traffic_narrowed: ["traffic narrowed", "watch", "EmbeddingTrafficNarrowed"],
  traffic_shifted: ["traffic shifted", "watch", "EmbeddingTrafficShifted"],
  dimensional_collapse: ["dimensional collapse", "bad", "EmbeddingDirectionsDied"],
  complete_collapse: ["complete collapse", "bad", "EmbeddingCompleteCollapse"],
  model_fault: ["model fault", "bad", "EmbeddingModelFault"],
};

export function verdict(state) {
  const [word, tone, runbook] = VERDICTS[state] ?? [state ?? "not watched", "none", null];
  return { word, tone, runbook };
}
