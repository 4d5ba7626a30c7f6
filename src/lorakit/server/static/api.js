// The server's HTTP API, as the page uses it: the list of models, and answers that stream. What
// goes wrong becomes a `Trouble`, whose message says it in words.

import { eventsOf } from "./events.js";
import { recall, remember } from "./memory.js";

const RETRY_LATER = new Set([429, 503]);

export class Trouble extends Error {
  /** `detail` is the server's own text; `status` 0 where there was no answer at all. */
  constructor(message, { detail = "", status = 0 } = {}) {
    super(message);
    this.detail = detail;
    this.status = status;
  }
}

let key = recall("sessionStorage", "key") ?? "";
let spare = ""; // sent as long as nobody has typed a key

export function setKey(value) {
  key = value;
  remember("sessionStorage", "key", key);
}

export function setSpareKey(value) {
  spare = value;
}

export const hasKey = () => key !== "";

/** What the training service shows to the key: figures, and runs with losses and checkpoints. */
export async function trainingState() {
  const response = await ask("training/state", {});
  const state = await response.json().catch(() => ({}));
  if (!Array.isArray(state.runs)) throw new Trouble("The server's list of runs can't be read.");
  return state;
}

/**
 * The served models: `[{id, base, label, pictures}]`, the base first; `label` is what people are
 * shown, `pictures` whether the model reads some.
 */
export async function listModels() {
  const response = await ask("v1/models", {});
  const { data } = await response.json().catch(() => ({}));
  if (!Array.isArray(data)) throw new Trouble("The server's list of models can't be read.");
  const models = data.map(({ id, parent = null, input_modalities: reads = [] }) => ({
    id,
    pictures: reads.includes("image"),
    base: parent === null,
    // A base that is a folder of the server's goes by the folder's name.
    label: parent === null ? `${/^([./~]|\w:)/.test(id) ? id.match(/[^/\\]*[/\\]*$/)[0] : id} (base)` : id,
  }));
  return models.sort((one, other) => other.base - one.base);
}

/**
 * One answer, piece by piece: yields `{text}`, `{reason}` and `{usage}` as they come.
 *
 * `body` is that of a chat completion. Throws `Trouble`, or the signal's AbortError.
 */
export async function* answerTo(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  try {
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw inWords(Number(chunk.error.code) || 500, chunk.error);
      const [choice] = chunk.choices ?? [];
      if (choice?.delta?.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) yield { reason: choice.finish_reason };
      if (chunk.usage) yield { usage: chunk.usage };
    }
  } catch (error) {
    if (error instanceof Trouble || signal.aborted) throw error;
    throw new Trouble("The connection was lost before the answer ended.");
  }
  throw new Trouble("The connection was closed before the answer ended.");
}

async function ask(path, options) {
  const headers = { ...options.headers };
  if (key || spare) headers.Authorization = `Bearer ${key || spare}`;
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Trouble("The server can't be reached.");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw inWords(response.status, error, response.headers.get("Retry-After"));
}

function inWords(status, error, retryAfter = null) {
  const when = /^\d+$/.test(retryAfter ?? "") ? `in ${retryAfter}\u00a0s` : "in a moment";
  const words = {
    401: key ? "The server doesn't accept this API key." : "The server asks for an API key.",
    404: "The server doesn't serve this model now.",
    413: "This is too long for the server.",
    429: "The server is busy.",
    503: "The server can't answer now.",
  };
  const said = words[status] ?? (status < 500 ? "The server refused this." : "The server failed.");
  const detail = typeof error?.message === "string" ? error.message : "";
  const message = RETRY_LATER.has(status) ? `${said} Try again ${when}.` : said;
  return new Trouble(message, { detail, status });
}
