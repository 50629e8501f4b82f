// A uPlot chart in the page's colours, as wide as its place, with a tip under the pointer.

import uPlot from "./vendor/uPlot-1.6.32.js";
import { colour, h } from "./dom.js";

const FONT = '12px system-ui, -apple-system, "Segoe UI", sans-serif';
const all = new Set();

/** A line: a colour by name, dashes, width. */
export const line = (name, options = {}) => ({ stroke: () => colour(name), width: 2, points: { show: false }, ...options });

export class Chart {
  /**
   * place: the element it fills; height in pixels; series: uPlot's, without x; axes: of x and y; scales and hooks as
   * uPlot's; tip(chart, index) -> text; label: what it shows, for those who cannot see it.
   */
  constructor(place, options) {
    this.place = place;
    this.options = options;
    this.note = h("p", { hidden: true });
    this.tip = h("div", { className: "tip", hidden: true });
    place.setAttribute("role", "img");
    place.append(this.note, this.tip);
    new ResizeObserver(() => this.resize()).observe(place);
    all.add(this);
  }

  /** Draw data, [x, y, ...]; or say why there is none. `label` describes the chart in words. */
  draw(data, label, why = "") {
    this.note.hidden = why === "";
    this.note.textContent = why;
    this.place.setAttribute("aria-label", why || label);
    this.data = why === "" ? data : null;
    if (this.data === null) {
      this.plot?.destroy();
      this.plot = null;
      this.tip.hidden = true;
    } else if (this.plot) {
      this.plot.setData(this.data);
    } else {
      this.build();
    }
  }

  build() {
    const width = this.place.clientWidth;
    if (!width || this.data === null || this.data === undefined) return;
    const { height, series, axes, scales, hooks = {}, bands, sync } = this.options;
    const styled = axes.map((axis) => ({
      font: FONT,
      labelFont: FONT,
      labelSize: 18,
      stroke: () => colour("soft"),
      grid: { stroke: () => colour("line"), width: 1 },
      ticks: { show: false },
      ...axis,
    }));
    const mine = { setCursor: [(u) => this.point(u)] };
    this.plot = new uPlot(
      {
        width,
        height,
        series: [{}, ...series],
        axes: styled,
        scales,
        bands,
        hooks: { ...hooks, ...mine },
        legend: { show: false },
        padding: [10, 16, 0, 0],
        cursor: { y: false, drag: { x: false, y: false }, points: { show: false }, sync: sync ? { key: sync, setSeries: false } : undefined },
      },
      this.data,
      this.place,
    );
  }

  resize() {
    const width = this.place.clientWidth;
    if (!this.plot) this.build();
    else if (width && width !== this.plot.width) this.plot.setSize({ width, height: this.options.height });
  }

  /** Show the values under the pointer. */
  point(u) {
    const { idx, left } = u.cursor;
    const text = idx === null || idx === undefined || left < 0 || !this.options.tip ? "" : this.options.tip(idx, u);
    this.tip.hidden = !text;
    if (!text) return;
    this.tip.textContent = text;
    const at = left + u.over.offsetLeft;
    const room = this.place.clientWidth - this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(room, at + 14 + this.tip.offsetWidth > this.place.clientWidth ? at - 14 - this.tip.offsetWidth : at + 14))}px`;
  }
}

// Colours are read when something is drawn: after a change between light and dark everything is drawn again.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const chart of all) chart.plot?.redraw(false, true);
});
