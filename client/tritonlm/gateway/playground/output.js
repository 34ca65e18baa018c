// What came back, on the page: text, or tokens coloured by their probability, with the alternatives of the one looked at.

const SHADES = 5;

export class Output {
  constructor(box, told) {
    this.box = box;
    this.told = told;
    this.answers = new Map();
    box.addEventListener("keydown", (event) => this.#walk(event));
  }

  clear() {
    this.box.replaceChildren();
    this.told.textContent = "";
    this.answers.clear();
  }

  // One line of a chat, or what the answer begins with.
  say(role, text) {
    const line = document.createElement("p");
    line.className = `message ${role}`;
    line.append(mark(role), text);
    this.box.append(line);
    this.#follow();
  }

  begin(role) {
    this.answers.clear();
    this.role = role;
  }

  add(index, text, tokens) {
    const line = this.answers.get(index) ?? this.#answer(index);
    let rest = text;
    for (const token of tokens ?? []) {
      // An end of text, and parts of a character, have a probability and are no text.
      if (!rest.startsWith(token.text)) continue;
      line.append(this.#token(token));
      rest = rest.slice(token.text.length);
    }
    line.append(rest);
    this.#follow();
  }

  #answer(index) {
    const line = document.createElement("p");
    line.className = "message answer";
    if (this.role) line.append(mark(this.role));
    else if (index > 0 || this.answers.size) line.append(mark(`choice ${index + 1}`));
    this.answers.set(index, line);
    this.box.append(line);
    return line;
  }

  #follow() {
    this.box.scrollTop = this.box.scrollHeight;
  }

  #token({ text, logprob, top }) {
    const piece = document.createElement("span");
    const share = logprob === null ? 1 : Math.exp(logprob);
    piece.className = `t p${Math.min(SHADES - 1, Math.floor(share * SHADES))}`;
    piece.textContent = text;
    piece.tabIndex = -1;
    const others = top.map(([other, each]) => `${shown(other)} ${percent(Math.exp(each))}`).join("  ·  ");
    const said = `${shown(text)} ${logprob === null ? "(given)" : percent(share)}${others ? `, of: ${others}` : ""}`;
    piece.title = said;
    const tell = () => { this.told.textContent = said; };
    piece.addEventListener("mouseenter", tell);
    piece.addEventListener("focus", tell);
    return piece;
  }

  // The arrow keys go from token to token.
  #walk(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1 };
    if (!(event.key in steps)) return;
    const tokens = [...this.box.querySelectorAll(".t")];
    if (!tokens.length) return;
    event.preventDefault();
    const place = tokens.indexOf(document.activeElement) + steps[event.key];
    tokens[Math.max(0, Math.min(tokens.length - 1, place))].focus();
  }
}

function mark(role) {
  const who = document.createElement("b");
  who.textContent = role;
  return who;
}

function shown(text) {
  return `“${text.replaceAll("\n", "⏎")}”`;
}

function percent(share) {
  return `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
}

// Both kinds of log-probabilities that the API knows, as one.
export function tokensOf(choice) {
  const found = choice.logprobs;
  if (!found) return null;
  if (found.content) {
    return found.content.map((each) => ({
      text: each.token,
      logprob: each.logprob,
      top: each.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return found.tokens.map((text, place) => ({
    text,
    logprob: found.token_logprobs[place],
    // An object's keys that are digits come first, whatever their order was.
    top: Object.entries(found.top_logprobs?.[place] ?? {}).sort(([, one], [, other]) => other - one),
  }));
}
