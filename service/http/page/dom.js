// Elements from text: what comes from outside is always text, never markup.

export const $ = (id) => document.getElementById(id);

/** An element with properties (or aria-, data- and other attributes), and children that are nodes or text. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name in element) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

/** Radio buttons in a fieldset, one for each [value, label]. Rebuilt only when the choices change. */
export function choose(fieldset, choices, chosen, changed) {
  const wanted = JSON.stringify(choices);
  fieldset.hidden = choices.length === 0;
  if (fieldset.dataset.choices !== wanted) {
    fieldset.dataset.choices = wanted;
    fieldset.querySelectorAll("label").forEach((it) => it.remove());
    for (const [value, label] of choices) {
      const input = h("input", { type: "radio", name: fieldset.id, value, onchange: () => changed(value) });
      fieldset.append(h("label", {}, input, h("span", {}, label)));
    }
  }
  for (const input of fieldset.querySelectorAll("input")) input.checked = input.value === chosen;
}

/** The colour that a custom property of the style sheet has now, in light or dark. */
export function colour(name) {
  const probe = $("colour-probe") ?? document.body.appendChild(h("i", { id: "colour-probe", hidden: true }));
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}
