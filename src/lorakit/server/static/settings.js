// The system message and the sampling controls: what is typed, remembered in this browser.

import { recall, remember } from "./memory.js";

const PRESET = { max_tokens: "512" };

export class Settings {
  /** `summary` tells what is set while the form is folded away by `button`. */
  constructor(form, button, summary) {
    this.form = form;
    this.button = button;
    this.summary = summary;
    button.addEventListener("click", () => {
      this.#open(form.hidden);
      if (!form.hidden) form.elements.system.focus();
    });
    this.#fill({ ...PRESET, ...recall("localStorage", "settings") });
    this.form.addEventListener("input", () => this.#changed());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.querySelector("#reset").addEventListener("click", () => {
      this.#fill(PRESET);
      this.form.elements.system.focus();
    });
  }

  get system() {
    return this.form.elements.system.value.trim();
  }

  /** The sampling fields that are set, as a chat completion takes them. */
  get sampling() {
    const set = this.#numbers().filter((field) => field.value !== "");
    return Object.fromEntries(set.map((field) => [field.name, field.valueAsNumber]));
  }

  /** Whether every field can be sent; one that can't is shown, with the browser's words for why. */
  check() {
    if (this.form.checkValidity()) return true;
    this.#open(true);
    return this.form.reportValidity();
  }

  #open(open) {
    this.form.hidden = !open;
    this.button.setAttribute("aria-expanded", String(open));
  }

  #numbers() {
    return [...this.form.querySelectorAll("input")];
  }

  #fill(values) {
    for (const field of [this.form.elements.system, ...this.#numbers()])
      field.value = values[field.name] ?? "";
    this.#changed();
  }

  #changed() {
    const set = this.#numbers().filter((field) => field.value !== "");
    const shown = set.map((field) => `${field.name.replaceAll("_", " ")} ${field.value}`);
    if (this.system) shown.unshift("a system message");
    this.summary.textContent = shown.join(", ");
    if (!this.form.checkValidity()) return;
    const values = { system: this.form.elements.system.value };
    for (const field of this.#numbers()) values[field.name] = field.value;
    remember("localStorage", "settings", values);
  }
}
