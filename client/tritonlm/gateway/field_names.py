"""The errors of a chat with the field names of another API, which translates its requests into chats."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import TypeVar

from tritonlm.contract import NotOffered, TritonLMError

T = TypeVar("T")


async def with_names(chat: Awaitable[T], names: Mapping[str, str]) -> T:
    """The result of a chat. `names`: the chat's name of a field, and the caller's."""
    try:
        return await chat
    except NotOffered as error:
        raise NotOffered("this model has no chat template; use /v1/completions instead", error.param) from None
    except TritonLMError as error:
        raise renamed(error, names) from None


def renamed(error: TritonLMError, names: Mapping[str, str]) -> TritonLMError:
    param = error.param or ""
    for name, own in names.items():
        if param == name or param.startswith((f"{name}[", f"{name}.")):
            result = type(error)(error.message.replace(name, own), param.replace(name, own, 1))
            result.retry_after, result.headers = error.retry_after, error.headers
            return result
    return error
