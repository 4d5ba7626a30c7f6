// Elements of the page, made by name: the policy under which it is served lets no text become markup.

/** An element with attributes; `children` are elements and texts. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}
