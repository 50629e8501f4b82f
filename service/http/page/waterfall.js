// The spectrum over time: ranks upwards, time to the right, colour for the eigenvalue against the reference's.

import { Chart } from "./chart.js";
import { $, colour, h } from "./dom.js";
import { clock, known, number } from "./format.js";

const REACH = 2; // decades to either side of the reference's eigenvalue
const DEPTH = 6; // decades below the largest, where there is no reference
let chart;
let cells = { time: [], values: [], ranks: [] };
let reference = null;
let breaks = [];
let ramp = null;
let highest = 0;
let visible = () => [0, 1];

export function setUp({ when, scale, span }) {
  visible = span;
  chart = new Chart($("waterfall"), {
    height: 230,
    series: [{ points: { show: false } }],
    hooks: { drawAxes: [paint] },
    scales: { ...scale, y: { range: () => [0, Math.log2(top()) + 0.5] } },
    axes: [
      when,
      {
        size: 46,
        grid: { show: false },
        splits: () => Array.from({ length: Math.floor(Math.log2(top()) / 2) + 1 }, (_, i) => 2 * i),
        values: (u, values) => values.map((v) => String(2 ** v)),
        label: "rank",
      },
    ],
    sync: "time",
    tip,
  });
}

/** The highest rank that has a value. */
function top() {
  return Math.max(2, ...cells.ranks.filter((_, k) => cells.values.some((row) => known(row[k]))));
}

const parse = (text) => (text.match(/[\d.]+/g) ?? []).slice(0, 3).map((it) => (text.startsWith("color(") ? 255 * it : Number(it)));
const blend = (a, b, share) => `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * share)).join(" ")})`;

/** The colour of one eigenvalue (log10) at the k-th rank. */
function shade(value, k) {
  if (reference === null) return blend(ramp.even, ramp.now, Math.max(0, Math.min(1, 1 + (value - highest) / DEPTH)));
  if (!known(reference[k])) return null;
  const ratio = Math.max(-1, Math.min(1, (value - reference[k]) / REACH));
  return ratio < 0 ? blend(ramp.even, ramp.low, -ratio) : blend(ramp.even, ramp.high, ratio);
}

function paint(u) {
  const { ctx, bbox } = u;
  ramp = Object.fromEntries(["low", "even", "high", "now"].map((name) => [name, parse(colour(name))]));
  const x = (time) => u.valToPos(time, "x", true);
  const edge = (k) => (k < 0 ? 0 : (Math.log2(cells.ranks[k]) + Math.log2(cells.ranks[k + 1] ?? 2 * cells.ranks[k])) / 2);
  const rows = cells.ranks.map((_, k) => [u.valToPos(edge(k - 1), "y", true), u.valToPos(edge(k), "y", true)]);
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  cells.time.forEach((time, i) => {
    const end = cells.ends[i];
    if (end < visible()[0]) return;
    const [left, right] = [Math.floor(x(time)), Math.ceil(x(end))];
    cells.values[i].forEach((value, k) => {
      if (!known(value)) return;
      const fill = shade(value, k);
      if (fill === null) return;
      ctx.fillStyle = fill;
      const [from, to] = [Math.ceil(rows[k][0]), Math.floor(rows[k][1])];
      ctx.fillRect(left, to, Math.max(1, right - left), from - to);
    });
  });
  ctx.strokeStyle = colour("accent");
  ctx.lineWidth = 1.5 * devicePixelRatio;
  for (const time of breaks.filter((it) => it >= visible()[0])) {
    ctx.beginPath();
    ctx.moveTo(x(time), bbox.top);
    ctx.lineTo(x(time), bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

function tip(index, u) {
  const time = u.posToVal(u.cursor.left, "x");
  const i = cells.time.findLastIndex((it) => it <= time);
  if (i < 0 || cells.ends[i] < time) return "";
  const log = Math.max(0, u.posToVal(u.cursor.top, "y"));
  const k = cells.ranks.findIndex((rank) => Math.log2(rank) >= log - 0.26);
  if (k < 0 || !known(cells.values[i][k])) return "";
  const value = cells.values[i][k];
  const against = reference !== null && known(reference[k]) ? `\n${number(10 ** (value - reference[k]), 2)} times the reference's` : "";
  return `${clock(cells.time[i])}, rank ${cells.ranks[k]}\neigenvalue ${number(10 ** value, 2)}${against}`;
}

let legend = "";

function drawLegend() {
  const now = reference === null ? "plain" : "against";
  if (now === legend) return;
  legend = now;
  const [left, right] = reference === null ? ["smaller eigenvalue", "larger"] : [`1/${10 ** REACH} of the reference`, `${10 ** REACH} times`];
  $("scale").replaceChildren(left, h("i", { className: `ramp ${now}` }), right);
}

export function drawWaterfall(store, spectrum, swaps) {
  const { time, spectrum: values } = store.points;
  const eigenvalues = spectrum?.reference?.eigenvalues;
  reference = eigenvalues ? store.ranks.map((rank) => (eigenvalues[rank - 1] > 0 ? Math.log10(eigenvalues[rank - 1]) : null)) : null;
  const usual = (i) => Math.max(2, Math.min(130, (time[i + 1] ?? Infinity) - time[i], time[i] - (time[i - 1] ?? time[i] - 15)));
  const ends = time.map((at, i) => Math.min(time[i + 1] ?? at + 15, at + 3.5 * usual(i)));
  cells = { time, values, ranks: store.ranks, ends };
  breaks = swaps;
  highest = Math.max(...values.flatMap((row) => row.filter(known)), -12);
  drawLegend();
  const any = values.some((row, i) => known(row[0]) && ends[i] >= visible()[0]);
  const label = "Eigenvalues by rank over time, in colours against the reference";
  chart.draw([time, time.map(() => null)], label, any ? "" : "appears with the first points that have enough rows");
}
