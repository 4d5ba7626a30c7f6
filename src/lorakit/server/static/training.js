// The page of the training service: who trains what, how the losses go, and a chat with what was
// saved. It asks the server again every few seconds for as long as it is looked at.

import { Answer } from "./answer.js";
import { hasKey, setSpareKey, trainingState } from "./api.js";
import { draw, shown, sparkline } from "./curves.js";
import { make } from "./elements.js";
import { Notices } from "./notices.js";

const EVERY = 3000; // milliseconds
const USUAL_KEY = "tml-local"; // what the documentation has clients use on one's own machine

const $ = (selector) => document.querySelector(selector);
const prompt = $("#prompt");
let runs = [];
let chosen = null; // id of the run that is shown
let chat = null; // {model, label, turns: [{prompt, answer}]}
let drawn = ""; // what the chosen run's part shows

const notices = new Notices(load);
setSpareKey(USUAL_KEY);

function say(words) {
  $("#status").textContent = words;
}

// What the server says

function load(afresh = false) {
  if (afresh) [chosen, drawn] = [null, ""];
  return notices.during(async () => show(await trainingState()));
}

function show(state) {
  runs = state.runs;
  document.body.toggleAttribute("data-admin", state.admin);
  $("#whose").textContent = state.admin ? "All keys" : `Key ${state.key}`;
  const share = state.passes ? `${Math.round((100 * state.passes_shared) / state.passes)} %` : "–";
  figures({
    "Base model": state.base_model.match(/[^/\\]*[/\\]*$/)[0],
    "Live runs": runs.filter(({ live }) => live).length,
    "Tokens trained": count(state.trained_tokens),
    "Tokens sampled": count(state.sampled_tokens),
    "Tokens in the queue": count(state.queue_tokens),
    "Passes shared": share,
    "Adapters in memory": state.adapters_in_memory,
    "Adapters on disk": state.adapters_on_disk,
  });
  $("#empty").hidden = runs.length > 0;
  $("#empty").textContent = hasKey()
    ? "This key has no runs yet."
    : `The key ${USUAL_KEY} has no runs yet. Runs of another key: press Key.`;
  $("#runs").hidden = runs.length === 0;
  const focused = document.activeElement?.dataset?.run;
  $("#runs tbody").replaceChildren(...runs.map(row));
  if (focused) document.querySelector(`[data-run="${CSS.escape(focused)}"]`)?.focus();
  chosen = runs.some(({ id }) => id === chosen) ? chosen : (runs[0]?.id ?? null);
  showRun();
}

function figures(values) {
  const parts = Object.entries(values).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, String(value))),
  );
  $("#figures").replaceChildren(...parts);
}

function row(run) {
  const element = clone("#run-template");
  const button = element.querySelector(".name");
  button.textContent = nameOf(run);
  button.dataset.run = run.id;
  button.addEventListener("click", () => {
    chosen = run.id;
    for (const other of document.querySelectorAll("#runs tbody tr"))
      other.setAttribute("aria-current", String(other === element));
    showRun();
    say(`${nameOf(run)} is shown below.`);
  });
  element.setAttribute("aria-current", String(run.id === chosen));
  element.querySelector(".key").textContent = run.key;
  element.querySelector(".rank").textContent = run.rank;
  element.querySelector(".step").textContent = run.last?.step ?? 0;
  element.querySelector(".loss").textContent = shown(run.last?.loss);
  element.querySelector(".curve").append(sparkline(run.curve));
  const state = element.querySelector(".state");
  state.classList.toggle("live", run.live);
  state.textContent = run.live ? (run.idle_seconds < 60 ? "training" : `idle ${minutes(run.idle_seconds)}`) : "ended";
  return element;
}

function showRun() {
  const run = runs.find(({ id }) => id === chosen);
  $("#run").hidden = run === undefined;
  if (!run || drawn === JSON.stringify([run.id, run.live, run.last, run.checkpoints])) return;
  drawn = JSON.stringify([run.id, run.live, run.last, run.checkpoints]);
  for (const element of document.querySelectorAll("#runs tbody tr"))
    element.setAttribute("aria-current", String(element.querySelector(".name").dataset.run === run.id));
  $("#run-title").textContent = nameOf(run);
  const metadata = Object.entries(run.metadata)
    .filter(([, value]) => String(value) !== nameOf(run))
    .map(([key, value]) => `${key}: ${value}`);
  $("#run-facts").textContent = [
    run.id,
    `rank ${run.rank}`,
    `trains ${run.parts.join(", ")}`,
    `since ${when(run.created)}`,
    run.last && `learning rate ${run.last.learning_rate}`,
    ...metadata,
  ]
    .filter(Boolean)
    .join(" · ");
  draw($("#chart"), run.curve);
  const saved = run.checkpoints.filter(({ kind }) => kind !== "external");
  const live = run.live ? [{ path: `tinker://${run.id}`, kind: "live", created: null }] : [];
  $("#no-checkpoints").hidden = saved.length + live.length > 0;
  $("#checkpoints").replaceChildren(...[...live, ...saved].map((one) => checkpoint(run, one)));
}

function checkpoint(run, one) {
  const element = clone("#checkpoint-template");
  const name = one.kind === "live" ? "as it is now" : one.path.match(/[^/]*$/)[0];
  element.querySelector(".kind").textContent = one.kind;
  element.querySelector(".path").textContent = one.path;
  element.querySelector(".facts").textContent = [
    one.created && when(one.created),
    one.size && bytes(one.size),
    one.public && "published",
    one.expires && `expires ${when(one.expires)}`,
  ]
    .filter(Boolean)
    .join(" · ");
  const talk = element.querySelector(".talk");
  talk.setAttribute("aria-label", `Chat with ${nameOf(run)}, ${name}`);
  talk.addEventListener("click", () => openChat(one.path, `${nameOf(run)}, ${name}`));
  return element;
}

// The chat

function openChat(model, label) {
  chat?.turns.at(-1)?.answer.stop();
  chat = { model, label, turns: [] };
  $("#turns").replaceChildren();
  $("#chat").hidden = false;
  $("#chat-with").textContent = `With ${label}`;
  update();
  prompt.focus();
}

async function send() {
  const words = prompt.value;
  if (chat === null || busy() || words.trim() === "") return;
  const messages = chat.turns
    .filter(({ answer }) => answer.usable)
    .flatMap((turn) => [
      { role: "user", content: turn.prompt },
      { role: "assistant", content: turn.answer.text },
    ]);
  messages.push({ role: "user", content: words });
  prompt.value = "";
  const element = clone("#turn-template");
  element.querySelector(".prompt").textContent = words;
  const answer = new Answer(chat.model, chat.label, { retry: () => {}, say });
  element.querySelector(".answers").append(answer.element);
  $("#turns").append(element);
  chat.turns.push({ prompt: words, answer });
  const asked = answer.ask({ messages, max_tokens: 512 });
  update();
  await asked;
  update();
}

const busy = () => chat?.turns.at(-1)?.answer.state === "busy";

function update() {
  $("#send").hidden = busy();
  $("#stop").hidden = !busy();
}

// Words

const clone = (selector) => $(selector).content.firstElementChild.cloneNode(true);

/** What its client calls it, or the beginning of its id and its number in the session. */
function nameOf({ id, metadata }) {
  const given = metadata.name ?? metadata.run_name ?? metadata.display_name;
  return given ? String(given) : id.replace(/^([0-9a-f]{8})[0-9a-f-]*:train:/, "$1 · ");
}

const count = (number) => new Intl.NumberFormat("en").format(number);
const minutes = (seconds) => (seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`);
const when = (time) => new Date(time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
const bytes = (number) => (number < 1e6 ? `${Math.ceil(number / 1e3)} kB` : `${(number / 1e6).toFixed(1)} MB`);

// Hands

const on = (selector, event, act) =>
  $(selector).addEventListener(event, (happened) => {
    if (event === "submit") happened.preventDefault();
    act(happened);
  });
on("#change-key", "click", () => notices.askForKey());
on("#composer", "submit", send);
on("#stop", "click", () => chat.turns.at(-1)?.answer.stop());
on("#prompt", "keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  send();
});

await load();
setInterval(() => {
  if (!document.hidden && !notices.asksForKey) load();
}, EVERY);
