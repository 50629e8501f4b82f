// The list of encoders: in service, observed, and known from before.

import { $, h } from "./dom.js";
import { verdict } from "./format.js";

const MANY = 10; // from here on the list has a filter

/** Draws the list; chosen(model) is called for the one that the user takes. */
export class Encoders {
  constructor(chosen) {
    this.chosen = chosen;
    this.models = [];
    this.current = null;
    this.drawn = "";
    $("filter").addEventListener("input", () => this.draw());
    $("list").addEventListener("keydown", (event) => this.move(event));
  }

  update(models, current) {
    this.models = models;
    this.current = current;
    this.draw();
  }

  draw() {
    const words = $("filter").value.trim().toLowerCase();
    const label = (it) => (it.gone ? "not seen lately" : it.watched ? verdict(it.state).word : "not watched");
    const shown = this.models.filter((it) => `${it.model} ${label(it)} ${it.state}`.toLowerCase().includes(words));
    const drawn = JSON.stringify([shown.map((it) => [it.model, it.revision, it.state, it.observed, it.watched, it.gone]), this.current]);
    if (drawn === this.drawn) return; // so that the focus stays where it is
    this.drawn = drawn;
    const focused = document.activeElement?.dataset?.model;
    document.querySelector(".filter").hidden = this.models.length < MANY;
    this.count(shown);
    $("list").replaceChildren(
      ...shown.map((it) => {
        const tone = verdict(it.state).tone;
        const source = it.observed ? "observed" : it.revision;
        return h(
          "li",
          {},
          h(
            "button",
            { type: "button", className: tone, onclick: () => this.chosen(it.model), "data-model": it.model, "aria-current": it.model === this.current ? "true" : null },
            h("b", {}, it.model),
            h("em", {}, label(it)),
            h("small", {}, source),
          ),
        );
      }),
    );
    if (focused !== undefined) [...$("list").querySelectorAll("button")].find((it) => it.dataset.model === focused)?.focus();
  }

  /** How many are well, where there are many. */
  count(shown) {
    const many = this.models.length >= MANY;
    $("count").hidden = !many;
    if (!many) return;
    const ill = this.models.filter((it) => ["watch", "bad"].includes(verdict(it.state).tone)).length;
    const some = shown.length < this.models.length ? `${shown.length} of ` : "";
    $("count").textContent = `${some}${this.models.length} encoders; ${ill || "none"} ${ill === 1 ? "needs" : "need"} a look`;
  }

  /** Arrow keys, Home and End move through the list. */
  move(event) {
    const steps = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 };
    const buttons = [...$("list").querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    const to = event.key === "Home" ? 0 : event.key === "End" ? buttons.length - 1 : at + (steps[event.key] ?? 0);
    if (at < 0 || to === at || !buttons[to]) return;
    event.preventDefault();
    buttons[to].focus();
  }
}
