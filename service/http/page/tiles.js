// The figures as tiles, each in the colour of its own state, with links to what explains it.

import { $, h } from "./dom.js";
import { duration, known, number, percent, seconds, verdict } from "./format.js";

const below = (value, limit, tone) => (!known(value) || !known(limit) ? "" : value < limit ? tone : "good");
const above = (value, limit, tone) => (!known(value) || !known(limit) ? "" : value > limit ? tone : "good");

/** The tiles that an alarm is about. */
const SPREAD = ["Effective rank", "Participation ratio", "Total variance"];
const ABOUT = {
  complete_collapse: SPREAD,
  dimensional_collapse: SPREAD,
  traffic_narrowed: ["Effective rank", "Participation ratio"],
  traffic_shifted: ["Shift of the mean", "Inputs"],
  model_fault: ["Canary angle", "Canary neighbours"],
};

/**
 * While an alarm holds, no tile that it is about is green. One beyond its threshold takes the alarm's colour, also where
 * only the estimate is beyond it and the bounds are wide; another has no colour, and says that it is within it.
 */
function inAlarm(it, state) {
  if (!ABOUT[state]?.includes(it.name)) return it;
  const beyond = it.tone === "bad" || it.tone === "watch" || it.doubtful;
  if (beyond) return { ...it, tone: it.tone === "bad" ? "bad" : verdict(state).tone };
  return { ...it, tone: "", note: it.tone ? `${it.note}; within its own threshold` : it.note };
}

/** Name, value, words beneath, tone, and what to read: a runbook, a metric, an operation of the API. */
function tile(it) {
  const quiet = it.value === "not measured";
  const links = [
    it.runbook && ["what to do", `runbooks/${it.runbook}`],
    it.metric && ["metric", `metrics#:~:text=${it.metric}`],
    it.api && ["API", `docs#/${it.api}`],
  ].filter(Boolean);
  return h(
    "article",
    { className: `card tile ${it.tone || ""}`, "data-tile": it.name },
    h("h3", {}, it.name),
    h("div", { className: quiet ? "value quiet" : "value" }, it.value),
    h("p", {}, it.note),
    h("div", { className: "links" }, ...links.map(([text, href]) => h("a", { href, target: "_blank", rel: "noopener", "aria-label": `${it.name}: ${text}` }, text))),
  );
}

const against = (x, reference) => {
  if (!known(reference)) return "no reference to compare with";
  return `${known(x) ? `${percent(x / reference)} of ` : ""}the reference's ${number(reference)}`;
};

/** A threshold is said only beside a figure: for a window without rows it would be that of two rows. */
function shiftNote(reference, shift, limit) {
  if (!reference) return "no reference to compare with";
  const rest = !known(shift) ? "too few rows" : known(limit) ? `shifted above ${number(limit, 2)}` : "not calibrated";
  return `of the reference's variance; ${rest}`;
}

function embeddings(s, w) {
  const reference = s.reference ?? {};
  const limit = s.thresholds;
  const ratio = w.participation_ratio;
  const collapsed = below(ratio.upper, limit.participation_ratio_collapse, "bad") === "bad";
  return [
    {
      name: "Effective rank",
      value: known(w.effective_rank) ? number(w.effective_rank) : "not measured",
      note: known(w.effective_rank) ? against(w.effective_rank, reference.effective_rank) : "too few rows for an unbiased figure",
      tone: below(w.effective_rank, limit.effective_rank, "watch"),
      runbook: "EmbeddingDirectionsDied",
      metric: "fullrank_effective_rank",
      api: "statistics/spectrum",
    },
    {
      name: "Participation ratio",
      value: known(ratio.estimate) ? number(ratio.estimate) : "not measured",
      note: `${known(ratio.lower) ? `95 %: ${number(ratio.lower)} to ${number(ratio.upper)}; ` : ""}${against(ratio.estimate, reference.participation_ratio)}`,
      tone: collapsed ? "bad" : below(ratio.upper, limit.participation_ratio, "watch"),
      doubtful: known(ratio.estimate) && ratio.estimate < limit.participation_ratio, // whatever the bounds say
      runbook: "EmbeddingTrafficNarrowed",
      metric: "fullrank_participation_ratio",
      api: "statistics/spectrum",
    },
    {
      name: "Total variance",
      value: known(w.total_variance) ? number(w.total_variance) : "not measured",
      note: against(w.total_variance, reference.total_variance),
      tone: below(w.total_variance, limit.total_variance, "bad"),
      runbook: "EmbeddingCompleteCollapse",
      metric: "fullrank_total_variance",
      api: "statistics/spectrum",
    },
    {
      name: "Shift of the mean",
      value: known(w.mean_shift_ratio) ? (Math.abs(w.mean_shift_ratio) < 0.005 ? "0.00" : number(w.mean_shift_ratio, 2)) : "not measured",
      note: shiftNote(s.reference, w.mean_shift_ratio, limit.mean_shift_ratio),
      tone: above(w.mean_shift_ratio, limit.mean_shift_ratio, "watch"),
      runbook: "EmbeddingTrafficShifted",
      metric: "fullrank_mean_shift_ratio",
      api: "statistics/spectrum",
    },
  ];
}

function model(s) {
  const canary = s.canary ?? {};
  const { canary_angle: widest } = s.thresholds;
  const { angle_degrees: angle, neighbours_overlap: kept } = canary;
  const none = s.canary ? "an embedding of a canary image is not finite" : "there are no canary images";
  return [
    {
      name: "Canary angle",
      value: known(angle) ? `${angle < 0.001 ? "< 0.001" : number(angle, 2)}°` : "not measured",
      note: known(angle) ? `the widest from a canary image's stored embedding; a fault above ${number(widest, 2)}°` : none,
      tone: s.canary && !known(angle) ? "bad" : above(angle, widest, "bad"),
      runbook: "EmbeddingModelFault",
      metric: "fullrank_canary_angle_degrees",
      api: "statistics/spectrum",
    },
    {
      name: "Canary neighbours",
      value: known(kept) ? percent(kept) : "not measured",
      note: known(kept) ? "of a canary image's 10 nearest are among its 10 nearest still" : s.canary ? "too few canary images" : none,
      tone: known(kept) ? (kept < 0.5 ? "watch" : "good") : "",
      runbook: "EmbeddingModelFault",
      metric: "fullrank_canary_neighbours_overlap",
      api: "statistics/spectrum",
    },
  ];
}

function traffic(s, w, store) {
  const rows = s.counters.rows;
  const lost = rows.dropped + rows.nonfinite + rows.zero;
  const fates = lost ? `${number(rows.dropped)} dropped, ${number(rows.nonfinite)} not finite, ${number(rows.zero)} zero` : "none dropped";
  const unsampled = s.counters.unsampled;
  const share = store.column("duplicate_share").slice(-20).findLast(known); // not every point has new rows
  const distance = { of: "distance of the images from the reference's", value: s.inputs?.distance, limit: s.thresholds.input_distance, metric: "fullrank_input_distance" };
  const texture = { of: "shift of their textures", value: s.inputs?.texture_shift, limit: s.thresholds.texture_shift, metric: "fullrank_texture_shift" };
  const measured = [distance, texture].filter((it) => known(it.value));
  const shown = measured.find((it) => above(it.value, it.limit, "watch") === "watch") ?? distance; // what is beyond its threshold
  const said = (it) => `${it.of}${it === shown ? "" : ` ${number(it.value, 2)}`}${known(it.limit) ? `, unusual above ${number(it.limit, 2)}` : ""}`;
  return [
    {
      name: "Rows",
      value: number(w.rows),
      note: `in the last ${duration(w.seconds)}; ${fates}${unsampled ? ` and ${number(unsampled)} left out at random, beyond the monitor's rate,` : ""} since the start`,
      tone: lost ? "bad" : w.rows ? "good" : "",
      runbook: lost ? "EmbeddingMonitorDropping" : "EmbeddingInsufficientData",
      metric: "fullrank_rows",
      api: "statistics/spectrum",
    },
    {
      name: "Duplicates",
      value: known(share) ? percent(share) : "not measured",
      note: `${number(rows.duplicate)} rows skipped since the start, as copies of what was just seen`,
      metric: "fullrank_rows",
      api: "statistics/spectrum",
    },
    {
      name: "Inputs",
      value: known(shown.value) ? number(shown.value, 2) : "not measured",
      note: measured.length ? [shown, ...measured.filter((it) => it !== shown)].map(said).join("; ") : w.rows ? "rows came without their images, or the reference has none" : "no rows yet",
      tone: above(shown.value, shown.limit, "watch"),
      runbook: "EmbeddingTrafficShifted",
      metric: shown.metric,
      api: "statistics/spectrum",
    },
    {
      name: "Variety of the inputs",
      value: known(s.input_participation_ratio) ? number(s.input_participation_ratio) : "not measured",
      note: "participation ratio of the images' descriptors",
      metric: "fullrank_input_participation_ratio",
      api: "statistics/spectrum",
    },
  ];
}

function replica(store) {
  const now = store.latestTraffic();
  const full = now.pending / store.limit;
  return [
    {
      name: "Throughput",
      value: known(now.images_per_second) ? `${number(now.images_per_second, 2)} /s` : "not measured",
      note: `images, all encoders together; ${now.refused_per_second > 0 ? `${number(now.refused_per_second, 2)} /s refused` : "none refused"}`,
      tone: now.refused_per_second > 0 ? "watch" : known(now.images_per_second) ? "good" : "",
      runbook: "EmbeddingServiceSaturated",
      metric: "fullrank_images",
      api: "embeddings/embed",
    },
    {
      name: "Latency",
      value: known(now.p95) ? seconds(now.p95) : "not measured",
      note: known(now.p95) ? `95 % of requests are faster; median ${seconds(now.p50)}: decode ${seconds(now.decode)}, queue ${seconds(now.queue)}, forward ${seconds(now.forward)}` : "no request was answered lately",
      tone: above(now.p95, 1, "watch"),
      runbook: "EmbeddingServiceSlow",
      metric: "fullrank_request_seconds",
      api: "embeddings/embed",
    },
    {
      name: "Queue",
      value: known(now.pending) ? number(now.pending) : "not measured",
      note: `images admitted and not yet answered; at most ${number(store.limit)}`,
      tone: !known(full) ? "" : full > 0.9 ? "bad" : full > 0.5 ? "watch" : "good",
      runbook: "EmbeddingServiceSaturated",
      metric: "fullrank_pending_images",
      api: "embeddings/embed",
    },
  ];
}

let drawn = "";

/** Draw all tiles; spectrum is null where the model is not watched. */
export function drawTiles(spectrum, window, store) {
  const w = spectrum?.windows[window];
  const watched = w ? [...embeddings(spectrum, w), ...model(spectrum), ...traffic(spectrum, w, store)] : [];
  const tiles = [...watched.map((it) => inAlarm(it, spectrum.verdict.state)), ...replica(store)];
  const now = JSON.stringify(tiles);
  if (now === drawn) return; // so that a link keeps its focus
  drawn = now;
  const focused = document.activeElement?.getAttribute("aria-label");
  $("tiles").replaceChildren(...tiles.map(tile));
  if (focused) [...$("tiles").querySelectorAll("a")].find((it) => it.getAttribute("aria-label") === focused)?.focus();
}
