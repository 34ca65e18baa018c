// The page: a prompt, one or two panes, a theme, and an API key that is kept for the lifetime of the tab.

import { getJson } from "./api.js";
import { parametersOf } from "./form.js";
import { Pane } from "./pane.js";

const find = (selector) => document.querySelector(selector);
const KEY = "tritonlm.key", THEME = "tritonlm.theme";
const DEFAULT_MAX_TOKENS = 64;
const EXAMPLES = {
  complete: { abacus: "123+456=", "": "Once upon a time" },
  chat: { "": "Tell me a story about a fox and a lantern" },
};

const state = { description: null, models: [], panes: [], running: null, edited: false };

function readInput() {
  return { mode: mode(), prompt: find("#prompt").value, system: find("#system").value, key: key() };
}

function mode() {
  return find("[name=mode]:checked").value;
}

function key() {
  return find("#key").value.trim();
}

function showStatus(text) {
  find("#status").textContent = text;
}

// Loads the models and the API description; called again when the key changes.
async function load() {
  try {
    const [models, description] = await Promise.all([getJson("v1/models", key()), getJson("openapi.json", key())]);
    state.models = models.data;
    state.description = description;
    showStatus(state.models.length ? "" : "This server has no language model.");
  } catch (error) {
    showStatus(error.status === 401 ? "This server needs an API key." : `${error.message}.`);
    return;
  }
  if (!state.panes.length) addPane();
  for (const pane of state.panes) fillPane(pane, pane.model.value);
  suggestPrompt();
}

function addPane() {
  const first = state.panes[0];
  const pane = new Pane(state.panes.length + 1, first ? first.values : { max_tokens: DEFAULT_MAX_TOKENS, temperature: 0 }, suggestPrompt);
  state.panes.push(pane);
  find("#panes").append(pane.section);
  const others = state.models.filter((model) => model.id !== first?.model.value);
  fillPane(pane, first && others.length ? others[0].id : first?.model.value);
}

function fillPane(pane, selected) {
  pane.setModels(state.models, selected);
  pane.setParameters(parametersOf(state.description, mode()));
  pane.showCode(readInput());
}

// Shows an example prompt for the model, until the user has edited the prompt.
function suggestPrompt() {
  if (!state.edited && state.panes.length) {
    const examples = EXAMPLES[mode()];
    find("#prompt").value = examples[state.panes[0].model.value] ?? examples[""];
  }
  for (const pane of state.panes) pane.showCode(readInput());
}

function setCompare(enabled) {
  find("#compare").setAttribute("aria-pressed", String(enabled));
  find("#panes").classList.toggle("two", enabled);
  if (enabled && state.panes.length === 1) addPane();
  else if (!enabled) for (const pane of state.panes.splice(1)) pane.section.remove();
}

async function run() {
  if (state.running || !state.panes.length) return;
  // Compared models get the same seed, so that they differ by what they are.
  const input = { ...readInput(), ...(state.panes.length > 1 ? { seed: crypto.getRandomValues(new Uint32Array(1))[0] } : {}) };
  state.running = new AbortController();
  find("#run").disabled = true;
  find("#stop").disabled = false;
  showStatus("Running …");
  const { signal } = state.running;
  await Promise.all(state.panes.map((pane) => pane.run(input, signal)));
  const failed = state.panes.some((pane) => pane.error.textContent);
  showStatus(signal.aborted ? "Stopped." : failed ? "Failed." : "Done.");
  state.running = null;
  find("#run").disabled = false;
  find("#stop").disabled = true;
  if (input.mode === "chat" && !failed) {
    state.edited = true;
    find("#prompt").value = "";
  }
}

function stop() {
  state.running?.abort();
}

function setMode() {
  const chat = mode() === "chat";
  find("#system-line").hidden = !chat;
  find("#prompt-label").textContent = chat ? "Message" : "Prompt";
  for (const pane of state.panes) {
    pane.clear();
    pane.setMode(mode(), DEFAULT_MAX_TOKENS);
    if (state.description) fillPane(pane, pane.model.value);
  }
  suggestPrompt();
}

function setTheme(theme) {
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  find("#theme").textContent = dark ? "Light" : "Dark";
}

find("#key").value = sessionStorage.getItem(KEY) ?? "";
find("#key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, key());
  load();
});
find("#access").addEventListener("submit", (event) => event.preventDefault());
find("#theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem(THEME, next);
  setTheme(next);
});
find("#compare").addEventListener("click", (event) => setCompare(event.target.getAttribute("aria-pressed") !== "true"));
find("#prompt").addEventListener("input", () => {
  state.edited = true;
  for (const pane of state.panes) pane.showCode(readInput());
});
find("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
find("#stop").addEventListener("click", stop);
find("#clear").addEventListener("click", () => {
  stop();
  for (const pane of state.panes) pane.clear();
  showStatus("");
});
for (const radio of document.querySelectorAll("[name=mode]")) radio.addEventListener("change", setMode);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  if (event.key === "Escape") stop();
});

setTheme(localStorage.getItem(THEME));
load();
