// The API page where Swagger UI is shipped: it draws /openapi.json, and tries requests with the key.

import { KEY, start } from "./common.js";

start("API", () => {});
const scheme = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", scheme.matches);
scheme.addEventListener("change", follow);
follow();
const ui = SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger",
  validatorUrl: null, // else it asks a server of its makers
  defaultModelsExpandDepth: 0,
  docExpansion: "list",
  onComplete: () => ui.preauthorizeApiKey("key", sessionStorage.getItem(KEY) ?? ""),
});
