"""Chats on behalf of other APIs: their tokens, and their errors with the field names of the caller's API."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from tritonlm.client.chats import CHAT_ARGUMENTS
from tritonlm.contract import NotOffered, TritonLMError

from .services import Services

T = TypeVar("T")


async def with_names(chat: Awaitable[T], names: Mapping[str, str]) -> T:
    """The result of a chat. `names`: the chat's name of a field, and the caller's."""
    try:
        return await chat
    except NotOffered as error:
        if error.param not in (None, "messages"):
            raise renamed(error, names) from None
        raise NotOffered("this model has no chat template; use /v1/completions instead", error.param) from None
    except TritonLMError as error:
        raise renamed(error, names) from None


async def count_tokens(services: Services, chat: Mapping[str, Any], names: Mapping[str, str]) -> int:
    """The tokens of a chat's prompt. `chat`: the arguments of the chat."""
    client, model = services.client, chat["model"]
    prompt = {name: chat[name] for name in ("messages", *CHAT_ARGUMENTS) if name in chat}

    async def tokenize() -> list[int]:
        text = await client.chat.completions.apply_template(model, **prompt)
        return await client.tokenize(model, text, add_special_tokens=False)

    return len(await with_names(services.loader.call(model, tokenize), names))


def renamed(error: TritonLMError, names: Mapping[str, str]) -> TritonLMError:
    param = error.param or ""
    for name, own in names.items():
        if param == name or param.startswith((f"{name}[", f"{name}.")):
            result = type(error)(error.message.replace(name, own), param.replace(name, own, 1))
            result.retry_after, result.headers = error.retry_after, error.headers
            return result
    return error
