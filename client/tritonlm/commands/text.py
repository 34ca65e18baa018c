"""`tritonlm generate, complete, embed, chat`: text and vectors from a language model."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from tritonlm.client.sync import Client, Stream
from tritonlm.client.types import Completion
from tritonlm.contract import InvalidRequest

from .common import AsJson, Triton, connected, model_or_first, notes, print_json

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="the language model; default: the first ready one")
]
# Beside our own spelling that of an older system's command line.
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", "--max_tokens", help="tokens to generate at most")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default 1")]
TopP = Annotated[float | None, typer.Option(help="sample among the likeliest tokens of this total probability")]
TopK = Annotated[int | None, typer.Option("--top-k", "--top_k", help="sample among the k likeliest tokens")]
Seed = Annotated[int | None, typer.Option(help="same seed, same text")]
Stop = Annotated[list[str] | None, typer.Option(help="a text that ends the answer; may be repeated")]
_HELP = "/clear forgets the chat, /system TEXT sets the system message, /model NAME changes the model, /quit leaves"


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="the text to continue; without it, or with -, from standard input")
    ] = None,
    model: ModelOption = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    triton: Triton = None,
    as_json: AsJson = False,
    prompt_option: Annotated[str | None, typer.Option("--prompt", hidden=True)] = None,
) -> None:
    """Continue a text; the answer streams to standard output."""
    prompt = prompt_option if prompt is None else prompt
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    wanted: dict[str, Any] = {
        "prompt": text, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "seed": seed, "stop": stop or None,
    }  # fmt: skip
    with connected(triton) as client:
        name = model_or_first(client, model)
        if as_json:
            found = client.completions.create(name, **wanted)
            assert isinstance(found, Completion)
            print_json(found.to_dict())
            return
        with _stream(client.completions.create(name, **wanted, stream=True)) as stream:
            for chunk in stream:
                _write(chunk.choices[0].text)
        _write("\n")


def complete(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT…", help="without one: a line each from stdin"),
    ] = None,
    model: ModelOption = None,
    n: Annotated[int | None, typer.Option("-n", help="answers to each")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    echo: Annotated[bool, typer.Option("--echo", help="the prompt first")] = False,
    logprobs: Annotated[int | None, typer.Option(help="with --json: with so many alternatives")] = None,
    triton: Triton = None,
    as_json: AsJson = False,
) -> None:
    """Complete several texts together; one answer a line (line breaks as \\n), or OpenAI's object with --json."""
    wanted: dict[str, Any] = {
        "n": n, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed,
        "stop": stop or None, "echo": echo or None, "logprobs": logprobs,
    }  # fmt: skip
    texts = prompts or sys.stdin.read().splitlines()
    with connected(triton) as client:
        found = client.completions.create(model_or_first(client, model), texts, **wanted)
        assert isinstance(found, Completion)
        if as_json:
            print_json(found.to_dict())
            return
        for choice in found.choices:
            _write(choice.text.replace("\\", "\\\\").replace("\n", "\\n") + "\n")


def embed(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT…", help="without one: a line each from stdin")
    ] = None,
    model: ModelOption = None,
    triton: Triton = None,
    as_json: AsJson = False,
) -> None:
    """Turn texts into vectors: one JSON list a line, or OpenAI's object with --json."""
    with connected(triton) as client:
        found = client.embeddings.create(model_or_first(client, model), texts or sys.stdin.read().splitlines())
    if as_json:
        print_json(found.to_dict())
        return
    for item in found.data:
        print(json.dumps(item.embedding))


def chat(
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    triton: Triton = None,
) -> None:
    """Chat with a language model that has a chat template; /help tells the commands."""
    with connected(triton) as client:
        talk = _Talk(client, model_or_first(client, model), system)
        wanted = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        while (said := _ask()) is not None:
            if not said.strip():
                continue
            if said.startswith("/"):
                if not talk.obey(said):
                    return
                continue
            try:
                talk.answer(said, wanted)
            except InvalidRequest as error:
                # A message that does not fit must not end the chat.
                notes.print(error.message, style="red", highlight=False)


class _Talk:
    """A chat so far."""

    def __init__(self, client: Client, model: str, system: str | None) -> None:
        self._client, self._model, self._system = client, model, system
        self._said: list[dict[str, str]] = []

    def obey(self, command: str) -> bool:
        """A slash command; False when it ends the chat."""
        name, _, rest = command.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name == "/clear":
            self._said.clear()
        elif name == "/system":
            self._system = rest or None
        elif name == "/model" and rest:
            self._model = rest.strip()
        else:
            notes.print(_HELP, highlight=False)
        return True

    def answer(self, said: str, wanted: dict[str, Any]) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*system, *self._said, {"role": "user", "content": said}]
        parts = []
        with _stream(self._client.chat.completions.create(self._model, messages, **wanted, stream=True)) as stream:
            for chunk in stream:
                parts.append(chunk.choices[0].delta.content or "")
                _write(parts[-1])
        _write("\n")
        self._said = [*messages[len(system) :], {"role": "assistant", "content": "".join(parts)}]


def _ask() -> str | None:
    """The next line; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _stream(found: Any) -> Stream[Any]:
    assert isinstance(found, Stream)
    return found


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
