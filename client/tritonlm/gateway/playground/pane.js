// One language model with its settings, what it answered, how fast, and the call as a program.

import { stream } from "./api.js";
import { codeOf } from "./code.js";
import { fieldOf } from "./form.js";
import { Output, tokensOf } from "./output.js";

const ALTERNATIVES = 5;

export class Pane {
  constructor(number, settings, changed) {
    this.section = document.querySelector("#pane").content.firstElementChild.cloneNode(true);
    this.number = number;
    this.values = { ...settings };
    this.history = [];
    this.changed = changed;
    const find = (selector) => this.section.querySelector(selector);
    this.section.setAttribute("aria-label", `Answer ${number}`);
    find(".output").setAttribute("aria-label", `Text ${number}`);
    this.output = new Output(find(".output"), find(".token"));
    this.model = find(".model");
    this.alternatives = find(".alternatives");
    this.fields = find(".fields");
    this.error = find(".error");
    this.counters = find(".counters");
    this.language = "curl";
    this.model.addEventListener("change", () => changed(this));
    this.alternatives.addEventListener("change", () => this.showCode());
    find(".code").addEventListener("toggle", () => this.showCode());
    for (const button of this.section.querySelectorAll("[data-language]")) {
      button.addEventListener("click", () => this.#choose(button));
    }
    find(".copy").addEventListener("click", (event) => this.#copy(event.target));
  }

  setModels(models, chosen) {
    this.model.replaceChildren(...models.map((model) => {
      const name = model.state === "ready" ? model.id : `${model.id} (${model.state})`;
      return new Option(name, model.id, false, model.id === chosen);
    }));
  }

  setParameters(parameters) {
    const known = new Set(parameters.map(({ key }) => key));
    for (const key of Object.keys(this.values)) if (!known.has(key)) delete this.values[key];
    this.fields.replaceChildren(...parameters.map((parameter) =>
      fieldOf(parameter, this.values[parameter.key], (key, value) => this.#set(key, value))));
    this.#tellChanged();
  }

  #set(key, value) {
    if (value === undefined) delete this.values[key];
    else this.values[key] = value;
    this.#tellChanged();
    this.showCode();
  }

  #tellChanged() {
    const told = Object.entries(this.values).map(([key, value]) => `${key} ${JSON.stringify(value)}`).join(", ");
    this.section.querySelector(".changed").textContent = told;
  }

  // What is asked for, by the page's mode and prompt; the code is made of the same.
  body({ mode, prompt, system }) {
    const body = { model: this.model.value, ...this.values, stream: true, stream_options: { include_usage: true } };
    if (mode === "complete") return { ...body, prompt, ...(this.alternatives.checked ? { logprobs: ALTERNATIVES } : {}) };
    const start = system ? [{ role: "system", content: system }] : [];
    const messages = [...start, ...this.history, { role: "user", content: prompt }];
    return { ...body, messages, ...(this.alternatives.checked ? { logprobs: true, top_logprobs: ALTERNATIVES } : {}) };
  }

  // Of the call that was made last, or else of the one that would be made now.
  showCode(ask = this.lastAsk, body = ask && this.body(ask)) {
    this.lastAsk = ask;
    if (!ask || !this.section.querySelector(".code").open) return;
    const path = ask.mode === "chat" ? "chat/completions" : "completions";
    this.section.querySelector("pre").textContent = codeOf(this.language, path, body, Boolean(ask.key));
  }

  // A completion ends somewhere; a chat's answer ends by itself.
  useMode(mode, tokens) {
    if (mode === "complete") this.values.max_tokens ??= tokens;
    else if (this.values.max_tokens === tokens) delete this.values.max_tokens;
  }

  #choose(button) {
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
      // Without permission it is selected, ready to be copied.
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  clear() {
    this.history = [];
    this.output.clear();
    this.fail("");
    this.count({});
  }

  // Ends when the answer has, or the signal; what goes wrong is shown here.
  async run(ask, signal) {
    const body = this.body(ask);
    this.fail("");
    this.section.setAttribute("aria-busy", "true");
    if (ask.mode === "chat") this.output.say("user", ask.prompt);
    else this.output.clear();
    this.output.begin(ask.mode === "chat" ? "assistant" : "");
    try {
      await this.#read(ask, body, signal);
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error.message, error.param, error.status);
    } finally {
      this.section.removeAttribute("aria-busy");
      this.showCode(ask, body);
    }
  }

  async #read(ask, body, signal) {
    const began = performance.now();
    let first = null, chunks = 0, text = "", usage = null, reasons = [];
    const path = ask.mode === "chat" ? "v1/chat/completions" : "v1/completions";
    try {
      for await (const chunk of stream(path, body, ask.key, signal)) {
        usage = chunk.usage ?? usage;
        for (const choice of chunk.choices) {
          const piece = choice.text ?? choice.delta?.content ?? "";
          if (piece) {
            first ??= performance.now();
            chunks += 1;
          }
          if (choice.index === 0) text += piece;
          if (choice.finish_reason) reasons.push(choice.finish_reason);
          this.output.add(choice.index, piece, tokensOf(choice));
        }
        this.count({ began, first, chunks, usage, reasons });
      }
    } catch (error) {
      if (error.name === "AbortError") reasons = ["stopped"];
      throw error;
    } finally {
      this.count({ began, first, chunks, usage, reasons });
      if (ask.mode === "chat" && text) {
        this.history.push({ role: "user", content: ask.prompt }, { role: "assistant", content: text });
      }
    }
  }

  fail(message, param = null, status = 0) {
    const hint = { 401: " – put your key into the field above", 429: " – wait a moment" }[status] ?? "";
    this.error.textContent = message && `${message}${hint}`;
    for (const input of this.fields.querySelectorAll("[name]")) {
      input.toggleAttribute("aria-invalid", Boolean(param) && input.name === param);
      if (param && input.name === param) this.section.querySelector(".parameters").open = true;
    }
  }

  count({ began, first, chunks, usage, reasons = [] }) {
    const told = {};
    if (first) told["first text"] = `${((first - began) / 1000).toFixed(2)} s`;
    if (usage) {
      const seconds = (performance.now() - began) / 1000;
      told.tokens = `${usage.prompt_tokens} in, ${usage.completion_tokens} out`;
      told.speed = `${(usage.completion_tokens / seconds).toFixed(0)} tokens/s`;
      const cached = usage.prompt_tokens_details?.cached_tokens;
      if (cached) told.cached = `${cached} tokens`;
    } else if (chunks) told.chunks = String(chunks);
    if (reasons.length) told.ended = [...new Set(reasons)].join(", ");
    this.counters.replaceChildren(...Object.entries(told).map(([name, value]) => {
      const pair = document.createElement("div");
      const key = document.createElement("dt");
      const worth = document.createElement("dd");
      key.textContent = name;
      worth.textContent = value;
      pair.append(key, " ", worth);
      return pair;
    }));
  }
}
