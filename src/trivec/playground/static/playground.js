// The playground: texts to tokens while they are typed, and to vectors and pictures when asked.

import { attempt, byId, call, copyButton, debounce, make, number, refill, request, shorten, start } from "./common.js";
import { alignment, barTable, chip, heatMap, scatter, timingBar } from "./charts.js";
import { SIMILARITY, matches, pca, readItem, similarities } from "./vectors.js";

const TEXTS_MAX = 2000; // on the map
const SHOWN = 24; // texts with every kind of vector, and with tokens
const CHUNK = 250; // texts a request beyond those
const EXAMPLE = `How do I reset my password?
Steps to recover a forgotten login
Can I send back a broken item?
Return policy for damaged goods
A cat is sleeping on the couch
Die Katze schläft auf dem Sofa
Quarterly revenue grew by twelve percent
Sales rose 12% in the last three months`;
const WEIGHTS = { dense: 1, sparse: 0.3, multi: 1 }; // of BGE-M3's paper, as /rerank
const state = { models: [], kind: "dense", language: "curl" };
let counting; // aborts the count in flight

const model = () => state.models.find(({ id }) => id === byId("model").value);
const part = (id) => byId(id).lastElementChild; // of a section: where its picture goes
const reveal = (id, isShown = true) => (byId(id).hidden = !isShown);
const readTexts = () => byId("texts").value.split("\n").map((line) => line.trim()).filter(Boolean);

/** A radio button for each of *names* into the fieldset *id*. */
function choices(id, names, chosen, onChoose) {
  refill(id, names.map((name) => make("label", {}, make("input", {
    type: "radio", name: id, value: name, checked: name === chosen, onchange: () => onChoose(name),
  }), name)));
}

async function connect() {
  const { data } = await call("v1/models");
  state.models = data;
  const embedders = data.filter(({ output_types: outputs }) => outputs.includes("dense"));
  byId("model").replaceChildren(...embedders.map(({ id }) => make("option", {}, id)));
  byId("model").disabled = byId("embed").disabled = !embedders.length;
  const isLast = ({ output_types: outputs }) => !outputs.includes("score"); // it reranks by its vectors
  const rerankers = data.toSorted((a, b) => isLast(a) - isLast(b));
  byId("reranker").replaceChildren(...rerankers.map(({ id }) => make("option", {}, id)));
  const { paths } = await call("openapi.json");
  reveal("rerank", "/v1/rerank" in paths);
  await showModel();
}

async function showModel() {
  const card = model();
  if (!card) return;
  const facts = {
    "made by": card.owned_by,
    reads: `${number(card.context_size)} tokens a text`,
    gives: `${card.output_types.join(", ")}; ${number(card.dimensions)} numbers`,
    "may be cut": card.dimensions_selectable && "to fewer numbers (dimensions)",
    precision: card.recipe ?? card.precision,
    ...card.notes,
    files: card.verified ? "verified against the catalogue" : "not in the catalogue, or changed",
    prompts: Object.keys(card.prompts ?? {}).join(", "),
    licence: card.license,
    "also called": card.aliases.join(", "),
  };
  byId("card").replaceChildren(...Object.entries(facts).filter(([, value]) => value).flatMap(([name, value]) =>
    [make("dt", {}, name), make("dd", {}, String(value))]));
  await showTokens();
}

const tokenize = (id, input, signal) =>
  call("v1/tokenize", { body: { model: id, input, return_tokens: true }, signal });

async function showTokens() {
  const texts = readTexts();
  counting?.abort();
  if (!texts.length || !model()) {
    byId("tokens").replaceChildren();
    byId("count").textContent = "";
    return;
  }
  counting = new AbortController();
  const counted = await tokenize(model().id, texts.slice(0, SHOWN), counting.signal);
  const over = texts.length > TEXTS_MAX ? `; the first ${number(TEXTS_MAX)} will be embedded` : "";
  const some = texts.length > SHOWN ? ` in the first ${SHOWN}${over}` : "";
  byId("count").textContent = `${number(texts.length)} texts, ${number(counted.total_tokens)} tokens${some}`;
  byId("tokens").replaceChildren(...counted.data.map(({ tokens, token_count: count, fits }) =>
    make("li", {}, make("p", { class: "tokens", dir: "auto" }, tokens.slice(0, 120).map((token) => chip(token))),
      make("small", { class: !fits && "over" }, `${count}${fits ? "" : " · too long"}`))));
}

/** One request; adds its time to *times*, by the names of `server-timing`. */
async function embedSome(id, input, outputs, times) {
  const began = performance.now();
  const response = await request("v1/embeddings", { body: {
    model: id, input, output_type: outputs, encoding_format: "base64",
    truncate: byId("truncate").checked ? "end" : undefined,
  } });
  const { data } = await response.json();
  let elsewhere = performance.now() - began;
  for (const [, name, ms] of response.headers.get("server-timing").matchAll(/(\w+);dur=([\d.]+)/g)) {
    times[name] = (times[name] ?? 0) + Number(ms);
    elsewhere -= Number(ms);
  }
  times["network and page"] = (times["network and page"] ?? 0) + Math.max(0, elsewhere);
  return data.map(readItem);
}

async function embed() {
  const texts = readTexts().slice(0, TEXTS_MAX);
  if (!texts.length) throw new Error("Write at least one text.");
  const [progress, times] = [byId("progress"), {}];
  const { id, output_types: types } = model(); // another may be chosen meanwhile
  const outputs = types.filter((name) => name in SIMILARITY);
  try {
    progress.max = texts.length;
    progress.value = 0;
    progress.hidden = texts.length <= SHOWN;
    const tokens = (await tokenize(id, texts.slice(0, SHOWN))).data;
    const items = await embedSome(id, texts.slice(0, SHOWN), outputs, times);
    while (items.length < texts.length) {
      progress.value = items.length;
      items.push(...(await embedSome(id, texts.slice(items.length, items.length + CHUNK), ["dense"], times)));
    }
    Object.assign(state, { id, texts, items, tokens, outputs, pair: [0, Math.min(1, texts.length - 1)] });
  } finally {
    progress.hidden = true;
  }
  const kinds = outputs.length > 1 ? [...outputs, "fused"] : outputs;
  state.weights = Object.fromEntries(outputs.map((name) => [name, WEIGHTS[name]]));
  if (!kinds.includes(state.kind)) state.kind = kinds[0];
  choices("kinds", kinds, state.kind, (kind) => showSimilarity((state.kind = kind)));
  refill("weights", outputs.map((name) => make("label", {}, name, make("input", {
    type: "range", min: 0, max: 1, step: 0.05, value: state.weights[name],
    oninput: ({ target }) => showSimilarity((state.weights[name] = Number(target.value))),
  }))));
  part("timing").replaceChildren(...timingBar(Object.entries(times)));
  showSimilarity();
  showSparse();
  reveal("hint", false);
  ["timing", "similarity", "code"].forEach((id) => reveal(id));
  reveal("map", texts.length > 2);
  if (texts.length > 2) showMap();
  showCode();
}

function showSimilarity() {
  const shown = state.items.slice(0, SHOWN);
  reveal("weights", state.kind === "fused");
  const matrix = similarities(shown, state.kind, state.weights);
  byId("heat").replaceChildren(heatMap(state.texts.slice(0, SHOWN), matrix, { kind: state.kind, onPick: (i, j) => {
    state.pair = [i, j];
    showPair(matrix);
  } }));
  showPair(matrix);
}

function showPair(matrix) {
  const [i, j] = state.pair;
  const name = (k) => make("bdi", {}, `${k + 1} “${shorten(state.texts[k], 60)}”`);
  byId("pair").replaceChildren(`${matrix[i][j].toFixed(4)} is `, name(i), " with ", name(j));
  reveal("alignment", state.outputs.includes("multi"));
  if (!state.outputs.includes("multi")) return;
  const [query, passage] = [i, j].map((k) => state.items[k].multi);
  const [asking, met] = [i, j].map((k) => state.tokens[k].tokens.slice(1, 1 + state.items[k].multi.length));
  part("alignment").replaceChildren(alignment(asking, met, matches(query, passage)));
}

function showSparse() {
  reveal("sparse", state.outputs.includes("sparse"));
  if (!state.outputs.includes("sparse")) return;
  const shown = state.items.slice(0, SHOWN);
  const most = Math.max(...shown.flatMap(({ sparse }) => [...sparse.values()]), 1e-9);
  part("sparse").replaceChildren(...state.tokens.map(({ tokens, token_ids: ids }, i) =>
    make("li", {}, make("p", { class: "tokens", dir: "auto" }, tokens.slice(0, 200).map((token, k) => {
      const weight = shown[i].sparse.get(ids[k]) ?? 0;
      return chip(token, { weight: weight / most, label: weight ? weight.toFixed(2) : "" });
    })))));
}

function showMap() {
  const points = pca(state.items.map(({ dense }) => dense));
  byId("map").querySelector(".note").textContent =
    `${number(points.length)} dense vectors on the plane along which they differ most (PCA). ` +
    "Point at one, or use the arrow keys.";
  part("map").replaceChildren(scatter(points, state.texts, part("map").clientWidth));
}

async function rerank() {
  const [query, documents] = [byId("query").value, readTexts().slice(0, SHOWN)];
  const body = { model: byId("reranker").value, query, documents };
  const [{ data, results = data }, [asked, ...items]] = await Promise.all(
    [call("v1/rerank", { body }), embedSome(model().id, [query, ...documents], ["dense"], {})]);
  const cosines = items.map((item, i) => [i, SIMILARITY.dense(asked, item)]);
  part("rerank").replaceChildren(...[
    ["By the reranker", "fused", results.map(({ index, relevance_score: score }) => [index, score])],
    ["By the embeddings", "dense", cosines.sort((a, b) => b[1] - a[1])],
  ].map(([caption, kind, ranked]) => barTable(caption, ranked.map(([i, score]) =>
    ({ name: `${i + 1} ${documents[i]}`, value: score, text: score.toFixed(3), kind })))));
}

/** The request as each language writes it. A key is never among it. */
const CODE = {
  curl: (url, body) => `curl ${url}/embeddings \\
  -H "Authorization: Bearer $TRIVEC_API_KEY" -H "Content-Type: application/json" \\
  -d '${JSON.stringify(body, null, 2).replaceAll("'", "'\\''")}'`,
  Python: (url, { model: id, input, output_type: outputs }) => `import os
from openai import OpenAI

client = OpenAI(base_url="${url}", api_key=os.environ["TRIVEC_API_KEY"])
answer = client.embeddings.create(
    model=${JSON.stringify(id)},
    input=${JSON.stringify(input, null, 4).replaceAll("\n", "\n    ")},
    extra_body={"output_type": ${JSON.stringify(outputs)}},
)
print(answer.data[0])`,
  JavaScript: (url, body) => `const response = await fetch("${url}/embeddings", {
  method: "POST",
  headers: {
    authorization: \`Bearer \${process.env.TRIVEC_API_KEY}\`,
    "content-type": "application/json",
  },
  body: JSON.stringify(${JSON.stringify(body, null, 2).replaceAll("\n", "\n  ")}),
});
console.log(await response.json());`,
};

function showCode() {
  const code = byId("code").querySelector("code");
  const write = (language) => {
    state.language = language;
    const body = { model: state.id, input: state.texts.slice(0, SHOWN), output_type: state.outputs };
    code.textContent = CODE[language](new URL("v1", document.baseURI).href, body);
  };
  choices("languages", Object.keys(CODE), state.language, write);
  write(state.language);
}

byId("texts").value = EXAMPLE;
byId("languages").after(copyButton(() => byId("code").querySelector("code").textContent));
byId("texts").addEventListener("input", debounce(() => attempt(showTokens), 300));
byId("model").addEventListener("change", () => attempt(showModel));
byId("file").addEventListener("change", async ({ target }) => {
  byId("texts").value = await target.files[0].text();
  attempt(showTokens);
});
byId("setup").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(embed, byId("embed"));
});
byId("setup").addEventListener("keydown", ({ ctrlKey, metaKey, key }) => {
  if (key === "Enter" && (ctrlKey || metaKey)) byId("setup").requestSubmit();
});
byId("rerank").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(rerank, byId("rerank").querySelector("button"));
});
start("Playground", connect);
