// The pictures that go with the next prompt: chosen, pasted or dropped anywhere on the page.

const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const template = document.querySelector("#picture-template");

export class Pictures {
  /** `changed` is called when there is one more or one less; `say` tells the status line. */
  constructor({ list, button, input, composer }, { changed, say }) {
    this.list = list;
    this.button = button;
    this.changed = changed;
    this.say = say;
    this.waiting = []; // {name, url, element}; url is a data URL, as the server takes it
    this.reads = false;
    input.accept = KINDS.join(",");
    button.addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      this.add([...input.files]);
      input.value = ""; // so that the same file can be chosen again
    });
    composer.addEventListener("paste", (event) => this.#given(event, event.clipboardData));
    document.addEventListener("dragover", (event) => {
      if (![...event.dataTransfer.types].includes("Files")) return;
      event.preventDefault();
      composer.classList.add("over");
    });
    for (const name of ["dragleave", "drop", "dragend"])
      document.addEventListener(name, () => composer.classList.remove("over"));
    document.addEventListener("drop", (event) => this.#given(event, event.dataTransfer));
  }

  /** Whether a model that is served reads pictures. */
  allow(reads) {
    this.reads = reads;
    this.button.hidden = !reads;
  }

  /** Hands over what is waiting, for a prompt that is sent. */
  take() {
    const taken = this.waiting.map(({ name, url }) => ({ name, url }));
    this.waiting = [];
    this.list.replaceChildren();
    this.changed();
    return taken;
  }

  async add(files) {
    if (!this.reads) return this.say("The models that are served here read text alone.");
    for (const file of files) {
      if (KINDS.includes(file.type)) await this.#show(file);
      else this.say(`${file.name} is not a picture of the kinds PNG, JPEG, WebP and GIF.`);
    }
    return undefined;
  }

  #given(event, data) {
    const files = [...data.files];
    if (files.length === 0) return;
    event.preventDefault();
    this.add(files);
  }

  async #show(file) {
    let url;
    try {
      url = await dataUrl(file);
    } catch {
      return this.say(`${file.name} can't be read.`);
    }
    const element = template.content.firstElementChild.cloneNode(true);
    const picture = { name: file.name, url, element };
    element.querySelector("img").replaceWith(imageOf(picture));
    const remove = element.querySelector("button");
    remove.setAttribute("aria-label", `Remove the picture ${file.name}`);
    remove.addEventListener("click", () => {
      this.waiting.splice(this.waiting.indexOf(picture), 1);
      element.remove();
      this.changed();
    });
    this.waiting.push(picture);
    this.list.append(element);
    this.changed();
    return this.say(`${file.name} goes with the next prompt.`);
  }
}

/** A picture as an element; its name is read out in its place. */
export function imageOf({ name, url }) {
  const image = document.createElement("img");
  image.alt = name;
  image.title = name;
  image.src = url;
  return image;
}

/** A prompt and its pictures as the content of a message. */
export function contentOf(text, pictures) {
  if (pictures.length === 0) return text;
  const parts = pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return text === "" ? parts : [...parts, { type: "text", text }];
}

function dataUrl(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => done(reader.result));
    reader.addEventListener("error", () => failed(reader.error));
    reader.readAsDataURL(file);
  });
}
