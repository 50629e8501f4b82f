// The replicas of a fleet, where this one belongs to one.

import { $, h } from "./dom.js";
import { number, verdict } from "./format.js";

const PERIOD = 10000; // milliseconds between two looks
let asked = -PERIOD;

/** Show the replicas of a fleet and what is wrong with it; asks for them now and then. */
export async function followFleet(isOne) {
  $("fleet").hidden = !isOne;
  if (!isOne || performance.now() < asked + PERIOD) return;
  asked = performance.now();
  try {
    const response = await fetch("spectrum?fleet=1", { cache: "no-store", signal: AbortSignal.timeout(PERIOD) });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error.message);
    drawFleet(answer);
  } catch (error) {
    $("problems").replaceChildren(h("li", { className: "bad" }, `the fleet's figures cannot be had: ${error.message}`));
  }
}

function drawFleet({ fleets, replicas, problems }) {
  $("problems").replaceChildren(...problems.map((it) => h("li", {}, String(it))));
  const row = (name, it, seen) => {
    const { word, tone } = verdict(it.verdict.state);
    const found = [h("b", { className: tone }, word)];
    if (tone !== "good") found.push(h("small", { className: "soft" }, it.verdict.reason));
    const encoder = [it.model, h("wbr"), `@${it.revision}`];
    return h("tr", {}, h("th", { scope: "row" }, name), ...[found, encoder, [seen]].map((cell) => h("td", {}, ...cell)));
  };
  const head = h("tr", {}, ...["replica", "verdict", "encoder", "heard"].map((it) => h("th", { scope: "col" }, it)));
  const together = fleets.map((it) => row(`all ${it.replicas}`, it, ""));
  const each = replicas.map((it) => row(it.instance, it, `${number(it.seconds_ago, 2)} s ago`));
  $("fleet").querySelector("table").replaceChildren(head, ...together, ...each);
}
