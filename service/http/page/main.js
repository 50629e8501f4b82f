// The live page: what is chosen, and what is drawn when something new is known.

import { drawBands } from "./bands.js";
import { $, choose, h } from "./dom.js";
import * as drop from "./drop.js";
import { Encoders } from "./encoders.js";
import { Feed } from "./feed.js";
import { followFleet } from "./fleet.js";
import { clock, duration, number, verdict } from "./format.js";
import { drawSpectrum } from "./spectrum.js";
import { Store } from "./store.js";
import { drawTiles } from "./tiles.js";
import { SPANS, drawTimeline } from "./timeline.js";

const place = new URLSearchParams(location.hash.slice(1));
const state = {
  model: place.get("model"), // null: the default encoder
  window: place.get("window"),
  span: place.get("history") ?? "3600",
  update: null,
  spectrum: null,
  kind: "connecting",
  message: "",
};
let store = new Store();
let waiting = false;

function remember() {
  const entries = { model: state.model, window: state.window, history: state.span === "3600" ? null : state.span };
  const hash = new URLSearchParams(Object.entries(entries).filter(([, value]) => value !== null)).toString();
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

/** Draw soon, once, however much has changed. */
function draw() {
  if (waiting) return;
  waiting = true;
  setTimeout(() => {
    waiting = false;
    render();
  }, 0);
}

const feed = new Feed({
  update(document) {
    state.update = document;
    store.take(document);
    if (state.spectrum && state.spectrum.model !== document.model) state.spectrum = null;
    draw();
  },
  spectrum(document) {
    if (document.model === state.update?.model) state.spectrum = document;
    draw();
  },
  status(kind, message) {
    // A silence says nothing new about an error that has a reason already.
    if (kind === "lost" && message === "" && state.kind === "lost") return draw();
    Object.assign(state, { kind, message });
    draw();
  },
});

function follow(model) {
  Object.assign(state, { model, spectrum: null });
  store = new Store();
  remember();
  feed.follow(model);
  draw();
}

const encoders = new Encoders((model) => model !== state.update?.model && follow(model));

const LINKS = { live: ["live", "good"], polling: ["polling", "good"], lost: ["no answer", "bad"], unknown: ["no such model", "bad"], connecting: ["connecting", "none"] };

/** What stands at the top: heading, sentence, tone, runbook. */
function headline() {
  const { update, kind, message, spectrum } = state;
  if (kind === "unknown") return ["not watched", message, "bad", null];
  if (update === null) {
    if (kind === "lost") return ["no answer", `${message || "it does not answer"}; trying again`, "bad", "EmbeddingServiceDown"];
    return ["connecting", "asking the service", "none", null];
  }
  const entry = update.encoders.find((it) => it.model === update.model && it.observed === update.observed);
  if (kind === "lost") {
    const was = entry?.state ? `it was ${verdict(entry.state).word}` : "";
    return ["no answer", `${message ? `${message}; ` : ""}what follows is of ${clock(update.time)}${was ? `, when ${was}` : ""}; trying again`, "bad", "EmbeddingServiceDown"];
  }
  if (update.phase === "starting") return ["loading", update.fault ?? "the encoder is being loaded", "none", null];
  if (!entry) return ["nothing to show", "no encoder is in service, and no rows came to POST /observe yet", "none", null];
  if (update.phase === "draining") return ["shutting down", "this replica takes no new work; it answers what it has", "watch", null];
  if (update.fault) return ["cannot embed", update.fault, "bad", "EmbeddingServiceStuck"];
  if (entry.gone) return ["not seen lately", entry.reason, "none", null];
  if (!entry.watched) return ["not watched", "the monitor is off: set FULLRANK_MONITOR=true and start the service again", "none", null];
  const age = spectrum ? update.time - spectrum.timestamp : 0;
  const longest = Math.max(60, 2 * Math.max(...Object.keys(spectrum?.windows ?? { 300: 0 }).map(Number)));
  if (age > longest) return ["old figures", `the monitor has not refreshed since ${clock(spectrum.timestamp)}`, "bad", "EmbeddingMonitorStale"];
  const { word, tone, runbook } = verdict(entry.state);
  return [word, entry.reason, tone, runbook];
}

function drawVerdict() {
  const [word, reason, tone, runbook] = headline();
  $("verdict").className = `card ${tone}`;
  if ($("state").textContent !== word) $("state").textContent = word;
  const said = runbook ? `${reason} ` : reason;
  if ($("reason").dataset.said !== said) {
    $("reason").dataset.said = said;
    const back = state.kind === "unknown" ? h("button", { type: "button", onclick: () => follow(null) }, "show the default encoder") : null;
    $("reason").replaceChildren(said, runbook ? h("a", { href: `runbooks/${runbook}`, target: "_blank", rel: "noopener" }, "What to do") : "", back ?? "");
  }
  const { spectrum, update } = state;
  const known = update && update.model !== null ? update.encoders.find((it) => it.model === update.model) : null;
  const other = spectrum?.compared_with && spectrum.compared_with.revision !== spectrum.revision ? spectrum.compared_with : null;
  $("identity").replaceChildren(
    ...(known ? [h("b", {}, known.model), " ", h("code", {}, known.revision), other ? `, compared with ${other.model} ` : "", other ? h("code", {}, other.revision) : ""] : []).filter((it) => it !== ""),
  );
  document.title = update?.model ? `${word} · ${update.model} · fullrank` : "fullrank";
}

function render() {
  const { update, spectrum } = state;
  const [word, tone] = LINKS[state.kind];
  $("link").textContent = word;
  $("link").className = `badge ${tone}`;
  document.body.classList.toggle("old", state.kind === "lost" || state.kind === "unknown");
  drawVerdict();
  if (state.kind === "unknown") encoders.update(update?.encoders ?? [], null);
  $("figures").hidden = update === null || update.model === null || state.kind === "unknown";
  $("try").hidden = update === null || !update.encoders.some((it) => !it.observed && !it.gone);
  if (update === null) return;
  encoders.update(update.encoders, update.model);
  const embeds = update.encoders.some((it) => it.model === update.model && !it.observed && !it.gone);
  drop.setModel(embeds ? update.model : null);
  if ($("figures").hidden) return;

  const seconds = Object.keys(spectrum?.windows ?? {});
  if (seconds.length && !seconds.includes(state.window)) state.window = seconds[0];
  choose($("windows"), seconds.map((it) => [it, duration(Number(it))]), state.window, (value) => {
    state.window = value;
    remember();
    render();
  });
  choose($("spans"), SPANS, state.span, (value) => {
    state.span = value;
    remember();
    render();
  });
  drawTiles(spectrum, state.window, store);
  drawSpectrum(spectrum, state.window);
  drawBands(spectrum, state.window);
  drawTimeline(store, spectrum, state.span, update.time);
  followFleet(update.fleet);
  $("foot").textContent = spectrum
    ? `${number(spectrum.counters.rows.sampled)} rows measured since the start, ${spectrum.dimension} dimensions; figures of ${clock(spectrum.timestamp)}; the monitor took ${number(spectrum.counters.seconds, 2)} CPU seconds`
    : "";
}

drop.start();
addEventListener("hashchange", () => {
  const model = new URLSearchParams(location.hash.slice(1)).get("model");
  if (model !== state.model) follow(model);
});
follow(state.model);
