// One model's answer to one prompt: asked for, shown as it comes, and measured.

import { answerTo, Trouble } from "./api.js";
import { compared } from "./differences.js";
import { make } from "./elements.js";

const REASONS = { stop: "complete", length: "cut at max tokens" };

/** The elements of an answer. Both pages have it, and a file cannot be parsed as HTML here. */
function empty() {
  const figure = (name, title) => make("span", { class: name, ...(title && { title }) });
  const action = (name, words) => make("button", { type: "button", class: name, hidden: "" }, words);
  return make(
    "article",
    { class: "answer" },
    make("h3"),
    make("div", { class: "text", dir: "auto", "aria-live": "polite" }),
    make("div", { class: "trouble", role: "alert", hidden: "" }),
    make(
      "footer",
      {},
      make(
        "p",
        { class: "figures" },
        figure("waiting"),
        figure("rate", "Tokens a second, from the first token to the last"),
        figure("first-token", "Time from asking to the first token"),
        figure("count"),
        figure("reason"),
      ),
      make("span", { class: "actions" }, action("copy", "Copy"), action("retry", "Retry")),
    ),
  );
}

export class Answer {
  /** `retry` is called when the person asks for the answer anew; `say` tells the status line. */
  constructor(model, label, { retry, say }) {
    this.model = model;
    this.label = label;
    this.element = empty();
    this.element.setAttribute("aria-label", `Answer of ${label}`);
    this.part("h3").textContent = label;
    this.part(".copy").addEventListener("click", async () => say(await this.#copied()));
    this.part(".retry").addEventListener("click", retry);
    this.text = "";
    this.state = "new"; // then busy; at last done, stopped or failed
  }

  part(selector) {
    return this.element.querySelector(selector);
  }

  /** Whether it may stand in the history of later turns. */
  get usable() {
    return this.text !== "" && (this.state === "done" || this.state === "stopped");
  }

  stop() {
    this.abort?.abort();
  }

  /** Asks, and shows what comes until the answer ends, in whatever way. */
  async ask(request) {
    this.abort = new AbortController();
    this.#show("busy");
    const asked = performance.now();
    const seen = { first: 0, last: 0, pieces: 0, tokens: null, reason: "" };
    const clock = setInterval(() => this.#measure(asked, seen), 200);
    try {
      for await (const piece of answerTo({ ...request, model: this.model }, this.abort.signal)) {
        if (piece.text) {
          seen.last = performance.now();
          seen.first ||= seen.last;
          seen.pieces += 1;
          this.#append(piece.text);
        }
        seen.reason = piece.reason ?? seen.reason;
        seen.tokens = piece.usage?.completion_tokens ?? seen.tokens;
      }
      this.#show("done");
    } catch (error) {
      if (this.abort.signal.aborted) this.#show("stopped");
      else {
        this.trouble = error instanceof Trouble ? error : new Trouble(String(error));
        this.#show("failed");
      }
    } finally {
      clearInterval(clock);
      this.#measure(asked, seen);
    }
  }

  /** Marks the words in which this ended answer differs from another; without one, none. */
  compareWith(other) {
    if (other === this.comparedWith) return;
    this.comparedWith = other;
    const parts = (other && compared(this.text, other.text)) ?? [{ text: this.text }];
    const nodes = parts.map(({ text, differs }) => {
      if (!differs) return text;
      const mark = document.createElement("mark");
      mark.textContent = text;
      return mark;
    });
    this.part(".text").replaceChildren(...nodes);
  }

  /** Only the last turn can be asked anew: what follows an earlier one was built on it. */
  allowRetry(allowed) {
    this.part(".retry").hidden = !allowed || this.state === "busy";
  }

  // A text node of a frame's pieces at a time: the answer grows without being laid out anew.
  #append(text) {
    this.text += text;
    this.unshown = (this.unshown ?? "") + text;
    this.frame ??= requestAnimationFrame(() => this.#paint());
  }

  #paint() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    if (this.unshown) this.part(".text").append(this.unshown);
    this.unshown = "";
    this.element.dispatchEvent(new CustomEvent("grown", { bubbles: true }));
  }

  #show(state) {
    this.#paint();
    this.state = state;
    this.element.dataset.state = state;
    // Read out when it is whole, not word by word.
    this.part(".text").setAttribute("aria-busy", String(state === "busy"));
    this.part(".copy").hidden = this.text === "";
    const trouble = this.part(".trouble");
    trouble.hidden = state !== "failed";
    if (state !== "failed") return;
    const lines = [this.trouble.message, this.trouble.detail].filter(Boolean);
    trouble.replaceChildren(...lines.map((line) => make("p", {}, line)));
  }

  #measure(asked, { first, last, pieces, tokens, reason }) {
    const busy = this.state === "busy";
    const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(2)} s`;
    const put = (name, text) => (this.part(name).textContent = text);
    put(".waiting", busy && !first ? `waiting ${((performance.now() - asked) / 1000).toFixed(0)} s` : "");
    put(".first-token", first ? `first token ${seconds(first - asked)}` : "");
    // A piece is a token, as a rule; the server's own count comes with the end.
    const count = tokens ?? pieces;
    const about = tokens === null ? "≈ " : "";
    put(".count", first || tokens ? `${about}${count} ${count === 1 ? "token" : "tokens"}` : "");
    const spent = last - first;
    const rate = count > 1 && spent > 0 ? ((count - 1) * 1000) / spent : 0;
    put(".rate", rate ? `${about}${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s` : "");
    const ends = { stopped: "stopped by you", failed: "broken off", done: REASONS[reason] ?? reason };
    put(".reason", this.state === "failed" && !first ? "" : (ends[this.state] ?? ""));
  }

  async #copied() {
    try {
      await navigator.clipboard.writeText(this.text);
    } catch {
      // The clipboard is for secure origins; elsewhere the old way is left.
      getSelection().selectAllChildren(this.part(".text"));
      if (!document.execCommand("copy")) return "The answer is selected; copy it by hand.";
      getSelection().removeAllRanges();
    }
    const button = this.part(".copy");
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
    return `The answer of ${this.label} is copied.`;
  }
}
