// Curves of losses as SVG: a small one for a table, and one with its scales.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 1000;
const HEIGHT = 300;

/** A small curve of `points`, `[[step, loss], …]`; nothing where there are fewer than two. */
export function sparkline(points) {
  if (points.length < 2) return document.createDocumentFragment();
  const { place } = scaled(points);
  const svg = drawing();
  svg.setAttribute("aria-hidden", "true");
  svg.append(shape("path", { class: "line", d: path(points, place) }));
  return svg;
}

/** Puts a curve with its scales into `element`. */
export function draw(element, points) {
  if (points.length === 0) {
    const none = document.createElement("p");
    none.className = "none";
    none.textContent = "No step has been made yet.";
    return element.replaceChildren(none);
  }
  const { low, high, first, last, place } = scaled(points);
  const svg = drawing();
  svg.setAttribute("role", "img");
  const [, start] = points[0];
  const [step, end] = points.at(-1);
  svg.setAttribute("aria-label", `Loss ${shown(start)} at step ${first}, ${shown(end)} at step ${step}`);
  for (const part of [0, 0.5, 1]) {
    const y = part * HEIGHT;
    svg.append(shape("line", { class: "grid", x1: 0, x2: WIDTH, y1: y, y2: y }));
  }
  svg.append(shape("path", { class: "line", d: path(points, place) }));
  const y = scale("y", [high, (low + high) / 2, low].map(shown));
  const x = scale("x", first === last ? [`step ${first}`] : [`step ${first}`, `step ${last}`]);
  return element.replaceChildren(y, svg, x);
}

/** A loss as people read it. */
export function shown(value) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

function scaled(points) {
  const losses = points.map(([, loss]) => loss);
  const [first, last] = [points[0][0], points.at(-1)[0]];
  let [low, high] = [Math.min(...losses), Math.max(...losses)];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const place = ([step, loss]) => [
    first === last ? WIDTH / 2 : ((step - first) / (last - first)) * WIDTH,
    ((high - loss) / (high - low)) * HEIGHT,
  ];
  return { low, high, first, last, place };
}

function path(points, place) {
  const many = points.length > 1 ? points : [points[0], points[0]];
  return many.map((point, i) => `${i ? "L" : "M"}${place(point).map((n) => n.toFixed(1)).join(" ")}`).join("");
}

function drawing() {
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" });
  return svg;
}

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function scale(name, labels) {
  const element = document.createElement("div");
  element.className = name;
  element.append(
    ...labels.map((label) => {
      const span = document.createElement("span");
      span.textContent = label;
      return span;
    }),
  );
  return element;
}
