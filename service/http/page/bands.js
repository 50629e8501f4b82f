// The energy in bands of the reference's directions, as a ratio to the reference, with bounds and thresholds.

import { Chart } from "./chart.js";
import { $, colour } from "./dom.js";
import { known, number } from "./format.js";

const SMALLEST = -6; // as a power of two; what is less is drawn there
let bands = [];
let limits = {};
let reach = 2;
const log = (ratio) => Math.max(SMALLEST, Math.log2(Math.max(ratio, 2 ** (SMALLEST - 1))));
const name = (band) => (band.first === band.last ? String(band.first) : `${band.first}–${band.last}`);

function tone(band) {
  const { estimate, lower, upper } = band.ratio;
  if (band.part === "head") return upper < limits.head_energy_ratio_low ? "watch" : "now";
  if (upper < limits.tail_energy_ratio_low || estimate < limits.tail_energy_ratio_gone) return "bad";
  return lower > limits.tail_energy_ratio_high ? "bad" : "now";
}

function paint(u) {
  const { ctx } = u;
  const pixel = devicePixelRatio;
  const y = (v) => u.valToPos(Math.max(-reach, Math.min(reach, v)), "y", true);
  const x = (v) => u.valToPos(v, "x", true);
  ctx.save();
  ctx.font = `${11 * pixel}px system-ui, sans-serif`;
  ctx.textAlign = "center";
  const stroke = (style, dash, points) => {
    ctx.strokeStyle = style;
    ctx.setLineDash(dash.map((it) => it * pixel));
    ctx.lineWidth = 1.5 * pixel;
    ctx.beginPath();
    points.forEach(([a, b], i) => (i ? ctx.lineTo(a, b) : ctx.moveTo(a, b)));
    ctx.stroke();
  };
  stroke(colour("past"), [5, 4], [[x(0), y(0)], [x(bands.length), y(0)]]);
  bands.forEach((band, i) => {
    const [from, to] = [x(i), x(i + 1)];
    const thresholds = band.part === "head" ? [limits.head_energy_ratio_low] : [limits.tail_energy_ratio_low, limits.tail_energy_ratio_high];
    for (const limit of thresholds.filter(known)) stroke(colour("watch"), [2, 3], [[from, y(log(limit))], [to, y(log(limit))]]);
    const { estimate, lower, upper } = band.ratio;
    if (!known(estimate)) return;
    const [top, base] = [y(log(estimate)), y(0)];
    ctx.fillStyle = colour(tone(band));
    ctx.fillRect(from + 0.18 * (to - from), Math.min(top, base), 0.64 * (to - from), Math.max(1.5 * pixel, Math.abs(base - top)));
    const middle = (from + to) / 2;
    if (known(lower) && known(upper)) stroke(colour("ink"), [], [[middle, y(log(Math.max(lower, 0)))], [middle, y(log(upper))]]);
    ctx.fillStyle = colour("ink");
    const high = Math.min(top, base, known(upper) ? y(log(upper)) : base);
    if (to - from > 24 * pixel) ctx.fillText(estimate < 10 ? estimate.toFixed(2) : number(estimate, 2), middle, Math.max(high - 5 * pixel, 12 * pixel));
  });
  ctx.restore();
}

const chart = new Chart($("bands"), {
  height: 260,
  series: [{ points: { show: false } }],
  hooks: { draw: [paint] },
  scales: { x: { time: false, range: () => [0, bands.length] }, y: { range: () => [-reach, reach] } },
  axes: [
    {
      splits: () => bands.map((_, i) => i + 0.5),
      values: () => bands.map((it) => ($("bands").clientWidth / bands.length > 58 ? name(it) : String(it.last))),
      label: "rank of the direction, from head to tail",
      grid: { show: false },
      size: 26,
    },
    {
      splits: () => Array.from({ length: 2 * reach + 1 }, (_, i) => i - reach).filter((e) => e % (reach > 4 ? 2 : 1) === 0),
      values: (u, values) => values.map((e) => (e < 0 ? `1/${2 ** -e}` : `${2 ** e}×`)),
      size: 46,
    },
  ],
  tip: (index, u) => {
    const band = bands[Math.floor(u.posToVal(u.cursor.left, "x"))];
    if (!band) return "";
    const { estimate, lower, upper } = band.ratio;
    return `directions ${name(band)}, ${band.part}\n${number(estimate)} times the reference\n95 %: ${number(lower)} to ${number(upper)}`;
  },
});

export function drawBands(spectrum, window) {
  bands = spectrum?.windows[window]?.bands ?? [];
  limits = spectrum?.thresholds ?? {};
  const ratios = bands.filter((it) => known(it.ratio.estimate));
  if (!ratios.length) return chart.draw(null, "", spectrum?.reference ? "needs more rows" : "needs a reference: its directions are what is measured");
  reach = Math.max(2, Math.ceil(Math.max(...ratios.map((it) => Math.abs(log(it.ratio.estimate)) + 0.2))));
  const words = ratios.map((it) => `${name(it)}: ${number(it.ratio.estimate, 2)}`).join(", ");
  const middles = bands.map((_, i) => i + 0.5);
  chart.draw([middles, middles.map(() => null)], `Energy in directions of the reference, as ratios: ${words}`);
}
