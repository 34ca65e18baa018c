// The page: a prompt, one pane or two, a key that lives as long as the tab, a theme.

import { getJson } from "./api.js";
import { parametersOf } from "./form.js";
import { Pane } from "./pane.js";

const find = (selector) => document.querySelector(selector);
const KEY = "tritonlm.key", THEME = "tritonlm.theme";
const TOKENS = 64;
const EXAMPLES = {
  complete: { abacus: "123+456=", "": "Once upon a time" },
  chat: { "": "Tell me a story about a fox and a lantern" },
};

const state = { description: null, models: [], panes: [], running: null, edited: false };

function ask() {
  return { mode: mode(), prompt: find("#prompt").value, system: find("#system").value, key: key() };
}

function mode() {
  return find("[name=mode]:checked").value;
}

function key() {
  return find("#key").value.trim();
}

function say(text) {
  find("#status").textContent = text;
}

// What the server has and takes; again whenever the key changes.
async function load() {
  try {
    const [models, description] = await Promise.all([getJson("v1/models", key()), getJson("openapi.json", key())]);
    state.models = models.data;
    state.description = description;
    say(state.models.length ? "" : "No language model is known to this server.");
  } catch (error) {
    say(error.status === 401 ? "This server wants an API key." : `${error.message}.`);
    return;
  }
  if (!state.panes.length) addPane();
  for (const pane of state.panes) furnish(pane, pane.model.value);
  suggest();
}

function addPane() {
  const first = state.panes[0];
  const pane = new Pane(state.panes.length + 1, first ? first.values : { max_tokens: TOKENS, temperature: 0 }, suggest);
  state.panes.push(pane);
  find("#panes").append(pane.section);
  const others = state.models.filter((model) => model.id !== first?.model.value);
  furnish(pane, first && others.length ? others[0].id : first?.model.value);
}

function furnish(pane, chosen) {
  pane.setModels(state.models, chosen);
  pane.setParameters(parametersOf(state.description, mode()));
  pane.showCode(ask());
}

// An example that the model is good at, until somebody has written a prompt.
function suggest() {
  if (!state.edited && state.panes.length) {
    const examples = EXAMPLES[mode()];
    find("#prompt").value = examples[state.panes[0].model.value] ?? examples[""];
  }
  for (const pane of state.panes) pane.showCode(ask());
}

function compare(wanted) {
  find("#compare").setAttribute("aria-pressed", String(wanted));
  find("#panes").classList.toggle("two", wanted);
  if (wanted && state.panes.length === 1) addPane();
  else if (!wanted) for (const pane of state.panes.splice(1)) pane.section.remove();
}

async function run() {
  if (state.running || !state.panes.length) return;
  const asked = ask();
  state.running = new AbortController();
  find("#run").disabled = true;
  find("#stop").disabled = false;
  say("Running …");
  const { signal } = state.running;
  await Promise.all(state.panes.map((pane) => pane.run(asked, signal)));
  const failed = state.panes.some((pane) => pane.error.textContent);
  say(signal.aborted ? "Stopped." : failed ? "Not done." : "Done.");
  state.running = null;
  find("#run").disabled = false;
  find("#stop").disabled = true;
  if (asked.mode === "chat" && !failed) {
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
    pane.useMode(mode(), TOKENS);
    if (state.description) furnish(pane, pane.model.value);
  }
  suggest();
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
find("#compare").addEventListener("click", (event) => compare(event.target.getAttribute("aria-pressed") !== "true"));
find("#prompt").addEventListener("input", () => {
  state.edited = true;
  for (const pane of state.panes) pane.showCode(ask());
});
find("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
find("#stop").addEventListener("click", stop);
find("#clear").addEventListener("click", () => {
  stop();
  for (const pane of state.panes) pane.clear();
  say("");
});
for (const radio of document.querySelectorAll("[name=mode]")) radio.addEventListener("change", setMode);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  if (event.key === "Escape") stop();
});

setTheme(localStorage.getItem(THEME));
load();
