// The field for a JSON schema of the answer. Its syntax is checked here; what it means, the server knows.

const NOT_A_SCHEMA = "A schema is an object, such as {\"type\": \"object\"}.";

export class SchemaField {
  constructor(area, message, onChange) {
    this.area = area;
    this.message = message;
    area.addEventListener("input", () => {
      this.showError(this.#read().error);
      onChange();
    });
  }

  // The schema; undefined if the field is empty or wrong.
  get value() {
    return this.#read().schema;
  }

  // Shows what is wrong with the text; whether it may be sent.
  check() {
    const { error } = this.#read();
    this.showError(error);
    return !error;
  }

  showError(text = "") {
    this.message.textContent = text;
    this.area.toggleAttribute("aria-invalid", text !== "");
  }

  #read() {
    const text = this.area.value.trim();
    if (!text) return {};
    try {
      const schema = JSON.parse(text);
      const isSchema = typeof schema === "boolean" || (schema !== null && typeof schema === "object" && !Array.isArray(schema));
      return isSchema ? { schema } : { error: NOT_A_SCHEMA };
    } catch (error) {
      return { error: `Not valid JSON: ${error.message}` };
    }
  }
}

// Valid JSON with line breaks and indentation, every literal as it was written; null for any other text.
export function indented(text) {
  try {
    JSON.parse(text);
  } catch {
    return null;
  }
  let result = "", depth = 0;
  for (const part of text.match(/"(?:[^"\\]|\\.)*"|[{}[\],:]|[^\s{}[\],:"]+/g)) {
    if (part === "{" || part === "[") result += part + newLine(++depth);
    else if (part === "}" || part === "]") {
      const empty = /[{[]\n *$/.test(result);
      result = (empty ? result.trimEnd() : result + newLine(depth - 1)) + part;
      depth -= 1;
    } else if (part === ",") result += part + newLine(depth);
    else result += part === ":" ? ": " : part;
  }
  return result;
}

function newLine(depth) {
  return `\n${"  ".repeat(depth)}`;
}
