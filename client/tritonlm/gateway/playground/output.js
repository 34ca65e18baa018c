// The output on the page: text, or tokens coloured by probability, with the alternatives of the selected token.

const SHADES = 5;

export class Output {
  constructor(box, details) {
    this.box = box;
    this.details = details;
    this.answers = new Map();
    box.addEventListener("keydown", (event) => this.#moveFocus(event));
  }

  clear() {
    this.box.replaceChildren();
    this.details.textContent = "";
    this.answers.clear();
  }

  // Appends a message of a chat.
  addMessage(role, text) {
    const line = document.createElement("p");
    line.className = `message ${role}`;
    line.append(roleLabel(role), text);
    this.box.append(line);
    this.#scrollToEnd();
  }

  begin(role) {
    this.answers.clear();
    this.role = role;
  }

  add(index, text, tokens) {
    const line = this.answers.get(index) ?? this.#answer(index);
    let rest = text;
    for (const token of tokens ?? []) {
      // The end-of-text token and parts of a character have a probability but no text.
      if (!rest.startsWith(token.text)) continue;
      line.append(this.#token(token));
      rest = rest.slice(token.text.length);
    }
    line.append(rest);
    this.#scrollToEnd();
  }

  // Replaces the text of a complete answer; tokens with probabilities stay as they are.
  replace(index, text) {
    const line = this.answers.get(index);
    if (!line || line.querySelector(".t")) return;
    for (const node of [...line.childNodes]) if (node.nodeType === Node.TEXT_NODE) node.remove();
    line.append(text);
    line.classList.add("json");
    this.#scrollToEnd();
  }

  // Shows what the model thinks before its answer.
  addReasoning(index, text) {
    const line = this.answers.get(index) ?? this.#answer(index);
    if (!line.reasoning) {
      line.reasoning = document.createElement("span");
      line.reasoning.className = "reasoning";
      line.append(line.reasoning);
    }
    line.reasoning.append(text);
    this.#scrollToEnd();
  }

  // Shows a part of a tool call: the first has the function's name, and all have pieces of its arguments.
  addCall(index, { index: number, function: { name, arguments: piece } }) {
    const line = this.answers.get(index) ?? this.#answer(index);
    line.calls ??= new Map();
    if (!line.calls.has(number)) {
      const card = document.createElement("code");
      card.className = "call";
      const title = document.createElement("b");
      title.textContent = name;
      card.append(title);
      line.calls.set(number, card);
      line.append(card);
    }
    line.calls.get(number).append(piece ?? "");
    this.#scrollToEnd();
  }

  #answer(index) {
    const line = document.createElement("p");
    line.className = "message answer";
    if (this.role) line.append(roleLabel(this.role));
    else if (index > 0 || this.answers.size) line.append(roleLabel(`choice ${index + 1}`));
    this.answers.set(index, line);
    this.box.append(line);
    return line;
  }

  #scrollToEnd() {
    this.box.scrollTop = this.box.scrollHeight;
  }

  #token({ text, logprob, top }) {
    const piece = document.createElement("span");
    const probability = logprob === null ? 1 : Math.exp(logprob);
    piece.className = `t p${Math.min(SHADES - 1, Math.floor(probability * SHADES))}`;
    piece.textContent = text;
    piece.tabIndex = -1;
    const others = top.map(([other, value]) => `${quoted(other)} ${percent(Math.exp(value))}`).join("  ·  ");
    const own = logprob === null ? "(prompt)" : percent(probability);
    const description = `${quoted(text)} ${own}${others ? `, of: ${others}` : ""}`;
    piece.title = description;
    const show = () => { this.details.textContent = description; };
    piece.addEventListener("mouseenter", show);
    piece.addEventListener("focus", show);
    return piece;
  }

  // The arrow keys move from token to token.
  #moveFocus(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1 };
    if (!(event.key in steps)) return;
    const tokens = [...this.box.querySelectorAll(".t")];
    if (!tokens.length) return;
    event.preventDefault();
    const index = tokens.indexOf(document.activeElement) + steps[event.key];
    tokens[Math.max(0, Math.min(tokens.length - 1, index))].focus();
  }
}

function roleLabel(role) {
  const label = document.createElement("b");
  label.textContent = role;
  return label;
}

function quoted(text) {
  return `“${text.replaceAll("\n", "⏎")}”`;
}

function percent(probability) {
  return `${(probability * 100).toFixed(probability < 0.1 ? 1 : 0)} %`;
}

// Converts the log-probabilities of completions and of chats to one format.
export function tokensOf(choice) {
  const logprobs = choice.logprobs;
  if (!logprobs) return null;
  if (logprobs.content) {
    return logprobs.content.map((entry) => ({
      text: entry.token,
      logprob: entry.logprob,
      top: entry.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return logprobs.tokens.map((text, index) => ({
    text,
    logprob: logprobs.token_logprobs[index],
    // JavaScript moves keys that are digits to the front, so sort again.
    top: Object.entries(logprobs.top_logprobs?.[index] ?? {}).sort(([, one], [, other]) => other - one),
  }));
}
