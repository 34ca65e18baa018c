// A pane: one language model with its parameters, its output and speed, and the call as code.

import { stream } from "./api.js";
import { codeOf } from "./code.js";
import { fieldOf } from "./form.js";
import { Output, tokensOf } from "./output.js";
import { indented, SchemaField } from "./schema.js";

const ALTERNATIVES = 5;
// The page shows tool calls and runs none.
const NOT_RUN = "The user has not run this function.";

function addCall(calls, { index, id, function: { name, arguments: piece } }) {
  calls[index] ??= { id, type: "function", function: { name, arguments: "" } };
  calls[index].function.arguments += piece ?? "";
}

export class Pane {
  constructor(number, settings, onChange) {
    this.section = document.querySelector("#pane").content.firstElementChild.cloneNode(true);
    this.number = number;
    this.values = { ...settings };
    this.history = [];
    this.onChange = onChange;
    const find = (selector) => this.section.querySelector(selector);
    this.section.setAttribute("aria-label", `Answer ${number}`);
    find(".output").setAttribute("aria-label", `Text ${number}`);
    this.output = new Output(find(".output"), find(".token"));
    this.model = find(".model");
    this.alternatives = find(".alternatives");
    this.fields = find(".fields");
    this.error = find(".error");
    this.schema = new SchemaField(find(".schema"), find(".schema-error"), () => this.showCode());
    this.counters = find(".counters");
    this.language = "curl";
    this.model.addEventListener("change", () => onChange(this));
    this.alternatives.addEventListener("change", () => this.showCode());
    find(".code").addEventListener("toggle", () => this.showCode());
    for (const button of this.section.querySelectorAll("[data-language]")) {
      button.addEventListener("click", () => this.#selectLanguage(button));
    }
    find(".copy").addEventListener("click", (event) => this.#copy(event.target));
  }

  setModels(models, selected) {
    this.model.replaceChildren(...models.map((model) => {
      const notes = [...(model.parent ? [`adapter of ${model.parent}`] : []), ...(model.state === "ready" ? [] : [model.state])];
      const name = notes.length ? `${model.id} (${notes.join(", ")})` : model.id;
      return new Option(name, model.id, false, model.id === selected);
    }));
  }

  setParameters(parameters) {
    const known = new Set(parameters.map(({ key }) => key));
    for (const key of Object.keys(this.values)) if (!known.has(key)) delete this.values[key];
    this.fields.replaceChildren(...parameters.map((parameter) =>
      fieldOf(parameter, this.values[parameter.key], (key, value) => this.#set(key, value))));
    this.#showChanged();
  }

  #set(key, value) {
    if (value === undefined) delete this.values[key];
    else this.values[key] = value;
    this.#showChanged();
    this.showCode();
  }

  #showChanged() {
    const text = Object.entries(this.values).map(([key, value]) => `${key} ${JSON.stringify(value)}`).join(", ");
    this.section.querySelector(".changed").textContent = text;
  }

  // The request body for the page's mode and prompt; the code shows the same body.
  body({ mode, prompt, system, seed }) {
    const schema = this.schema.value;
    const format = schema === undefined ? {} : { response_format: { type: "json_schema", json_schema: { name: "answer", schema } } };
    const shared = seed === undefined ? {} : { seed };
    const body = { model: this.model.value, ...shared, ...this.values, ...format, stream: true, stream_options: { include_usage: true } };
    if (mode === "complete") return { ...body, prompt, ...(this.alternatives.checked ? { logprobs: ALTERNATIVES } : {}) };
    const start = system ? [{ role: "system", content: system }] : [];
    const messages = [...start, ...this.history, { role: "user", content: prompt }];
    return { ...body, messages, ...(this.alternatives.checked ? { logprobs: true, top_logprobs: ALTERNATIVES } : {}) };
  }

  // Shows the code of the last call, or of the call that the current input would make.
  showCode(input = this.lastInput, body = input && this.body(input)) {
    this.lastInput = input;
    if (!input || !this.section.querySelector(".code").open) return;
    const path = input.mode === "chat" ? "chat/completions" : "completions";
    this.section.querySelector("pre").textContent = codeOf(this.language, path, body, Boolean(input.key));
  }

  // A completion needs max_tokens to end; a chat's answer ends by itself.
  setMode(mode, maxTokens) {
    if (mode === "complete") this.values.max_tokens ??= maxTokens;
    else if (this.values.max_tokens === maxTokens) delete this.values.max_tokens;
  }

  #selectLanguage(button) {
    this.language = button.dataset.language;
    for (const other of this.section.querySelectorAll("[data-language]")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    this.showCode();
  }

  async #copy(button) {
    const code = this.section.querySelector("pre");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      // Without clipboard permission, select the text so that the user can copy it.
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  clear() {
    this.history = [];
    this.output.clear();
    this.showError("");
    this.schema.check();
    this.showCounters({});
  }

  // Runs the request until its stream ends or the signal aborts it; shows errors in the pane.
  async run(input, signal) {
    this.showError("");
    if (!this.schema.check()) {
      this.showError("The schema is not valid.");
      return;
    }
    const body = this.body(input);
    this.section.setAttribute("aria-busy", "true");
    if (input.mode === "chat") this.output.addMessage("user", input.prompt);
    else this.output.clear();
    this.output.begin(input.mode === "chat" ? "assistant" : "");
    try {
      await this.#read(input, body, signal);
    } catch (error) {
      if (error.name !== "AbortError") this.showError(error.message, error.param, error.status);
      if (error.param?.startsWith("response_format")) this.schema.showError(error.message);
    } finally {
      this.section.removeAttribute("aria-busy");
      this.showCode(input, body);
    }
  }

  async #read(input, body, signal) {
    const started = performance.now();
    let first = null, chunks = 0, usage = null, reasons = [];
    const calls = [], texts = [];
    const path = input.mode === "chat" ? "v1/chat/completions" : "v1/completions";
    try {
      for await (const chunk of stream(path, body, input.key, signal)) {
        usage = chunk.usage ?? usage;
        for (const choice of chunk.choices) {
          const piece = choice.text ?? choice.delta?.content ?? "";
          const { reasoning_content: reasoning, tool_calls: parts } = choice.delta ?? {};
          if (piece || reasoning || parts) {
            first ??= performance.now();
            chunks += 1;
          }
          texts[choice.index] = (texts[choice.index] ?? "") + piece;
          if (reasoning) this.output.addReasoning(choice.index, reasoning);
          if (choice.finish_reason) reasons.push(choice.finish_reason);
          this.output.add(choice.index, piece, parts ? null : tokensOf(choice));
          for (const part of parts ?? []) {
            this.output.addCall(choice.index, part);
            if (choice.index === 0) addCall(calls, part);
          }
        }
        this.showCounters({ started, first, chunks, usage, reasons });
      }
    } catch (error) {
      if (error.name === "AbortError") reasons = ["stopped"];
      throw error;
    } finally {
      this.showCounters({ started, first, chunks, usage, reasons });
      if (body.response_format) this.#showAnswers(texts, reasons);
      const text = texts[0] ?? "";
      if (input.mode === "chat" && (text || calls.length)) {
        const answer = { role: "assistant", content: text, ...(calls.length ? { tool_calls: calls } : {}) };
        this.history.push({ role: "user", content: input.prompt }, answer);
        for (const { id } of calls) this.history.push({ role: "tool", tool_call_id: id, content: NOT_RUN });
      }
    }
  }

  // Shows answers that are whole JSON with line breaks, and says why one is not whole.
  #showAnswers(texts, reasons) {
    texts.forEach((text, index) => {
      const pretty = indented(text);
      if (pretty !== null) this.output.replace(index, pretty);
    });
    if (reasons.includes("length")) this.schema.showError("The answer ended by length, before it was complete: raise max_tokens.");
  }

  showError(message, param = null, status = 0) {
    const hint = { 401: " – enter your key in the field above", 429: " – wait a moment" }[status] ?? "";
    this.error.textContent = message && `${message}${hint}`;
    // The path of a part of a field, such as tools[0], marks the field.
    const field = param?.split(/[.[]/)[0];
    for (const input of this.fields.querySelectorAll("[name]")) {
      input.toggleAttribute("aria-invalid", Boolean(field) && input.name === field);
      if (field && input.name === field) this.section.querySelector(".parameters").open = true;
    }
  }

  showCounters({ started, first, chunks, usage, reasons = [] }) {
    const counters = {};
    if (first) counters["first text"] = `${((first - started) / 1000).toFixed(2)} s`;
    if (usage) {
      const seconds = (performance.now() - started) / 1000;
      counters.tokens = `${usage.prompt_tokens} in, ${usage.completion_tokens} out`;
      counters.speed = `${(usage.completion_tokens / seconds).toFixed(0)} tokens/s`;
      const cached = usage.prompt_tokens_details?.cached_tokens;
      if (cached) counters.cached = `${cached} tokens`;
    } else if (chunks) counters.chunks = String(chunks);
    if (reasons.length) counters.ended = [...new Set(reasons)].join(", ");
    this.counters.replaceChildren(...Object.entries(counters).map(([name, text]) => {
      const pair = document.createElement("div");
      const key = document.createElement("dt");
      const value = document.createElement("dd");
      key.textContent = name;
      value.textContent = text;
      pair.append(key, " ", value);
      return pair;
    }));
  }
}
