// The eigenvalues now, on logarithmic axes, over the reference's and the bounds of its tail.

import { Chart, line } from "./chart.js";
import { $, colour } from "./dom.js";
import { known, number } from "./format.js";

const DECADES = 9; // below the largest value, at most
const superscript = (n) => String(n).replace(/[-0-9]/g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]));
const power = (e) => (e >= -2 && e <= 3 ? String(Number((10 ** e).toPrecision(1))) : `10${superscript(e)}`);
let range = [0, 1];
let last = 1;

const chart = new Chart($("spectrum"), {
  height: 260,
  series: [line("wash", { width: 0 }), line("wash", { width: 0 }), line("past", { dash: [6, 4] }), line("now", { width: 2.5 })],
  bands: [{ series: [1, 2], fill: () => colour("wash") }],
  scales: { x: { time: false, range: () => [0, last] }, y: { range: () => range } },
  axes: [
    {
      splits: () => ranks(),
      values: (u, values) => values.map((v) => String(Math.round(2 ** v))),
      label: "rank",
      grid: { show: false },
      size: 26,
    },
    {
      splits: () => Array.from({ length: range[1] - range[0] + 1 }, (_, i) => range[0] + i).filter((e) => (range[1] - e) % Math.ceil((range[1] - range[0]) / 6) === 0),
      values: (u, values) => values.map(power),
      size: 46,
    },
  ],
  tip: (index, u) => {
    const value = (series) => (known(u.data[series][index]) ? number(10 ** u.data[series][index], 2) : "–");
    return `rank ${Math.round(2 ** u.data[0][index])}\nnow ${value(4)}\nreference ${value(3)}`;
  },
});

/** Powers of two up to the last rank: every second one where there is little room. */
function ranks() {
  const step = last > 8 && $("spectrum").clientWidth < 420 ? 2 : 1;
  return Array.from({ length: Math.floor(last / step) + 1 }, (_, i) => i * step);
}

/** Per rank, the share of the reference's energy that the tail's thresholds allow; null in the head. */
function bound(bands, count, limit) {
  const values = new Array(count).fill(null);
  if (known(limit)) {
    for (const band of bands.filter((it) => it.part === "tail")) values.fill(Math.log10(limit), band.first - 1, band.last);
  }
  return values;
}

export function drawSpectrum(spectrum, window) {
  const w = spectrum?.windows[window];
  const now = w && w.rows > 1 ? w.eigenvalues : [];
  const reference = spectrum?.reference?.eigenvalues ?? [];
  const count = Math.max(now.length, reference.length);
  const log = (values) => Array.from({ length: count }, (_, i) => (values[i] > 0 ? Math.log10(values[i]) : null));
  const [a, b] = [log(now), log(reference)];
  const values = [...a, ...b].filter(known);
  if (!values.length) return chart.draw(null, "", "no rows yet: send images to POST /embed, or embeddings to POST /observe");
  const peak = Math.ceil(Math.max(...values));
  range = [Math.max(peak - DECADES, Math.floor(Math.min(...values))), peak];
  if (range[0] === range[1]) range[0] -= 1;
  last = Math.max(1, Math.log2(count));
  const clamp = (list) => list.map((v) => (v === null ? null : Math.max(v, range[0])));
  const sum = (list) => clamp(list.map((v, i) => (v === null || b[i] === null ? null : v + b[i])));
  const x = Array.from({ length: count }, (_, i) => Math.log2(i + 1));
  const { tail_energy_ratio_low: low, tail_energy_ratio_high: high } = spectrum.thresholds;
  const bounds = [high, low].map((limit) => sum(bound(w.bands, count, limit)));
  // The curve ends at the floor where the eigenvalues do: a cliff is what a collapse looks like.
  const cliff = a.map((v, i) => (v === null && i < now.length && now.length && w.rows > now.length ? range[0] : v));
  chart.draw([x, ...bounds, clamp(b), clamp(cliff)], `Eigenvalue spectrum of ${number(w.rows)} rows: effective rank ${number(w.effective_rank)}`);
}
