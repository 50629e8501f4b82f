// Two waterfalls: ranks upwards, time to the right, colour for the eigenvalue, or for a band's energy, against the reference's.

import { Chart } from "./chart.js";
import { $, colour, h } from "./dom.js";
import { clock, known, number } from "./format.js";

const DEPTH = 6; // decades below the largest eigenvalue, where there is no reference

const parse = (text) => (text.match(/[\d.]+/g) ?? []).slice(0, 3).map((it) => (text.startsWith("color(") ? 255 * it : Number(it)));
const blend = (a, b, share) => `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * share)).join(" ")})`;
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

class Waterfall {
  /**
   * name: id of its place, whose legend is NAME-scale; reach: decades to either side of the reference that colours
   * show; axis: what the ranks count; words(value, against) -> the tip's second line. When, scale and span as in setUp.
   */
  constructor({ name, reach, axis, words }, { when, scale, span }) {
    Object.assign(this, { name, reach, words, span });
    this.cells = { time: [], values: [], ranks: [], ends: [] };
    this.base = null; // per rank, log10 of what a value is compared with; null where there is nothing
    this.breaks = [];
    this.highest = 0;
    this.chart = new Chart($(name), {
      height: 230,
      series: [{ points: { show: false } }],
      hooks: { drawAxes: [(u) => this.paint(u)] },
      scales: { ...scale, y: { range: () => [0, Math.log2(this.top()) + 0.5] } },
      axes: [
        when,
        {
          size: 46,
          grid: { show: false },
          splits: () => Array.from({ length: Math.floor(Math.log2(this.top()) / 2) + 1 }, (_, i) => 2 * i),
          values: (u, values) => values.map((v) => String(2 ** v)),
          label: axis,
        },
      ],
      sync: "time",
      tip: (index, u) => this.tip(u),
    });
  }

  /** The highest rank that has a value. */
  top() {
    const { ranks, values } = this.cells;
    return Math.max(2, ...ranks.filter((_, k) => values.some((row) => known(row[k]))));
  }

  /** The colour of one value (log10) at the k-th rank. */
  shade(ramp, value, k) {
    if (this.base === null) return blend(ramp.even, ramp.now, clamp(1 + (value - this.highest) / DEPTH, 0, 1));
    if (!known(this.base[k])) return null;
    const ratio = clamp((value - this.base[k]) / this.reach, -1, 1);
    return ratio < 0 ? blend(ramp.even, ramp.low, -ratio) : blend(ramp.even, ramp.high, ratio);
  }

  paint(u) {
    const { ctx, bbox } = u;
    const { time, values, ranks, ends } = this.cells;
    const ramp = Object.fromEntries(["low", "even", "high", "now"].map((name) => [name, parse(colour(name))]));
    const x = (at) => u.valToPos(at, "x", true);
    const edge = (k) => (k < 0 ? 0 : (Math.log2(ranks[k]) + Math.log2(ranks[k + 1] ?? 2 * ranks[k])) / 2);
    const rows = ranks.map((_, k) => [u.valToPos(edge(k - 1), "y", true), u.valToPos(edge(k), "y", true)]);
    const first = this.span()[0];
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    time.forEach((at, i) => {
      if (ends[i] < first) return;
      const [left, right] = [Math.floor(x(at)), Math.ceil(x(ends[i]))];
      values[i].forEach((value, k) => {
        const fill = known(value) ? this.shade(ramp, value, k) : null;
        if (fill === null) return;
        ctx.fillStyle = fill;
        const [from, to] = [Math.ceil(rows[k][0]), Math.floor(rows[k][1])];
        ctx.fillRect(left, to, Math.max(1, right - left), from - to);
      });
    });
    ctx.strokeStyle = colour("accent");
    ctx.lineWidth = 1.5 * devicePixelRatio;
    for (const at of this.breaks.filter((it) => it >= first)) {
      ctx.beginPath();
      ctx.moveTo(x(at), bbox.top);
      ctx.lineTo(x(at), bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  tip(u) {
    const { time, values, ranks, ends } = this.cells;
    const at = u.posToVal(u.cursor.left, "x");
    const i = time.findLastIndex((it) => it <= at);
    if (i < 0 || ends[i] < at) return "";
    const log = Math.max(0, u.posToVal(u.cursor.top, "y"));
    const k = ranks.findIndex((rank) => Math.log2(rank) >= log - 0.26);
    if (k < 0 || !known(values[i][k])) return "";
    const against = this.base !== null && known(this.base[k]) ? number(10 ** (values[i][k] - this.base[k]), 2) : null;
    return `${clock(time[i])}, rank ${ranks[k]}\n${this.words(values[i][k], against)}`;
  }

  legend() {
    const kind = this.base === null ? "plain" : "against";
    if (kind === this.drawn) return;
    this.drawn = kind;
    const least = 10 ** this.reach;
    const [left, right] = this.base === null ? ["smaller eigenvalue", "larger"] : [`1/${least} of the reference`, `${least} times`];
    $(`${this.name}-scale`).replaceChildren(left, h("i", { className: `ramp ${kind}` }), right);
  }

  draw({ time, values, ranks, base, breaks, label, why }) {
    const usual = (i) => clamp(Math.min((time[i + 1] ?? Infinity) - time[i], time[i] - (time[i - 1] ?? time[i] - 15)), 2, 130);
    const ends = time.map((at, i) => Math.min(time[i + 1] ?? at + 15, at + 3.5 * usual(i)));
    Object.assign(this, { cells: { time, values, ranks, ends }, base, breaks });
    this.highest = Math.max(...values.flatMap((row) => row.filter(known)), -12);
    this.legend();
    const any = values.some((row, i) => row.some(known) && ends[i] >= this.span()[0]);
    this.chart.draw([time, time.map(() => null)], label, any ? "" : why);
  }
}

let spectra;
let energies;

/** when: the axis of time; scale: its scale; span() -> the first and last second shown. */
export function setUp(shared) {
  const eigenvalue = (value, against) => `eigenvalue ${number(10 ** value, 2)}${against === null ? "" : `\n${against} times the reference's`}`;
  const energy = (value, against) => `its band holds ${against} times the reference's energy`;
  spectra = new Waterfall({ name: "waterfall", reach: 2, axis: "rank", words: eigenvalue }, shared);
  energies = new Waterfall({ name: "energies", reach: 1, axis: "direction", words: energy }, shared);
}

export function drawWaterfalls(store, spectrum, breaks) {
  const { time, spectrum: values, bands } = store.points;
  const { ranks } = store;
  const eigenvalues = spectrum?.reference?.eigenvalues;
  const base = eigenvalues ? ranks.map((rank) => (eigenvalues[rank - 1] > 0 ? Math.log10(eigenvalues[rank - 1]) : null)) : null;
  spectra.draw({
    ...{ time, values, ranks, base, breaks, label: "Eigenvalues by rank over time, in colours against the reference" },
    why: "appears with the first points that have enough rows",
  });
  energies.draw({
    ...{ time, values: bands, ranks, base: ranks.map(() => 0), breaks },
    label: "Energy in the reference's directions over time, in colours against the reference",
    why: spectrum && !spectrum.reference ? "needs a reference: its directions are what is measured" : "appears with the first points that have enough rows",
  });
}
