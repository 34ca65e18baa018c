"""`tritonlm chat`: a chat in the terminal, with functions of a Python file as tools."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tritonlm.client.sync import Client
from tritonlm.client.types import ToolCallDelta
from tritonlm.contract import AdapterNotFound, InvalidRequest, ModelNotFound, QueueFull, QueueTimeout, TimedOut

from .common import MISUSED, Triton, connected, err_console, model_or_first
from .constraints import Choice, Grammar, Regex, Schema, read_constraint
from .text import MaxTokens, ModelOption, Seed, Temperature, stream_of, write
from .tool_functions import ToolFunctions

_HELP = "/clear: new chat, /system TEXT: set the system message, /model NAME: change the model, /quit: exit"
# Answers in a row that only call functions.
_MAX_ROUNDS = 8
_NOT_RUN = "The user has not run this function."


def chat(
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.py", help="a Python file whose functions the model may call; it is imported, so it runs"
        ),
    ] = None,
    run_tools: Annotated[
        bool, typer.Option("--run-tools", help="run the functions that the model calls, instead of only printing them")
    ] = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    schema: Schema = None,
    regex: Regex = None,
    choice: Choice = None,
    grammar: Grammar = None,
    triton: Triton = None,
) -> None:
    """Chat with a language model that has a chat template; /help lists the commands."""
    if run_tools and tools is None:
        err_console.print("--run-tools needs --tools FILE.py", style="red")
        raise typer.Exit(MISUSED)
    with connected(triton) as client:
        constraint = read_constraint(schema, regex, choice, grammar)
        functions = ToolFunctions.of(tools) if tools is not None else None
        session = ChatSession(client, model_or_first(client, model), system, functions, run_tools)
        parameters = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, **constraint.parameters}
        while (line := _read_line()) is not None:
            if not line.strip():
                continue
            if line.startswith("/"):
                if not session.run_command(line):
                    return
                continue
            try:
                with constraint.named():
                    session.send(line, parameters)
            except (InvalidRequest, QueueFull, QueueTimeout, TimedOut) as error:
                if isinstance(error, InvalidRequest) and constraint.concerns(error):
                    raise
                # An invalid message, for example one that is too long, or a busy server must not end the chat.
                err_console.print(error.message, style="red", highlight=False, markup=False)


class ChatSession:
    """The settings and messages of a chat."""

    def __init__(
        self, client: Client, model: str, system: str | None, functions: ToolFunctions | None, runs: bool
    ) -> None:
        self._client, self._model, self._system = client, model, system
        self._functions, self._runs = functions, runs
        self._messages: list[dict[str, Any]] = []

    def run_command(self, command: str) -> bool:
        """Run a slash command; return False when it ends the chat."""
        name, _, rest = command.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name == "/clear":
            self._messages.clear()
        elif name == "/system":
            self._system = rest or None
        elif name == "/model" and rest:
            self._change_model(rest.strip())
        else:
            err_console.print(_HELP, highlight=False)
        return True

    def _change_model(self, name: str) -> None:
        try:
            self._model = self._client.models.retrieve(name).id
        except (AdapterNotFound, InvalidRequest, ModelNotFound) as error:
            # A mistyped name must not end the chat at its next message.
            err_console.print(error.message, style="red", highlight=False, markup=False)

    def send(self, text: str, parameters: dict[str, Any]) -> None:
        messages = [*self._messages, {"role": "user", "content": text}]
        for _ in range(_MAX_ROUNDS):
            answer = self._answer(messages, parameters)
            messages.append(answer)
            messages += self._results(answer.get("tool_calls", ()))
            if not self._runs or "tool_calls" not in answer:
                break
        self._messages = messages

    def _answer(self, messages: Sequence[dict[str, Any]], parameters: dict[str, Any]) -> dict[str, Any]:
        """The assistant's next message, printed as it arrives."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        tools = {"tools": self._functions.definitions} if self._functions is not None else {}
        parts: list[str] = []
        calls: dict[int, dict[str, Any]] = {}
        chats = self._client.chat.completions
        with stream_of(chats.create(self._model, [*system, *messages], **parameters, **tools, stream=True)) as stream:
            for chunk in stream:
                delta = chunk.choices[0].delta
                if delta.reasoning_content:
                    err_console.print(delta.reasoning_content, end="", style="dim", markup=False, highlight=False)
                parts.append(delta.content or "")
                write(parts[-1])
                for call in delta.tool_calls or ():
                    _add(calls, call)
        write("\n")
        answer: dict[str, Any] = {"role": "assistant", "content": "".join(parts)}
        return {**answer, "tool_calls": list(calls.values())} if calls else answer

    def _results(self, calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Print the calls, run them if asked to, and return the messages with their results."""
        results = []
        for call in calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            assert self._functions is not None
            shown = self._functions.shown(name, arguments)
            write(f"{'calls' if self._runs else 'would call'} {shown}\n")
            content = self._functions.run(name, arguments) if self._runs else _NOT_RUN
            if self._runs:
                write(f"  → {content}\n")
            results.append({"role": "tool", "tool_call_id": call["id"], "content": content})
        return results


def _add(calls: dict[int, dict[str, Any]], delta: ToolCallDelta) -> None:
    function = {"name": delta.function.name, "arguments": ""}
    call = calls.setdefault(delta.index, {"id": delta.id, "type": "function", "function": function})
    call["function"]["arguments"] += delta.function.arguments


def _read_line() -> str | None:
    """The next line of input; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
