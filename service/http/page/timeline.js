// Charts over time: effective rank with verdicts and swaps, waterfalls of spectrum and bands, throughput, latency, queue.

import { Chart, line } from "./chart.js";
import { $, colour, h } from "./dom.js";
import { clock, known, minute, number, seconds, verdict } from "./format.js";
import { drawWaterfalls, setUp } from "./waterfall.js";

export const SPANS = [["900", "15 min"], ["3600", "1 h"], ["21600", "6 h"], ["86400", "24 h"]];
const LEAST = 60; // seconds that are drawn at least
const GAP = 3.5; // times the usual distance of two points, from which on they are not joined
let span = [0, 1];
let swaps = [];
let strip = { time: [], state: [] };
let states = [];
let crowd = 8;
const STEPS = [60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600];

const when = {
  splits: (u) => {
    const step = STEPS.find((it) => ((span[1] - span[0]) / it) * 64 <= u.bbox.width / devicePixelRatio) ?? 21600;
    const zone = new Date(1000 * span[1]).getTimezoneOffset() * 60;
    // not at the very left, where the labels of the other axis are
    const first = Math.ceil((span[0] + 0.05 * (span[1] - span[0]) - zone) / step) * step + zone;
    return Array.from({ length: Math.max(0, Math.floor((span[1] - first) / step) + 1) }, (_, i) => first + i * step);
  },
  values: (u, values) => values.map(minute),
  grid: { show: false },
  size: 26,
};
const scale = { x: { time: false, range: () => span } };
const upTo = (u, low, high) => [0, known(high) && high > 0 ? 1.12 * high : 1];

/** Swaps as lines, and under the plot a strip in the colour of the verdict. */
function marks(u) {
  const { ctx, bbox } = u;
  const pixel = devicePixelRatio;
  ctx.save();
  const x = (time) => Math.max(bbox.left, Math.min(bbox.left + bbox.width, u.valToPos(time, "x", true)));
  strip.time.forEach((time, i) => {
    const next = strip.time[i + 1] ?? time + 15;
    if (next < span[0]) return;
    const end = Math.min(next, time + GAP * Math.max(15, time - (strip.time[i - 1] ?? time)));
    ctx.fillStyle = colour(tones[verdict(states[strip.state[i]]).tone]);
    ctx.fillRect(x(time), bbox.top + bbox.height - 6 * pixel, Math.max(pixel, x(end) - x(time) + 0.5), 6 * pixel);
  });
  ctx.strokeStyle = ctx.fillStyle = colour("accent");
  ctx.lineWidth = 1.5 * pixel;
  ctx.font = `${12 * pixel}px system-ui, sans-serif`;
  for (const swap of swaps) {
    if (swap.time < span[0] || swap.time > span[1]) continue;
    const at = x(swap.time);
    ctx.beginPath();
    ctx.moveTo(at, bbox.top);
    ctx.lineTo(at, bbox.top + bbox.height);
    ctx.stroke();
    const right = at > bbox.left + bbox.width / 2;
    ctx.textAlign = right ? "right" : "left";
    ctx.fillText(swap.to.split("@")[0], at + (right ? -5 : 5) * pixel, bbox.top + 12 * pixel);
  }
  ctx.restore();
}
const tones = { good: "good", watch: "watch", bad: "bad", none: "past" };

const rank = new Chart($("history"), {
  height: 230,
  series: [line("past", { dash: [6, 4] }), line("now", { width: 2.5 })],
  hooks: { draw: [marks] },
  scales: { ...scale, y: { range: upTo } },
  axes: [when, { size: 46 }],
  sync: "time",
  tip: (i, u) => {
    const at = strip.time.findLastIndex((time) => time <= u.data[0][i]);
    return `${clock(u.data[0][i])}  ${at < 0 ? "" : verdict(states[strip.state[at]]).word}\neffective rank ${number(u.data[2][i])}\nreference ${number(u.data[1][i])}`;
  },
});
const throughput = new Chart($("throughput"), {
  height: 170,
  series: [line("bad"), line("now", { width: 2.5 })],
  scales: { ...scale, y: { range: upTo } },
  axes: [when, { size: 46 }],
  sync: "time",
  tip: (i, u) => `${clock(u.data[0][i])}\n${number(u.data[2][i])} images a second\n${number(u.data[1][i])} refused`,
});
const latency = new Chart($("latency"), {
  height: 190,
  series: [line("bad"), line("watch"), line("now", { width: 2.5 })],
  scales: { ...scale, y: { range: upTo } },
  axes: [when, { size: 62, values: (u, values) => values.map(seconds) }],
  sync: "time",
  tip: (i, u) => `${clock(u.data[0][i])}\nmedian ${seconds(u.data[3][i])}\n95 % ${seconds(u.data[2][i])}\n99 % ${seconds(u.data[1][i])}`,
});
const queue = new Chart($("queue"), {
  height: 190,
  series: [line("watch", { dash: [2, 3] }), line("now", { width: 2.5 })],
  scales: { ...scale, y: { range: () => [0, crowd] } },
  axes: [when, { size: 46 }],
  sync: "time",
  tip: (i, u) => `${clock(u.data[0][i])}\n${number(u.data[2][i])} images pending\nat most ${number(u.data[1][i])}`,
});
setUp({ when, scale, span: () => span });

/** Columns with a null between two points where time passed without any, or the encoder changed. */
function broken(time, columns, breaks) {
  const out = [[], ...columns.map(() => [])];
  time.forEach((at, i) => {
    const before = time[i - 1];
    const usual = Math.max(16, Math.min(before - (time[i - 2] ?? -Infinity), (time[i + 1] ?? Infinity) - at, 130));
    const gone = i && (at - before > GAP * usual || breaks.some((it) => before < it && it <= at));
    if (gone) {
      out[0].push((before + at) / 2);
      columns.forEach((_, k) => out[k + 1].push(null));
    }
    out[0].push(at);
    columns.forEach((column, k) => out[k + 1].push(column[i]));
  });
  return out;
}

export function drawTimeline(store, spectrum, length, now) {
  span = [Math.max(now - Number(length), Math.min(store.traffic.time[0] ?? now, now - LEAST)), now];
  swaps = store.swaps();
  states = store.states;
  strip = store.points;
  const breaks = swaps.map((it) => it.time);
  const ranks = store.column("effective_rank");
  const seen = (time, values) => values.some((v, i) => known(v) && time[i] >= span[0]);
  const columns = broken(strip.time, [store.column("reference_effective_rank"), ranks], breaks);
  const few = strip.time.length ? "no effective rank in this time: too few rows came" : "a line appears after the first points";
  rank.draw(columns, `Effective rank over time, now ${number(ranks.at(-1))}`, seen(strip.time, ranks) ? "" : few);
  drawWaterfalls(store, spectrum, breaks);

  const { time } = store.traffic;
  const take = (...names) => broken(time, names.map((name) => store.trafficColumn(name)), []);
  const rate = store.trafficColumn("images_per_second");
  const none = "a line appears after the first points";
  throughput.draw(take("refused_per_second", "images_per_second"), `Images a second, now ${number(rate.at(-1))}`, seen(time, rate) ? "" : none);
  const p95 = store.trafficColumn("p95");
  latency.draw(take("p99", "p95", "p50"), `Latency: 95 % of requests within ${seconds(p95.at(-1))}`, seen(time, p95) ? "" : "no request was answered in this time");
  const pending = store.trafficColumn("pending");
  const [x, waiting] = take("pending");
  crowd = 1.5 * Math.max(8, ...pending.filter(known)); // the limit is in sight once the queue is near it
  queue.draw([x, x.map(() => store.limit), waiting], `Images pending, now ${number(pending.at(-1))} of ${number(store.limit)}`, seen(time, pending) ? "" : none);
  drawEvents(store.events);
}

let drawn = "";

function drawEvents(events) {
  const latest = events.slice(-6).reverse();
  const now = JSON.stringify(latest);
  if (now === drawn) return;
  drawn = now;
  $("events").replaceChildren(
    ...latest.map((it) => {
      const { word, tone } = verdict(it.to);
      const words = it.kind === "swap" ? [h("b", {}, "swap"), ` ${it.from} → ${it.to}`] : [h("b", { className: tone }, word), `: ${it.reason ?? ""}`];
      return h("li", {}, h("time", { dateTime: new Date(1000 * it.time).toISOString() }, clock(it.time)), ...words);
    }),
  );
}
