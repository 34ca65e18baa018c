"""Chats on behalf of other APIs: their tokens, and their errors with the field names of the caller's API."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from tritonlm.client.chats import prompt_arguments, renamed
from tritonlm.contract import NotOffered, TritonLMError

from .services import Services

T = TypeVar("T")


async def with_names(chat: Awaitable[T], names: Mapping[str, str]) -> T:
    """The result of a chat. `names`: the chat's name of a field, and the caller's."""
    try:
        return await chat
    except TritonLMError as error:
        if isinstance(error, NotOffered) and error.param == "messages":
            error = NotOffered("this model has no chat template; use /v1/completions instead", error.param)
        raise renamed(error, names) from None


async def count_tokens(services: Services, chat: Mapping[str, Any], names: Mapping[str, str]) -> int:
    """The tokens of a chat's prompt. `chat`: the arguments of the chat."""
    chats, prompt = services.client.chat.completions, prompt_arguments(chat)
    return await with_names(services.loader.call(chat["model"], lambda: chats.count_tokens(**prompt)), names)
