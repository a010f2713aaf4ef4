// Elements of text and of other elements. Text stays text: nothing here reads HTML.

export function element(tag, { text, on = {}, data = {}, ...properties } = {}, ...children) {
  const made = document.createElement(tag);
  Object.assign(made, properties);
  Object.assign(made.dataset, data);
  if (text !== undefined) made.textContent = text;
  for (const [name, listener] of Object.entries(on)) made.addEventListener(name, listener);
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function button(text, click, className = "", properties = {}) {
  return element("button", { type: "button", text, className, on: { click }, ...properties });
}

export function byId(id) {
  return document.getElementById(id);
}

export function press(pressed, isPressed) {
  pressed.setAttribute("aria-pressed", String(isPressed));
}
