// Embed one image: drop, paste or choose it; see timing, the nearest canary images, and the same call with curl.

import { $, h } from "./dom.js";
import { number } from "./format.js";

const KEY = "fullrank-key";
const stored = () => sessionStorage.getItem(KEY) ?? "";
let model = null;
let limit = Infinity;
let latest = null; // the file, for when a key is given
let run = 0;
let address = "";

/** Single quotes for a shell. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The model that embeds: one in service. Null where the chosen one only observes. */
export function setModel(name) {
  model = name;
  $("by").textContent = name ?? "the default encoder";
}

function headers(media) {
  const key = stored();
  return { "Content-Type": media, Accept: "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, media, body) {
  let response;
  try {
    response = await fetch(path, { method: "POST", headers: headers(media), body });
  } catch {
    // A service that refuses a large body may close the connection before all of it is sent.
    throw Object.assign(new Error("the service cannot be reached, or refused the body while it was being sent"), { status: 0 });
  }
  const text = await response.text();
  let value = null;
  try {
    value = JSON.parse(text);
  } catch {
    // a proxy's own page: its status says enough
  }
  if (!response.ok || value === null) {
    throw Object.assign(new Error(value?.error?.message ?? `the service answered ${response.status}`), { status: response.status });
  }
  return { value, timing: response.headers.get("server-timing") ?? "" };
}

function curl(file, media) {
  const query = model === null ? "" : `?model=${encodeURIComponent(model)}`;
  const key = stored() ? ` \\\n  -H "Authorization: Bearer $FULLRANK_API_KEY"` : "";
  return `curl -s --data-binary ${quoted(`@${file.name}`)} \\\n  -H ${quoted(`Content-Type: ${media}`)}${key} \\\n  ${quoted(`${location.origin}${location.pathname}embed${query}`)}`;
}

/** decode;dur=1.2, forward;dur=3 -> "decode 1.2 ms, forward 3 ms" */
const phases = (timing) =>
  [...timing.matchAll(/([\w-]+);dur=([\d.]+)/g)].map(([, name, ms]) => `${name} ${number(Number(ms), 2)} ms`).join(", ");

function fault(error) {
  $("keys").hidden = ![401, 403].includes(error.status);
  return h("p", { className: "fault", role: "alert" }, error.message);
}

async function embed(file) {
  const mine = ++run;
  latest = file;
  $("keys").hidden = true;
  const media = file.type || "application/octet-stream";
  const result = $("result");
  if (file.size > limit) {
    const words = `${file.name} has ${number(file.size / 2 ** 20)} MiB; this service takes ${number(limit / 2 ** 20)} MiB in one request`;
    return result.replaceChildren(fault(new Error(words)));
  }
  result.replaceChildren(h("p", { className: "soft" }, `embedding ${file.name} …`));
  if (address) URL.revokeObjectURL(address);
  address = URL.createObjectURL(file);
  const picture = h("img", { src: address, alt: "", onerror: (event) => event.target.remove() });
  const sent = h("figure", { className: "sent" }, picture, file.name.length > 24 ? `${file.name.slice(0, 21)}…` : file.name);
  const command = h("pre", {}, curl(file, media));
  const copy = h("button", { type: "button", onclick: () => navigator.clipboard?.writeText(command.textContent) }, "copy");
  const call = h("details", { open: true }, h("summary", {}, "the same with curl "), command, copy);
  try {
    const started = performance.now();
    const query = model === null ? "" : `?${new URLSearchParams({ model })}`;
    const { value, timing } = await ask(`embed${query}`, media, file);
    const took = performance.now() - started;
    if (mine !== run) return;
    const words = `${value.dimension} numbers from ${value.model}@${value.revision} in ${number(took, 2)} ms${phases(timing) ? `: ${phases(timing)}` : ""}`;
    const row = h("div", { className: "row" }, sent);
    result.replaceChildren(h("p", {}, words), row, call);
    row.append(...(await neighbours(value)));
  } catch (error) {
    if (mine !== run) return;
    result.replaceChildren(fault(error), call);
  }
}

/** Figures of the nearest canary images, or one sentence that says why there are none. */
async function neighbours({ embeddings, model: name }) {
  try {
    const body = JSON.stringify({ embedding: embeddings[0], model: name, count: 8 });
    const { value } = await ask("neighbours", "application/json", body);
    if (!value.neighbours.length) return [h("p", { className: "soft" }, `${name} has no canary images to compare with`)];
    return value.neighbours.map((it) =>
      h("figure", {}, h("img", { src: it.image, alt: `canary image ${it.index}` }), `cosine ${number(it.cosine, 3)}`),
    );
  } catch (error) {
    return [h("p", { className: "soft" }, `the nearest canary images are not shown: ${error.message}`)];
  }
}

export function start() {
  const drop = $("drop");
  const take = (files) => files?.length && embed(files[0]);
  $("file").addEventListener("change", (event) => {
    take(event.target.files);
    event.target.value = ""; // so that the same file can be chosen again
  });
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault(); // a file dropped beside the zone must not replace the page
      drop.classList.add("over");
    });
  }
  document.addEventListener("dragleave", (event) => !event.relatedTarget && drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(event.dataTransfer?.files);
  });
  document.addEventListener("paste", (event) => take(event.clipboardData?.files));
  $("keys").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, $("key").value.trim());
    $("key").value = "";
    if (latest) embed(latest);
  });
  fetch("info").then((it) => (it.ok ? it.json() : null)).then((info) => (limit = info?.limits?.max_body_bytes ?? Infinity), () => {});
}
