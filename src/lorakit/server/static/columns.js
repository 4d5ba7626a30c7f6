// One to four columns, a model each: which they are, and the controls that change them.

import { recall, remember } from "./memory.js";

const MOST = 4;
const template = document.querySelector("#column-template");

export class Columns {
  /** `changed` is called after a column is added, removed (then with it) or given a model. */
  constructor(list, addButton, changed) {
    this.list = list;
    this.addButton = addButton;
    this.changed = changed;
    this.columns = []; // {model, element}
    this.models = [];
    addButton.addEventListener("click", () => {
      this.#add(this.#unused() ?? this.models[0].id).querySelector("select").focus();
      this.#update();
    });
  }

  /** Takes the served models; the columns stay, and start as they were left, or with two models. */
  serve(models) {
    this.models = models;
    if (this.columns.length === 0) {
      const served = new Set(models.map(({ id }) => id));
      const left = recall("localStorage", "columns");
      const wanted = (Array.isArray(left) ? left : []).filter((id) => served.has(id)).slice(0, MOST);
      const adapter = models.find(({ base }) => !base);
      const base = models.find(({ base }) => base);
      const first = [adapter, base].filter(Boolean).map(({ id }) => id);
      for (const id of wanted.length ? wanted : first) this.#add(id);
    }
    this.#update();
  }

  labelOf(model) {
    return this.models.find(({ id }) => id === model)?.label ?? model;
  }

  #unused() {
    const used = new Set(this.columns.map(({ model }) => model));
    return this.models.find(({ id }) => !used.has(id))?.id;
  }

  #add(model) {
    const element = template.content.firstElementChild.cloneNode(true);
    const column = { model, element };
    element.querySelector("select").addEventListener("change", ({ target }) => {
      column.model = target.value;
      this.#update();
    });
    element.querySelector(".remove").addEventListener("click", () => {
      const at = this.columns.indexOf(column);
      this.columns.splice(at, 1);
      element.remove();
      this.#update(column);
      this.columns[Math.min(at, this.columns.length - 1)].element.querySelector("select").focus();
    });
    this.columns.push(column);
    this.list.append(element);
    return element;
  }

  #update(removed = null) {
    this.columns.forEach(({ model, element }, i) => {
      const select = element.querySelector("select");
      select.setAttribute("aria-label", `Model of column ${i + 1}`);
      select.replaceChildren(...this.#options(model));
      select.value = model;
      select.title = model;
      const remove = element.querySelector(".remove");
      remove.setAttribute("aria-label", `Remove column ${i + 1}, ${this.labelOf(model)}`);
      remove.hidden = this.columns.length === 1;
    });
    this.addButton.hidden = this.models.length === 0 || this.columns.length >= MOST;
    remember("localStorage", "columns", this.columns.map(({ model }) => model));
    this.changed(removed);
  }

  #options(chosen) {
    const options = this.models.map(({ id, label }) => new Option(label, id));
    if (!this.models.some(({ id }) => id === chosen))
      options.push(new Option(`${chosen} (not served now)`, chosen));
    return options;
  }
}
