// What the service says, as it comes: one stream of server-sent events, or polling where a stream is not to be had.

const SILENT = 9000; // milliseconds without a message after which the figures count as old
const PERIOD = 2000; // between two polls
const AGAIN = 30000; // before a stream is tried again

export class Feed {
  /** handlers: update(document), spectrum(document), status(kind, message). Kinds: live, polling, lost, unknown. */
  constructor(handlers) {
    this.handlers = handlers;
    this.timer = 0;
    this.source = null;
    this.run = 0; // of follow(): what belongs to an earlier one is thrown away
    setInterval(() => this.watch(), 1000);
    document.addEventListener("visibilitychange", () => !document.hidden && this.watch());
  }

  /** Follow a model, the default encoder for null. */
  follow(model) {
    this.run += 1;
    this.model = model;
    this.until = 0;
    this.heard = Date.now();
    this.stop();
    this.listen();
  }

  stop() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
  }

  query(extra = {}) {
    const named = this.model === null ? {} : { model: this.model };
    return new URLSearchParams({ ...named, ...extra }).toString();
  }

  listen() {
    if (!("EventSource" in window)) return this.poll();
    const source = (this.source = new EventSource(`events?${this.query({ since: this.until })}`));
    this.tried = Date.now();
    source.addEventListener("update", (event) => this.take("update", event.data, "live"));
    source.addEventListener("spectrum", (event) => this.take("spectrum", event.data, "live"));
    source.onerror = () => {
      if (source !== this.source || source.readyState !== EventSource.CLOSED) return; // the browser tries again
      this.stop();
      this.poll();
    };
  }

  take(kind, text, status) {
    const document = JSON.parse(text);
    if (kind === "update") this.until = document.until;
    this.heard = Date.now();
    this.handlers.status(status, "");
    this.handlers[kind](document);
  }

  async poll() {
    const run = this.run;
    try {
      const text = await this.get(`history?${this.query({ since: this.until })}`);
      if (run !== this.run) return;
      this.take("update", text, "polling");
      const model = JSON.parse(text).model;
      if (model !== null) {
        const spectrum = await this.get(`spectrum?${new URLSearchParams({ model })}`).catch(() => null);
        if (run !== this.run) return;
        if (spectrum !== null) this.take("spectrum", spectrum, "polling");
      }
    } catch (error) {
      if (run !== this.run) return;
      this.handlers.status(error.status === 404 ? "unknown" : "lost", error.status ? error.message : "it cannot be reached");
    }
    if (Date.now() > this.tried + AGAIN && "EventSource" in window) return this.listen();
    this.timer = setTimeout(() => this.poll(), PERIOD);
  }

  async get(path) {
    const response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(10000) });
    const text = await response.text();
    if (response.ok) return text;
    let message = `the service answered ${response.status}`;
    try {
      message = JSON.parse(text).error.message;
    } catch {
      // a proxy's own page: its status says enough
    }
    throw Object.assign(new Error(message), { status: response.status });
  }

  /** Called every second: a stream that is silent is given up, and old figures are said to be old. */
  watch() {
    if (this.heard === undefined || Date.now() < this.heard + SILENT) return;
    if (this.source !== null) {
      this.stop();
      this.poll();
    }
    this.handlers.status("lost", "");
  }
}
