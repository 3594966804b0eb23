// Drives a running server with Vercel's AI SDK, unchanged, and prints what it saw as JSON.
// Usage: node ai_sdk.mjs ADDRESS KEY EMBEDDING_MODEL RERANKER

import { createCohere } from "@ai-sdk/cohere";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, embedMany, rerank } from "ai";

const [address, apiKey, model, reranker] = process.argv.slice(2);
const documents = ["a", "a bear of China", "hello"];
const cohere = createCohere({ baseURL: `${address}/v2`, apiKey });
const openai = createOpenAICompatible({ name: "trivec", baseURL: `${address}/v1`, apiKey });

const one = await embed({ model: openai.embeddingModel(model), value: "hello" });
const many = await embedMany({ model: openai.embeddingModel(model), values: ["hello", "a"] });
const byCohere = await embedMany({
  model: cohere.embeddingModel(model),
  values: ["hello", "a"],
});
const ranked = await rerank({
  model: cohere.reranking(reranker),
  query: "hello",
  documents,
  topN: 2,
});

console.log(
  JSON.stringify({
    one: one.embedding,
    many: many.embeddings,
    tokens: many.usage.tokens,
    byCohere: byCohere.embeddings,
    ranked: ranked.ranking.map(({ originalIndex, score }) => [originalIndex, score]),
  }),
);
