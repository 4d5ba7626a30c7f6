// What the page remembers in the browser. Storage may be forbidden or full: the page then works
// as well, and remembers for as long as it is open.

/** `kind` is "localStorage" (this browser) or "sessionStorage" (this tab); null if not there. */
export function recall(kind, name) {
  try {
    return JSON.parse(window[kind].getItem(`lorakit.${name}`));
  } catch {
    return null;
  }
}

export function remember(kind, name, value) {
  try {
    window[kind].setItem(`lorakit.${name}`, JSON.stringify(value));
  } catch {
    // See above.
  }
}
