// Server-sent events out of the body of a fetch. The browser's EventSource can't send a body or a
// key, so the format is read here.

/** The data of each event of `body`, a stream of bytes; an event without data is passed over. */
export async function* eventsOf(body) {
  let data = [];
  for await (const line of linesOf(body)) {
    if (line === "") {
      if (data.length) yield data.join("\n");
      data = [];
    } else if (line.startsWith("data:")) {
      data.push(line.slice(line[5] === " " ? 6 : 5));
    }
  }
}

async function* linesOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      yield* lines;
    }
  } finally {
    // Whoever stops reading early leaves: the server then frees the row.
    reader.cancel().catch(() => {});
  }
}
