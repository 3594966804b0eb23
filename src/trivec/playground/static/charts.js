// Pictures of numbers, as elements: each can be read without its colours and used without a mouse.

import { draw, make, number, shorten } from "./common.js";

/** *token* of a vocabulary as its text reads: without the marks of word pieces and word starts. */
const readable = (token) => token.replace(/^##/, "").replace(/[▁Ġ]/g, " ").trim() || token;
const isSpecial = (token) => /^(<.*>|\[[A-Z]+\])$/.test(token);

/** A token as an element; *weight* within 0 … 1 tints it. */
export function chip(token, { weight, label, tag = "span", ...attributes } = {}) {
  const children = [readable(token), label !== undefined && make("small", {}, label)];
  const kind = `token${isSpecial(token) ? " special" : ""}${weight === undefined ? "" : " weighted"}`;
  return make(tag, { class: kind, "--weight": weight, title: token, ...attributes }, ...children);
}

/** A table of similarities, coloured from the least to the greatest; *onPick(row, column)*. */
export function heatMap(texts, matrix, { kind, onPick }) {
  const others = matrix.flatMap((row, i) => row.filter((_, j) => i !== j));
  const [least, most] = [Math.min(...others), Math.max(...others)];
  const heat = (value) => Math.min(1, Math.max(0, (value - least) / (most - least || 1)));
  const isSmall = texts.length <= 12;
  const cell = (value, i, j) => make("td", {
    tabindex: i + j ? -1 : 0, "data-at": `${i},${j}`, "--heat": heat(value),
    title: `${i + 1} with ${j + 1}: ${value.toFixed(3)}`,
    onclick: () => onPick(i, j), onfocus: () => onPick(i, j),
  }, isSmall ? value.toFixed(2) : "");
  const rows = matrix.map((row, i) => make("tr", {},
    make("th", { scope: "row", title: texts[i] }, make("span", {}, `${i + 1} `), make("bdi", {}, texts[i])),
    row.map((value, j) => cell(value, i, j))));
  const columns = texts.map((text, j) => make("th", { scope: "col", title: text }, `${j + 1}`));
  const table = make("table", { class: `heat ${kind}`, role: "grid", "aria-label": `Similarity, ${kind}` },
    make("thead", {}, make("tr", {}, make("td", {}), columns)), make("tbody", {}, rows));
  table.addEventListener("keydown", (event) => moveFocus(event, table));
  return table;
}

/** Arrow keys move from cell to cell, and one cell at a time is in the tab order. */
function moveFocus(event, table) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  const [i, j] = (event.target.dataset.at ?? "").split(",").map(Number);
  const next = step && table.querySelector(`[data-at="${i + step[0]},${j + step[1]}"]`);
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

/** Parts of one duration side by side: [name, milliseconds] each. */
export function timingBar(parts) {
  const total = parts.reduce((sum, [, ms]) => sum + ms, 0);
  return [
    make("div", { class: "timing", "aria-hidden": "true" },
      parts.map(([name, ms]) => make("span", { class: name, "--share": ms / total }))),
    make("dl", { class: "legend" }, [...parts, ["total", total]].map(([name, ms]) =>
      make("div", {}, make("dt", { class: name }, name), make("dd", {}, `${ms.toFixed(1)} ms`)))),
  ];
}

/** A table with a bar in each row; *rows*: {name, value, text, kind}. */
export function barTable(caption, rows) {
  const most = Math.max(...rows.map(({ value }) => value), 0) || 1;
  return make("table", { class: "bars" }, make("caption", {}, caption), make("tbody", {}, rows.map((row) =>
    make("tr", {}, make("th", { scope: "row", title: row.name }, make("bdi", {}, shorten(row.name, 160))),
      make("td", {}, make("span", { class: `bar ${row.kind ?? ""}`, "--share": Math.max(0, row.value) / most })),
      make("td", { class: "figure" }, row.text ?? number(row.value))))));
}

/** A column for each of *days*, [{day, value}], up to *today*; a day without use has none. */
export function dayChart(days, unit, { today, width }) {
  const [height, foot] = [180, 20];
  const age = (day) => Math.round((Date.parse(today) - Date.parse(day)) / 86_400_000);
  const count = Math.max(age(days[0].day) + 1, 14);
  const most = Math.max(...days.map(({ value }) => value), 1);
  const columns = days.map(({ day, value }) => {
    const tall = (value / most) * (height - foot - 20);
    return draw("rect", {
      class: "column", x: ((count - 1 - age(day)) * width) / count, y: height - foot - tall,
      width: (width / count) * 0.8, height: tall, rx: 2,
    }, draw("title", {}, `${day}: ${number(value)} ${unit}`));
  });
  const note = (text, x, y, anchor) => draw("text", { x, y, "text-anchor": anchor }, text);
  const begin = new Date(Date.parse(today) - (count - 1) * 86_400_000).toISOString().slice(0, 10);
  const sum = number(days.reduce((total, { value }) => total + value, 0));
  const label = `${number(most)} ${unit} on the busiest day, ${sum} in all`;
  return draw("svg", { viewBox: `0 0 ${width} ${height}`, class: "days", role: "img", "aria-label": label },
    draw("line", { x1: 0, x2: width, y1: height - foot, y2: height - foot }), columns, note(label, 0, 12, "start"),
    note(begin, 0, height - 4, "start"), note(today, width, height - 4, "end"));
}

/** A line through *values*, two at least. */
export function sparkline(values) {
  const most = Math.max(...values, 1e-9);
  const points = values.map((value, i) => `${(i * 120) / (values.length - 1)},${30 - (value / most) * 26}`).join(" ");
  return draw("svg", { viewBox: "0 0 120 32", class: "spark", "aria-hidden": "true" }, draw("polyline", { points }));
}

/** Points by their texts: a mouse, or the arrow keys from left to right, show the text of one. */
export function scatter(points, texts, width) {
  const height = Math.round(Math.min(440, width * 0.75));
  const at = ([x, y]) => [width / 2 + x * (width / 2 - 16), height / 2 - y * (height / 2 - 16)];
  const places = points.map(at);
  const order = places.map((_, i) => i).sort((a, b) => places[a][0] - places[b][0]);
  const ring = draw("circle", { class: "ring", r: 8, cx: -20, cy: -20 });
  const tip = make("output", { class: "tip", hidden: true });
  const show = (i) => {
    const [x, y] = places[i];
    ring.setAttribute("cx", x);
    ring.setAttribute("cy", y);
    tip.replaceChildren(make("bdi", {}, `${i + 1} · ${shorten(texts[i], 240)}`));
    tip.hidden = false;
    const side = x > width / 2 ? `right:${100 - (100 * x) / width}` : `left:${(100 * x) / width}`;
    tip.style.cssText = `${side}%;top:${(100 * y) / height}%`;
  };
  let current = -1;
  const plot = draw("svg", {
    viewBox: `0 0 ${width} ${height}`, class: "map", tabindex: 0, role: "group",
    "aria-label": `Map of ${points.length} texts. Arrow keys go from text to text.`,
    onpointermove: (event) => {
      const box = plot.getBoundingClientRect();
      const x = ((event.clientX - box.left) * width) / box.width;
      const y = ((event.clientY - box.top) * height) / box.height;
      let nearest = 0;
      const distance = (i) => (places[i][0] - x) ** 2 + (places[i][1] - y) ** 2;
      for (let i = 1; i < places.length; i++) if (distance(i) < distance(nearest)) nearest = i;
      if (distance(nearest) < 600) show(nearest);
    },
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      current = (current + step + order.length) % order.length;
      show(order[current]);
    },
  }, places.map(([cx, cy]) => draw("circle", { cx, cy, r: points.length > 300 ? 2.5 : 4.5 })),
  points.length <= 40 && labels(places, texts, width), ring);
  return make("div", { class: "plot" }, plot, tip);
}

/** The texts beside their points, as many as do not cover one another. */
function labels(places, texts, width) {
  const taken = places.map(([x, y]) => ({ left: x - 5, right: x + 5, y }));
  return places.map(([x, y], i) => {
    const text = shorten(texts[i], width < 500 ? 18 : 32);
    const isLeft = x > width * 0.6;
    const start = isLeft ? x - 9 - text.length * 6 : x + 9;
    const box = { left: start, right: start + text.length * 6, y };
    if (taken.some((one) => Math.abs(one.y - y) < 13 && one.left < box.right && box.left < one.right)) return undefined;
    taken.push(box);
    return draw("text", { x: isLeft ? x - 9 : x + 9, y: y + 4, "text-anchor": isLeft ? "end" : "start" }, text);
  });
}

/** Two rows of tokens, and a line from each of the first to the one of the second that it met. */
export function alignment(query, passage, found) {
  const [least, most] = [Math.min(...found.map(({ score }) => score)), Math.max(...found.map(({ score }) => score))];
  const strength = (score) => (score - least) / (most - least || 1);
  const met = passage.map((token) => chip(token));
  const lines = found.map(({ score }) => draw("path", { "--weight": strength(score) }));
  const asking = query.map((token, i) => {
    const { match, score } = found[i];
    const mark = (isOn) => () => [lines[i], met[match]].forEach((one) => one.classList.toggle("on", isOn));
    return chip(token, {
      tag: "button", type: "button", label: score.toFixed(2), weight: strength(score),
      title: `${readable(token)} met ${readable(passage[match])}, ${score.toFixed(3)}`,
      onpointerenter: mark(true), onfocus: mark(true), onpointerleave: mark(false), onblur: mark(false),
    });
  });
  const canvas = draw("svg", { "aria-hidden": "true" }, lines);
  const element = make("div", { class: "alignment" }, canvas,
    make("p", { class: "tokens", dir: "auto" }, asking), make("p", { class: "tokens", dir: "auto" }, met));
  new ResizeObserver(() => { // where the tokens are is known once they are laid out
    const origin = element.getBoundingClientRect();
    canvas.setAttribute("viewBox", `0 0 ${origin.width} ${origin.height}`);
    found.forEach(({ match }, i) => {
      const [from, to] = [asking[i].getBoundingClientRect(), met[match].getBoundingClientRect()];
      const [x, y] = [from.left + from.width / 2 - origin.left, from.bottom - origin.top];
      const [u, v] = [to.left + to.width / 2 - origin.left, to.top - origin.top];
      lines[i].setAttribute("d", `M${x},${y} C${x},${(y + v) / 2} ${u},${(y + v) / 2} ${u},${v}`);
    });
  }).observe(element);
  return element;
}
