// The API page where Swagger UI is not shipped: /openapi.json as a list of operations.

import { attempt, byId, call, make, start } from "./common.js";

/** The schema that *schema* refers to, or itself. */
const resolve = (document, schema) =>
  (schema.$ref ? schema.$ref.slice(2).split("/").reduce((tree, name) => tree[name], document) : schema);

/** A schema in a few words: `string or null`, `array of integer`, `EmbeddingsRequest`. */
function words(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" or ");
  if (schema.anyOf) return schema.anyOf.map(words).join(" or ");
  if (schema.type === "array") return `array of ${schema.items ? words(schema.items) : "anything"}`;
  return schema.type ?? "anything";
}

/** A definition list of *entries*; *item(key, value)* is a term and what it means. */
const list = (entries, item) => make("dl", { class: "card" }, Object.entries(entries).flatMap(([key, value]) => {
  const [term, meaning] = item(key, value);
  return [make("dt", {}, term), make("dd", {}, meaning)];
}));

function fields(document, content) {
  const schema = content?.["application/json"]?.schema;
  if (!schema) return make("p", { class: "note" }, "Not JSON.");
  const { properties = {}, required = [], description } = resolve(document, schema);
  return [make("p", { class: "note" }, `${words(schema)}. ${description ?? ""}`), list(properties, (name, one) => [
    [make("code", {}, name), required.includes(name) ? " *" : ""],
    [words(one), one.description ? ` · ${one.description}` : ""]])];
}

function operation(document, path, method, described) {
  const { summary, parameters = [], requestBody, responses, security } = described;
  const places = parameters.map(({ name, in: place }) => `${name} in the ${place}`);
  const notes = [security.length ? "asks for a key" : "open to anyone", ...places];
  const { 200: ok, ...errors } = responses;
  return make("details", {}, make("summary", {}, make("code", {}, `${method.toUpperCase()} ${path}`), ` · ${summary}`),
    make("p", { class: "note" }, notes.join("; ")),
    requestBody && [make("h2", {}, "Body"), fields(document, requestBody.content)],
    make("h2", {}, "Response"), fields(document, ok.content),
    make("h2", {}, "Errors"), list(errors, (status, { description }) => [status, description]));
}

start("API", () => attempt(async () => {
  const document = await call("openapi.json");
  byId("operations").replaceChildren(make("section", {}, Object.entries(document.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, described]) => operation(document, path, method, described)))));
}));
