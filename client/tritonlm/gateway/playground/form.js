// The parameters as form fields, generated from the API's OpenAPI document.

const FIRST = ["max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n"];
// The page sets these itself, or they do not work with a stream.
const HIDDEN = new Set([
  "model", "prompt", "messages", "stream", "stream_options", "suffix", "user", "best_of", "logprobs", "top_logprobs",
  "return_token_ids", "max_completion_tokens", "echo", "logprobs_start", "response_format", "guided_json",
]);

export function parametersOf(description, mode) {
  const path = mode === "chat" ? "/v1/chat/completions" : "/v1/completions";
  const { $ref } = description.paths[path].post.requestBody.content["application/json"].schema;
  const { properties } = description.components.schemas[$ref.split("/").pop()];
  const rank = (key) => (FIRST.includes(key) ? FIRST.indexOf(key) : FIRST.length);
  return Object.entries(properties)
    .filter(([key]) => !HIDDEN.has(key))
    .sort(([one], [other]) => rank(one) - rank(other))
    .map(([key, schema]) => ({ key, help: schema.description ?? "", schema: fieldSchema(schema) }));
}

// `null` means "not sent"; the field uses the first of the other alternatives.
function fieldSchema(schema) {
  const kinds = (schema.anyOf ?? [schema]).filter((kind) => kind.type !== "null");
  // Lists of objects, such as tools, are written as JSON.
  const { type, items } = kinds[0];
  if (type === "array" && items && (items.type ?? "object") === "object") return { ...kinds[0], type: "json" };
  // Of several forms of a value, objects are written as JSON, and lists of texts as lines.
  const forms = kinds.length === 1 ? kinds[0].anyOf : null;
  if (forms?.some((form) => form.type === "object")) return { ...kinds[0], type: "json" };
  return forms ? { ...kinds[0], type: "lines" } : kinds[0];
}

let fieldCount = 0;

export function fieldOf({ key, help, schema }, value, onChange) {
  const id = `field-${++fieldCount}`;
  const line = document.createElement("div");
  line.className = "field";
  const label = document.createElement("label");
  label.htmlFor = id;
  label.textContent = key;
  const input = inputOf(schema);
  input.id = id;
  input.name = key;
  input.setAttribute("aria-describedby", `${id}-help`);
  if (value !== undefined) input.value = formatValue(value, schema);
  input.addEventListener("input", () => onChange(key, readField(input, schema)));
  const helpText = document.createElement("small");
  helpText.id = `${id}-help`;
  helpText.textContent = help;
  line.append(label, input, helpText);
  return line;
}

function inputOf(schema) {
  if (schema.type === "boolean") {
    const select = document.createElement("select");
    for (const [value, text] of [["", "default"], ["true", "true"], ["false", "false"]]) {
      select.append(new Option(text, value));
    }
    return select;
  }
  if (["lines", "array", "object", "json"].includes(schema.type)) {
    const area = document.createElement("textarea");
    area.rows = 1;
    area.placeholder = { lines: "one per line", array: "1, 2, 3", object: '{"50256": -100}', json: "JSON" }[schema.type];
    return area;
  }
  const input = document.createElement("input");
  input.type = "text";
  input.inputMode = schema.type === "string" ? "text" : "decimal";
  input.autocomplete = "off";
  input.placeholder = "default";
  return input;
}

function formatValue(value, schema) {
  if (schema.type === "lines") return [value].flat().join("\n");
  if (schema.type === "array") return value.join(", ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

// A value that cannot be parsed is sent unchanged; the server's error message explains it.
function readField(input, schema) {
  const text = input.value;
  if (text.trim() === "") return undefined;
  if (schema.type === "lines") return text.split("\n").filter((line) => line !== "");
  if (schema.type === "boolean") return text === "true";
  if (schema.type === "array") return text.split(",").map((part) => numberOr(part.trim()));
  if (schema.type === "object" || schema.type === "json") {
    try {
      return JSON.parse(text);
    } catch {
      return text;
    }
  }
  return schema.type === "string" ? text : numberOr(text.trim());
}

function numberOr(text) {
  const number = Number(text);
  return text === "" || Number.isNaN(number) ? text : number;
}
