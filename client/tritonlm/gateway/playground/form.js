// The parameters as fields, made from the API's own description, so that none is missing and none is explained twice.

const FIRST = ["max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n"];
// The page settles these itself, or they do not go with a stream.
const NOT_HERE = new Set([
  "model", "prompt", "messages", "stream", "stream_options", "suffix", "user", "best_of", "logprobs", "top_logprobs",
  "return_token_ids", "max_completion_tokens", "echo",
]);

export function parametersOf(description, mode) {
  const path = mode === "chat" ? "/v1/chat/completions" : "/v1/completions";
  const { $ref } = description.paths[path].post.requestBody.content["application/json"].schema;
  const { properties } = description.components.schemas[$ref.split("/").pop()];
  const rank = (key) => (FIRST.includes(key) ? FIRST.indexOf(key) : FIRST.length);
  return Object.entries(properties)
    .filter(([key]) => !NOT_HERE.has(key))
    .sort(([one], [other]) => rank(one) - rank(other))
    .map(([key, schema]) => ({ key, help: schema.description ?? "", schema: theKind(schema) }));
}

// `null` stands for "not sent" everywhere; what else it may be is the first of the others.
function theKind(schema) {
  const kinds = (schema.anyOf ?? [schema]).filter((kind) => kind.type !== "null");
  return kinds.length === 1 && kinds[0].anyOf ? { ...kinds[0], type: "lines" } : kinds[0];
}

let made = 0;

export function fieldOf({ key, help, schema }, value, changed) {
  const id = `field-${++made}`;
  const line = document.createElement("div");
  line.className = "field";
  const label = document.createElement("label");
  label.htmlFor = id;
  label.textContent = key;
  const input = inputOf(schema);
  input.id = id;
  input.name = key;
  input.setAttribute("aria-describedby", `${id}-help`);
  if (value !== undefined) input.value = written(value, schema);
  input.addEventListener("input", () => changed(key, readField(input, schema)));
  const told = document.createElement("small");
  told.id = `${id}-help`;
  told.textContent = help;
  line.append(label, input, told);
  return line;
}

function inputOf(schema) {
  if (schema.type === "boolean") {
    const select = document.createElement("select");
    for (const [value, text] of [["", "as by default"], ["true", "true"], ["false", "false"]]) {
      select.append(new Option(text, value));
    }
    return select;
  }
  if (schema.type === "lines" || schema.type === "array" || schema.type === "object") {
    const area = document.createElement("textarea");
    area.rows = 1;
    area.placeholder = { lines: "one in a line", array: "1, 2, 3", object: '{"50256": -100}' }[schema.type];
    return area;
  }
  const input = document.createElement("input");
  input.type = "text";
  input.inputMode = schema.type === "string" ? "text" : "decimal";
  input.autocomplete = "off";
  input.placeholder = "as by default";
  return input;
}

function written(value, schema) {
  if (schema.type === "lines") return [value].flat().join("\n");
  if (schema.type === "array") return value.join(", ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

// What cannot be read goes to the server as it is: it says best what is wrong with it.
function readField(input, schema) {
  const text = input.value;
  if (text.trim() === "") return undefined;
  if (schema.type === "lines") return text.split("\n").filter((line) => line !== "");
  if (schema.type === "boolean") return text === "true";
  if (schema.type === "array") return text.split(",").map((part) => numberOr(part.trim()));
  if (schema.type === "object") {
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
