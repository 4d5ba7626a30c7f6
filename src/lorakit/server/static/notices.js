// What a page says when a request to the server has failed, and the form for the API key that the
// server asks for. Both pages have their parts: #trouble with #again, and #key-form with #key.

import { setKey } from "./api.js";

const $ = (selector) => document.querySelector(selector);

export class Notices {
  /** `load` asks the server anew; `keyGiven` is called when that went well with a key just given. */
  constructor(load, { say = () => {}, keyGiven = () => {} } = {}) {
    this.say = say;
    $("#again").addEventListener("click", () => load());
    $("#key-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      setKey($("#key").value.trim());
      $("#key").value = "";
      $("#key-form").hidden = true;
      if (await load(true)) keyGiven();
    });
  }

  /** Whether the form for the key is open. */
  get asksForKey() {
    return !$("#key-form").hidden;
  }

  /** Does what asks the server; whether that went well. Else the page says why. */
  async during(work) {
    try {
      await work();
    } catch (trouble) {
      if (trouble.status === 401) this.askForKey(trouble.message);
      else {
        $("#trouble-text").textContent = [trouble.message, trouble.detail].filter(Boolean).join(" ");
        $("#trouble").hidden = false;
      }
      return false;
    }
    $("#trouble").hidden = true;
    return true;
  }

  askForKey(why) {
    $("#trouble").hidden = true;
    if (why) $("#key-why").textContent = why;
    $("#key-form").hidden = false;
    $("#key").focus();
    if (why) this.say(why);
  }
}
