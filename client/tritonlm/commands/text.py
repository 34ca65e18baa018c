"""`tritonlm generate, complete, embed`: text and vectors from a language model. `chat` has a module of its own."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from tritonlm.client.sync import Client, Stream
from tritonlm.client.types import Completion
from tritonlm.contract import TritonLMError

from .common import AsJson, Triton, connected, model_or_first, print_json
from .constraints import Choice, Grammar, Regex, Schema, read_constraint

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="the language model; default: the first ready one")
]
# Each option also has the spelling of an older system's command line.
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", "--max_tokens", help="maximum tokens to generate")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default 1")]
TopP = Annotated[float | None, typer.Option(help="sample from the most likely tokens with this total probability")]
TopK = Annotated[int | None, typer.Option("--top-k", "--top_k", help="sample from the k most likely tokens")]
Seed = Annotated[int | None, typer.Option(help="same seed, same text")]
Stop = Annotated[list[str] | None, typer.Option(help="a text at which the output ends; may be repeated")]


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
    schema: Schema = None,
    regex: Regex = None,
    choice: Choice = None,
    grammar: Grammar = None,
    triton: Triton = None,
    as_json: AsJson = False,
    prompt_option: Annotated[str | None, typer.Option("--prompt", hidden=True)] = None,
) -> None:
    """Continue a text; the output streams to standard output."""
    prompt = prompt_option if prompt is None else prompt
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    parameters: dict[str, Any] = {
        "prompt": text, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "seed": seed, "stop": stop or None,
    }  # fmt: skip
    with connected(triton) as client:
        constraint = read_constraint(schema, regex, choice, grammar)
        name = model_or_first(client, model)
        with constraint.named():
            reason = _generate(client, name, {**parameters, **constraint.parameters}, as_json)
        if constraint.source and reason == "length":
            raise TritonLMError(
                f"the output ended by length, before {constraint.source} was satisfied; raise --max-tokens"
            )


def _generate(client: Client, model: str, parameters: dict[str, Any], as_json: bool) -> str | None:
    """Print the text; the reason of its end."""
    if as_json:
        completion = client.completions.create(model, **parameters)
        assert isinstance(completion, Completion)
        print_json(completion.to_dict())
        return completion.choices[0].finish_reason
    reason = None
    with stream_of(client.completions.create(model, **parameters, stream=True)) as stream:
        for chunk in stream:
            write(chunk.choices[0].text)
            reason = chunk.choices[0].finish_reason
    write("\n")
    return reason


def complete(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT…", help="without one: a line each from stdin"),
    ] = None,
    model: ModelOption = None,
    n: Annotated[int | None, typer.Option("-n", help="completions per prompt")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    echo: Annotated[bool, typer.Option("--echo", help="include the prompt in the output")] = False,
    logprobs: Annotated[int | None, typer.Option(help="with --json: alternatives per token")] = None,
    triton: Triton = None,
    as_json: AsJson = False,
) -> None:
    """Complete several texts at once: one completion per line (line breaks as \\n), or OpenAI's object with --json."""
    parameters: dict[str, Any] = {
        "n": n, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed,
        "stop": stop or None, "echo": echo or None, "logprobs": logprobs,
    }  # fmt: skip
    texts = prompts or sys.stdin.read().splitlines()
    with connected(triton) as client:
        completion = client.completions.create(model_or_first(client, model), texts, **parameters)
        assert isinstance(completion, Completion)
        if as_json:
            print_json(completion.to_dict())
            return
        for choice in completion.choices:
            write(choice.text.replace("\\", "\\\\").replace("\n", "\\n") + "\n")


def embed(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT…", help="without one: a line each from stdin")
    ] = None,
    model: ModelOption = None,
    triton: Triton = None,
    as_json: AsJson = False,
) -> None:
    """Compute embeddings of texts: one JSON list per line, or OpenAI's object with --json.

    It needs a server with --enable-embeddings.
    """
    with connected(triton) as client:
        embeddings = client.embeddings.create(model_or_first(client, model), texts or sys.stdin.read().splitlines())
    if as_json:
        print_json(embeddings.to_dict())
        return
    for item in embeddings.data:
        print(json.dumps(item.embedding))


def stream_of(response: Any) -> Stream[Any]:
    assert isinstance(response, Stream)
    return response


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
