// Drives a running server with the official Node client, unchanged, and prints what it saw as JSON.
// Usage: node embeddings.mjs BASE_URL KEY MODEL

import OpenAI from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });

async function failure(call) {
  try {
    await call();
    return null;
  } catch (error) {
    return { name: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
}

const vectors = (answer) => answer.data.map((datum) => Array.from(datum.embedding));
const usual = await client.embeddings.create({ model, input: "hello" });
const floats = await client.embeddings.create({ model, input: "hello", encoding_format: "float" });
const several = await client.embeddings.create({ model, input: ["hello", "a"] });
const ids = await client.embeddings.create({ model, input: [5, 6, 7] });
const lists = await client.embeddings.create({ model, input: [[5, 6], [7]] });
const sparse = await client.embeddings.create({ model, input: "hello", output_type: "sparse" });
const models = await client.models.list();
const shown = await client.models.retrieve(model);
const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });

console.log(
  JSON.stringify({
    usual: vectors(usual),
    floats: vectors(floats),
    several: vectors(several),
    ids: vectors(ids),
    lists: vectors(lists),
    sparse: { embedding: vectors(sparse), sparse: sparse.data[0].sparse_embedding },
    usage: usual.usage,
    model: usual.model,
    models: models.data.map((one) => one.id),
    shown: shown.id,
    notFound: await failure(() => client.embeddings.create({ model: "nope", input: "a" })),
    badInput: await failure(() => client.embeddings.create({ model, input: ["a", ""] })),
    unauthorized: await failure(() => stranger.embeddings.create({ model, input: "a" })),
  }),
);
