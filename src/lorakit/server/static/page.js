// The page as a whole: the turns of a conversation that several models hold side by side. Each
// column has its own history, which is what its earlier answers and their prompts are.

import { Answer } from "./answer.js";
import { listModels } from "./api.js";
import { Columns } from "./columns.js";
import { Notices } from "./notices.js";
import { contentOf, imageOf, Pictures } from "./pictures.js";
import { Settings } from "./settings.js";

const $ = (selector) => document.querySelector(selector);
const prompt = $("#prompt");
const settings = new Settings($("#settings-form"), $("#settings-button"), $("#settings-set"));
const columns = new Columns($("#columns"), $("#add"), columnsChanged);
const pictures = new Pictures(
  { list: $("#pictures"), button: $("#add-picture"), input: $("#picture-file"), composer: $("#composer") },
  { changed: follow, say },
);
const notices = new Notices(loadModels, { say, keyGiven: askAgain });
let turns = []; // {prompt, pictures, element, answers: column → Answer}
let following = true; // whether the end of the page is kept in view

function say(words) {
  $("#status").textContent = words;
}

// Asking

function send() {
  if (busy()) return say("Answers are still coming. Escape stops them.");
  if (prompt.value.trim() === "" && pictures.waiting.length === 0) return prompt.focus();
  if (columns.columns.length === 0) return loadModels();
  if (!settings.check()) return undefined;
  const turn = addTurn(prompt.value, pictures.take());
  prompt.value = "";
  fitPrompt();
  following = true;
  say(`${columns.columns.length === 1 ? "The model answers" : "The models answer"}.`);
  for (const column of columns.columns) ask(turn, column);
  return undefined;
}

function addTurn(text, shown) {
  const element = $("#turn-template").content.firstElementChild.cloneNode(true);
  element.querySelector("h2").textContent = `Prompt ${turns.length + 1}`;
  element.querySelector(".prompt").textContent = text;
  element.querySelector(".prompt").hidden = text === "";
  element.querySelector(".shown").append(...shown.map(imageOf));
  $("#turns").append(element);
  const turn = { prompt: text, pictures: shown, element, answers: new Map() };
  turns.push(turn);
  return turn;
}

async function ask(turn, column) {
  const answer = new Answer(column.model, columns.labelOf(column.model), {
    retry: () => settings.check() && ask(turn, column),
    say,
  });
  const earlier = turn.answers.get(column);
  if (earlier) earlier.element.replaceWith(answer.element);
  else turn.element.querySelector(".answers").append(answer.element);
  turn.answers.set(column, answer);
  const asked = answer.ask({ messages: messagesOf(turn, column), ...settings.sampling });
  update();
  await asked;
  if (answer.trouble?.status === 401) notices.askForKey(answer.trouble.message);
  if (answer.trouble?.status === 404) loadModels();
  if (!busy()) say("No more answers are coming.");
  update();
}

function messagesOf(turn, column) {
  const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const earlier of turns.slice(0, turns.indexOf(turn))) {
    const answer = earlier.answers.get(column);
    if (!answer?.usable) continue;
    messages.push({ role: "user", content: contentOf(earlier.prompt, earlier.pictures) });
    messages.push({ role: "assistant", content: answer.text });
  }
  return [...messages, { role: "user", content: contentOf(turn.prompt, turn.pictures) }];
}

const answers = () => turns.flatMap((turn) => [...turn.answers.values()]);
const busy = () => answers().some(({ state }) => state === "busy");

function stop() {
  if (!busy()) return;
  for (const answer of answers()) answer.stop();
  say("Stopped.");
}

function clear() {
  stop();
  for (const { element } of turns) element.remove();
  turns = [];
  update();
  say("The conversation is cleared.");
  prompt.focus();
}

// Showing

function update() {
  const asking = busy();
  const [shown, other] = asking ? ["#stop", "#send"] : ["#send", "#stop"];
  const focused = document.activeElement === $(other);
  $(shown).hidden = false;
  $(other).hidden = true;
  if (focused) $(shown).focus();
  const count = columns.columns.length;
  $("#clear").hidden = turns.length === 0;
  $("#empty").hidden = turns.length > 0 || count === 0;
  $("#empty").textContent = howToBegin(count);
  prompt.placeholder = count > 1 ? "Ask every model" : "Ask the model";
  document.body.dataset.columns = String(Math.max(count, 1));
  $("#differences-label").hidden = count < 2 || turns.length === 0;
  for (const turn of turns)
    for (const [column, answer] of turn.answers) {
      answer.allowRetry(turn === turns.at(-1));
      answer.element.classList.toggle("elsewhere", answer.model !== column.model);
    }
  markDifferences();
  follow();
}

function howToBegin(count) {
  if (count > 1) return "Each model above gets the same prompt, and goes on with its own conversation.";
  if (columns.models.length > 1) return "Add a model to see answers to the same prompt side by side.";
  return "One model is served here. Start lorakit serve with adapters to compare them side by side.";
}

// Each answer against that of the first column; with two, that one against the other as well.
function markDifferences() {
  const wanted = $("#differences").checked;
  for (const turn of turns) {
    const [first, ...others] = columns.columns.map((column) => turn.answers.get(column));
    for (const answer of turn.answers.values()) {
      if (answer.state === "busy") continue;
      const other = answer !== first ? first : others.length === 1 ? others[0] : undefined;
      answer.compareWith(wanted && answer.usable && other?.usable ? other : undefined);
    }
  }
}

function columnsChanged(removed) {
  if (removed !== null)
    for (const turn of turns) {
      const answer = turn.answers.get(removed);
      answer?.stop();
      answer?.element.remove();
      turn.answers.delete(removed);
    }
  update();
}

function follow() {
  if (following) scrollTo(0, document.documentElement.scrollHeight);
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + prompt.offsetHeight - prompt.clientHeight}px`;
}

// The server

function loadModels() {
  return notices.during(async () => {
    const models = await listModels();
    columns.serve(models);
    pictures.allow(models.some((model) => model.pictures));
  });
}

// With the key that was missing when the last turn was asked.
function askAgain() {
  prompt.focus();
  for (const [column, answer] of turns.at(-1)?.answers ?? [])
    if (answer.trouble?.status === 401) ask(turns.at(-1), column);
}

// Hands

const on = (selector, event, act) =>
  $(selector).addEventListener(event, (happened) => {
    if (event === "submit") happened.preventDefault();
    act(happened);
  });
// While an input method composes, Enter chooses a word and Escape drops it; 229 is Safari's sign.
const composes = (event) => event.isComposing || event.keyCode === 229;
on("#composer", "submit", send);
on("#stop", "click", stop);
on("#clear", "click", clear);
on("#differences", "change", update);
on("#turns", "grown", follow);
on("#prompt", "input", fitPrompt);
on("#prompt", "keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || composes(event)) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !composes(event)) stop();
});
document.addEventListener("scroll", () => {
  const end = document.documentElement.scrollHeight - innerHeight;
  following = end - scrollY < 80;
});
// Adapters come and go while the server runs.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !notices.asksForKey) loadModels();
});

update();
await loadModels();
if (matchMedia("(hover: hover)").matches && !notices.asksForKey) prompt.focus();
