// What the pages share: the header with the key, calls to the API, and elements made without HTML.

export const KEY = "trivec-key"; // in the tab's session storage, and nowhere else
const PAGES = { "./": "Playground", usage: "Usage", docs: "API" };

export const byId = (id) => document.getElementById(id);
export const number = (value) => value.toLocaleString("en");
export const shorten = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

/** A new HTML element. Strings among *children* become text, whatever they hold. */
export const make = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);

/** A new SVG element. */
export const draw = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function fill(element, attributes = {}, children = []) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== false));
  return element;
}

/** Replace all children of *id* but the first, which is a legend or the option that stands for all. */
export const refill = (id, children) => byId(id).replaceChildren(byId(id).firstElementChild, ...children);

/** *run*, once nothing has called it again for *wait_ms*. */
export function debounce(run, wait_ms) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => run(...given), wait_ms);
  };
}

/** The response to one request with the visitor's key. Throws an Error in the API's own words. */
export async function request(path, { body, method = body ? "POST" : "GET", signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (/[^ -~]/.test(key ?? "")) throw new Error("A key has no such characters. Paste it as it was shown.");
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new Error(answer.error?.message ?? `${path} was answered with ${response.status}`);
}

export const call = async (path, options) => (await request(path, options)).json();

/**
 * Run *action*, with *button* disabled meanwhile; tell the visitor what went wrong. What runs without a
 * button, by itself, does not clear what was said of one: nobody would have read it.
 */
export async function attempt(action, button) {
  const alert = byId("alert");
  if (button) button.disabled = true;
  try {
    if (button || !alert.hasAttribute("data-button")) alert.hidden = true;
    return await action();
  } catch (error) {
    if (error.name === "AbortError") return undefined;
    alert.textContent = error.message;
    alert.hidden = false;
    alert.toggleAttribute("data-button", Boolean(button));
    return undefined;
  } finally {
    if (button) button.disabled = false;
  }
}

/** A button that copies what *text* returns. */
export function copyButton(text) {
  return make("button", { type: "button", onclick: async ({ target }) => {
    await navigator.clipboard.writeText(text());
    target.textContent = "Copied";
    setTimeout(() => (target.textContent = "Copy"), 1500);
  } }, "Copy");
}

/** Draw the header, and call *onConnect* now, if there is a key, and whenever another is pasted. */
export function start(current, onConnect) {
  const needsKey = document.documentElement.dataset.keys === "yes";
  const field = make("input", {
    id: "key", type: "password", autocomplete: "off", spellcheck: "false", placeholder: "tv_…",
    value: sessionStorage.getItem(KEY) ?? "",
  });
  const form = make("form", { class: "key", onsubmit: (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, field.value.trim());
    attempt(onConnect, form.lastChild);
  } }, make("label", { for: "key" }, "Key"), field, make("button", {}, "Connect"));
  const links = Object.entries(PAGES).map(([href, title]) =>
    make("a", { href, "aria-current": title === current && "page" }, title));
  byId("header").append(
    make("a", { href: "./", class: "name" }, make("img", { src: "page/icon.svg", alt: "", width: 26 }), "Trivec"),
    make("nav", { "aria-label": "Pages" }, links), needsKey && form || "",
  );
  if (!needsKey || sessionStorage.getItem(KEY)) attempt(onConnect);
  else field.focus();
}
