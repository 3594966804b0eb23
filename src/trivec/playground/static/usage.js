// The usage page, for a key with the scope admin: what was used, what goes on now, and the keys.

import { attempt, byId, call, copyButton, make, number, refill, request, start } from "./common.js";
import { barTable, dayChart, sparkline } from "./charts.js";

const EVERY_MS = 5000; // between two looks at /metrics
const HISTORY = 60; // looks that a line shows
const EMBEDDINGS = { route: "/embeddings", status: "2xx" };
const history = []; // of those looks, oldest first
let timer;

/** Prometheus's text as [{name, labels, value}]. */
function parseMetrics(page) {
  return [...page.matchAll(/^(\w+)(?:\{(.*)\})? (\S+)$/gm)].map(([, name, labels = "", value]) => ({
    name, value: Number(value),
    labels: Object.fromEntries([...labels.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, key, text]) => [key, text])),
  }));
}

/** The sum of all series of *name* that have *labels*. */
const total = (metrics, name, labels = {}) => metrics
  .filter((one) => one.name === name && Object.entries(labels).every(([key, text]) => one.labels[key] === text))
  .reduce((sum, { value }) => sum + value, 0);

/** The *share*-quantile of a histogram, linear within a bucket, as Prometheus's histogram_quantile. */
function quantile(share, metrics, name, labels) {
  const limits = [...new Set(metrics.filter((one) => one.name === `${name}_bucket`).map(({ labels: { le } }) => le))]
    .sort((a, b) => (a === "+Inf") - (b === "+Inf") || a - b);
  const counts = limits.map((le) => total(metrics, `${name}_bucket`, { ...labels, le }));
  const wanted = share * counts.at(-1);
  const at = counts.findIndex((count) => count >= wanted);
  if (!wanted) return undefined;
  if (limits[at] === "+Inf") return Number(limits[at - 1]);
  const [low, below] = at ? [Number(limits[at - 1]), counts[at - 1]] : [0, 0];
  return low + ((Number(limits[at]) - low) * (wanted - below)) / (counts[at] - below);
}

const duration = (s) => (s === undefined ? "–" : s < 1 ? `${(s * 1000).toFixed(1)} ms` : `${s.toFixed(2)} s`);

async function look() {
  const metrics = parseMetrics(await (await request("metrics")).text());
  history.push({ at_s: performance.now() / 1000, metrics });
  history.splice(0, history.length - HISTORY);
  const rates = (name, labels) => history.slice(1).map(({ at_s: at, metrics: now }, i) =>
    Math.max(0, total(now, name, labels) - total(history[i].metrics, name, labels)) / (at - history[i].at_s));
  const levels = (name) => history.map(({ metrics: now }) => total(now, name));
  const phase = metrics.find(({ name, value }) => name === "trivec_phase" && value === 1);
  const rate = (values) => [values.length ? number(Math.round(values.at(-1) * 10) / 10) : "…", values];
  const latency = (share) => [duration(quantile(share, metrics, "trivec_request_duration_seconds", EMBEDDINGS))];
  const tiles = {
    phase: [phase?.labels.phase ?? "unknown"],
    "requests in the queue": [number(levels("trivec_queue_requests").at(-1)), levels("trivec_queue_requests")],
    "tokens in the queue": [number(levels("trivec_queue_tokens").at(-1)), levels("trivec_queue_tokens")],
    "requests a second": rate(rates("trivec_requests_total", { route: "/embeddings" })),
    "tokens a second": rate(rates("trivec_batch_tokens_total")),
    "half are answered within": latency(0.5),
    "95 of 100 within": latency(0.95),
    "99 of 100 within": latency(0.99),
  };
  byId("tiles").replaceChildren(...Object.entries(tiles).map(([name, [value, values]]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value, values && values.length > 1 && sparkline(values)))));
  byId("now").hidden = false;
}

async function showUsage() {
  const query = new URLSearchParams();
  const [span, of] = [byId("since").value, byId("of").value];
  if (span) query.set("since", new Date(Date.now() - span * 86_400_000).toISOString().slice(0, 10));
  if (of) query.set("key", of);
  const sums = async (by) => (await call(`admin/v1/usage?by=${by}&${query}`)).data;
  const [days, keys, models] = await Promise.all(["day", "key", "model"].map(sums));
  const unit = byId("units").querySelector(":checked").value;
  const bars = (lines, name) =>
    lines.map((line) => ({ name: name(line), value: line[unit] })).sort((a, b) => b.value - a.value);
  byId("used").hidden = false;
  const today = new Date().toISOString().slice(0, 10); // the ledger's days are UTC's, too
  byId("days").replaceChildren(days.length
    ? dayChart(days.map((line) => ({ day: line.day, value: line[unit] })), unit === "failed" ? "failed requests" : unit,
      { today, width: byId("days").clientWidth })
    : make("p", { class: "note" }, "Nothing was used in this time."));
  byId("by-key").replaceChildren(barTable("By key", bars(keys, ({ name, key }) => name ?? key ?? "without a key")));
  byId("by-model").replaceChildren(barTable("By model", bars(models, ({ model }) => model ?? "without a model")));
}

async function showKeys() {
  const { data: keys } = await call("admin/v1/keys");
  const chosen = byId("of").value;
  refill("of", keys.map(({ id, name }) => make("option", { value: id, selected: id === chosen }, `by ${name}`)));
  const day = (moment) => moment.slice(0, 10);
  const limit = (value) => (value === null ? "no limit" : number(value));
  const row = (key) => {
    const isOver = key.revoked || (key.expires && Date.parse(key.expires) < Date.now());
    const ends = key.expires ? `${isOver ? "ended" : "ends"} ${day(key.expires)}` : "live";
    const button = (name, act, kind) => make("button", {
      type: "button", class: kind, "aria-label": `${name} ${key.name}`, onclick: () => act(key),
    }, name);
    const cells = [
      key.hints.join(", "), key.scopes.join(", "), key.models?.join(", ") ?? "all", limit(key.requests_per_minute),
      limit(key.tokens_per_minute), day(key.created), key.revoked ? `revoked ${day(key.revoked)}` : ends,
      isOver ? "" : [button("Rotate", confirmRotate), " ", button("Revoke", confirmRevoke, "danger")],
    ];
    return make("tr", { class: isOver && "ended" }, make("th", { scope: "row", title: key.id }, key.name),
      cells.map((content) => make("td", {}, content)));
  };
  byId("keys").querySelector("tbody").replaceChildren(...keys.map(row));
  byId("keys").hidden = false;
}

/** Ask in a dialog; *act(fields)* runs when *yes* is pressed, and its answer may hold a new key. */
function ask(title, content, yes, act, kind = "primary") {
  const dialog = byId("dialog");
  const form = make("form", { onsubmit: async (event) => {
    event.preventDefault();
    const answer = await attempt(() => act(new FormData(form)), form.querySelector(`.${kind}`));
    if (answer?.key) showOnce(answer);
    else dialog.close();
    if (answer) await attempt(showKeys);
  } }, make("h2", { id: "dialog-title" }, title), content, make("div", { class: "row" },
    make("button", { type: "button", autofocus: kind === "danger", onclick: () => dialog.close() }, "Cancel"),
    make("button", { class: kind }, yes)));
  dialog.replaceChildren(form);
  dialog.showModal();
}

/** A new key in the open dialog: it is nowhere else, and gone when that closes. */
function showOnce({ name, key, warnings = [] }) {
  const dialog = byId("dialog");
  dialog.addEventListener("close", () => dialog.replaceChildren(), { once: true });
  dialog.replaceChildren(make("h2", { id: "dialog-title" }, `The key ${name}`), make("pre", { tabindex: 0 }, key),
    make("p", { class: "note" }, "It is shown only now. Keep it where your program reads it."),
    ...warnings.map((text) => make("p", { class: "over" }, text)),
    make("div", { class: "row" }, copyButton(() => key),
      make("button", { type: "button", class: "primary", onclick: () => dialog.close() }, "Done")));
}

const field = (label, attributes) => make("label", {}, label, make("input", attributes));
const change = (key, verb, body) => call(`admin/v1/keys/${key.id}/${verb}`, { method: "POST", body });

const confirmRevoke = (key) => ask(`Revoke ${key.name}?`,
  make("p", {}, "Its requests are refused from now on. This cannot be undone."),
  "Revoke", () => change(key, "revoke"), "danger");

const confirmRotate = (key) => ask(`Rotate ${key.name}?`, [
  make("p", {}, "It gets a new secret. The one of before still works for a while, so that programs can change over."),
  field("Hours for which it does", { name: "hours", type: "number", min: 0, max: 720, value: 24, required: true }),
], "Rotate", (fields) => change(key, "rotate", { overlap_s: fields.get("hours") * 3600 }));

const createKey = () => ask("Create a key", [
  field("Name", { name: "name", required: true, maxlength: 64, autocomplete: "off" }),
  make("label", {}, make("input", { name: "admin", type: "checkbox" }), " It may also administer this server"),
  field("Models, separated by commas (empty: all)", { name: "models" }),
  field("Requests a minute (empty: no limit)", { name: "rpm", type: "number", min: 1 }),
  field("Tokens a minute (empty: no limit)", { name: "tpm", type: "number", min: 1 }),
  field("Last day (empty: it does not end)", { name: "expires", type: "date" }),
], "Create", (fields) => call("admin/v1/keys", { body: {
  name: fields.get("name"),
  scopes: fields.get("admin") ? ["embed", "admin"] : ["embed"],
  models: fields.get("models") ? fields.get("models").split(",").map((id) => id.trim()).filter(Boolean) : null,
  requests_per_minute: Number(fields.get("rpm")) || null,
  tokens_per_minute: Number(fields.get("tpm")) || null,
  expires: fields.get("expires") ? `${fields.get("expires")}T23:59:59Z` : null,
} }));

async function connect() {
  await showKeys();
  await showUsage();
  byId("hint").hidden = true;
  clearInterval(timer);
  history.length = 0;
  await look();
  timer = setInterval(() => document.hidden || attempt(look), EVERY_MS);
}

byId("create").addEventListener("click", createKey);
byId("used").addEventListener("change", () => attempt(showUsage));
start("Usage", connect);
