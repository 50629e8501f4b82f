// The points and events of one model and of the replica, kept in order of time.

const KEPT = 24 * 3600;

/** Add rows to a table of columns by time; a row again, or one from before a clock was set back, replaces. */
function merge(table, names, more) {
  if (!more.time.length) return;
  while (table.time.length && table.time.at(-1) >= more.time[0]) for (const name of names) table[name].pop();
  for (const name of names) for (const value of more[name]) table[name].push(value);
  const old = table.time.findIndex((time) => time >= table.time.at(-1) - KEPT);
  if (old > 0) for (const name of names) table[name].splice(0, old);
}

export class Store {
  constructor() {
    this.points = { time: [], state: [], figures: [], spectrum: [], bands: [] };
    this.traffic = { time: [], figures: [] };
    this.events = [];
    this.fields = this.ranks = this.states = [];
    this.trafficFields = [];
    this.limit = NaN;
  }

  take(document) {
    const history = document.history;
    if (history) {
      Object.assign(this, { fields: history.fields, ranks: history.ranks, states: history.states });
      merge(this.points, ["time", "state", "figures", "spectrum", "bands"], history);
      const seen = new Set(this.events.map((it) => JSON.stringify(it)));
      this.events.push(...history.events.filter((it) => !seen.has(JSON.stringify(it))));
      this.events = this.events.filter((it) => it.time > document.time - KEPT).slice(-200);
    }
    this.trafficFields = document.traffic.fields;
    this.limit = document.traffic.limit;
    merge(this.traffic, ["time", "figures"], document.traffic);
  }

  /** The values of one figure, by name. */
  column(name) {
    const index = this.fields.indexOf(name);
    return this.points.figures.map((row) => row[index] ?? null);
  }

  trafficColumn(name) {
    const index = this.trafficFields.indexOf(name);
    return this.traffic.figures.map((row) => row[index] ?? null);
  }

  latestTraffic() {
    const row = this.traffic.figures.at(-1) ?? [];
    return Object.fromEntries(this.trafficFields.map((name, index) => [name, row[index]]));
  }

  swaps() {
    return this.events.filter((it) => it.kind === "swap");
  }
}
