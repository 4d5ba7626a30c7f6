// Two texts compared word by word, by their longest common subsequence.

const MOST_CELLS = 4_000_000;

/**
 * The parts of `text` in order: `[{text, differs}]`, where a part that differs isn't in `other`.
 * Null if the texts are too long to compare.
 */
export function compared(text, other) {
  const mine = wordsOf(text);
  const theirs = wordsOf(other);
  const most = Math.min(mine.length, theirs.length);
  let start = 0;
  while (start < most && mine[start] === theirs[start]) start += 1;
  let end = 0;
  while (end < most - start && mine.at(-1 - end) === theirs.at(-1 - end)) end += 1;
  const common = inCommon(
    mine.slice(start, mine.length - end),
    theirs.slice(start, theirs.length - end),
  );
  if (common === null) return null;
  const differs = mine.map(
    (_, i) => i >= start && i < mine.length - end && !common.has(i - start),
  );
  // A space goes with the words around it: no one could see it differ.
  const marked = (i) =>
    mine[i].trim() === "" ? Boolean(differs[i - 1] && differs[i + 1]) : differs[i];
  const parts = [];
  mine.forEach((word, i) => {
    const last = parts.at(-1);
    if (last && last.differs === marked(i)) last.text += word;
    else parts.push({ text: word, differs: marked(i) });
  });
  return parts;
}

const words = new Intl.Segmenter(undefined, { granularity: "word" });

const wordsOf = (text) => Array.from(words.segment(text), ({ segment }) => segment);

/** The places in `a` of a longest subsequence that `b` has too; null if that is too much work. */
function inCommon(a, b) {
  const width = b.length + 1;
  if (width * (a.length + 1) > MOST_CELLS) return null;
  const longest = new Uint16Array(width * (a.length + 1)); // of a[i:] and b[j:]
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      longest[i * width + j] =
        a[i] === b[j]
          ? longest[(i + 1) * width + j + 1] + 1
          : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  const common = new Set();
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) {
      common.add(i);
      i += 1;
      j += 1;
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return common;
}
