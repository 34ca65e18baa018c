"""`tritonlm compare`: what several models answer to the same prompt with the same seed, one below the other."""

from __future__ import annotations

import secrets
import sys
from typing import Annotated, Any

import typer

from tritonlm.client.sync import Client
from tritonlm.client.types import ChatCompletion, Completion

from .common import AsJson, Triton, connected, console, print_json
from .text import MaxTokens, Seed, Stop, Temperature, TopK, TopP

_MAX_SEED = 2**31


def compare(
    prompt: Annotated[str, typer.Argument(help="the text to continue, or the message to answer; -: standard input")],
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL…", help="language models and adapters (NAME or LM:NAME)")
    ] = None,
    more: Annotated[
        list[str] | None, typer.Option("--models", metavar="MODEL", help="the same; may be repeated")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is a message to answer")] = False,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    triton: Triton = None,
    as_json: AsJson = False,
) -> None:
    """Compare models, such as a base and its adapters, on one prompt: --models BASE ADAPTER, with the same seed."""
    names = [*(more or []), *(models or [])]
    if len(names) < 2:
        raise typer.BadParameter("name at least two models to compare: --models A B")
    text = sys.stdin.read() if prompt == "-" else prompt
    # Without a seed each model would get one of its own.
    parameters: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "seed": secrets.randbelow(_MAX_SEED) if seed is None else seed, "stop": stop or None,
    }  # fmt: skip
    with connected(triton) as client:
        results = [_result(client, name, text, chat, parameters) for name in names]
    if as_json:
        print_json({"prompt": text, "seed": parameters["seed"], "results": [result.to_dict() for result in results]})
        return
    for name, result in zip(names, results, strict=True):
        console.rule(name, align="left")
        # Without rich's markup: a text may hold brackets.
        console.print(_text(result), markup=False, highlight=False)
    console.rule(f"seed {parameters['seed']}", align="left")


def _result(
    client: Client, model: str, text: str, chat: bool, parameters: dict[str, Any]
) -> Completion | ChatCompletion:
    if chat:
        answer = client.chat.completions.create(model, [{"role": "user", "content": text}], **parameters)
        assert isinstance(answer, ChatCompletion)
        return answer
    completion = client.completions.create(model, text, **parameters)
    assert isinstance(completion, Completion)
    return completion


def _text(result: Completion | ChatCompletion) -> str:
    if isinstance(result, ChatCompletion):
        return result.choices[0].message.content or ""
    return result.choices[0].text
