"""OpenAI's Responses API: create, read and delete responses, and count a prompt's tokens."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from tritonlm.client.responses_api.request import NAMES, ChatCall, chat_call, check_stream_options
from tritonlm.client.responses_api.schemas import InputTokensRequest, ResponseRequest
from tritonlm.client.responses_api.truncation import AUTO, fitting_call
from tritonlm.client.responses_api.types import DeletedResponse, InputTokens, ItemList, ResponseObject
from tritonlm.client.responses_api.writer import ResponseWriter
from tritonlm.contract import InvalidRequest, ModelNotFound, NotOffered

from ..chat_calls import count_tokens, with_names
from ..http.errors import RESPONSES, body_of
from ..http.middleware import context_of
from ..http_responses import ResponseFormat, named_events, respond
from ..response_store import ResponseStore
from ..services import Services, ServicesParameter
from .openai import STREAMED, common_arguments

router = APIRouter(prefix="/v1/responses", tags=["OpenAI"], responses=RESPONSES)


@router.post("", responses={200: {"model": ResponseObject, **STREAMED}})
async def create(
    body: ResponseRequest,  # type: ignore[valid-type]
    request: Request,
    services: ServicesParameter,
) -> Response:
    """Answer items with items, through the checkpoint's chat template. With `stream`, server-sent events."""
    sent = body.arguments()  # type: ignore[attr-defined]
    check_stream_options(sent)
    owner, is_stored = context_of(request.scope).caller, _is_stored(services, sent)
    call = await _chat_call(services, owner, sent)
    writer = ResponseWriter(sent, call, is_stored)

    async def finish() -> None:
        if is_stored:
            await asyncio.to_thread(_store(services).put, owner, call.items, writer.response)

    response_format = ResponseFormat(
        complete=lambda chat, _: json.dumps(writer.whole(chat)),
        begin=lambda _: named_events(writer.begin()),
        chunk=lambda chunk: named_events(writer.chunk(chunk)),
        end=lambda context: named_events(writer.end(context.usage)),
        failure=lambda error: named_events(writer.failure(error, body_of(error))),
        finish=finish,
        warnings=call.warnings,
    )
    common = common_arguments(request, services)

    async def create_chat() -> Any:
        return await with_names(services.client.chat.completions.create(**call.arguments, **common), NAMES)

    return await respond(request, sent["model"], f"chatcmpl-{common['request_id']}", create_chat, response_format)


@router.post("/input_tokens")
async def count(body: InputTokensRequest, request: Request, services: ServicesParameter) -> InputTokens:
    """The number of tokens of a prompt, with its chat template."""
    sent = body.arguments()
    call = await _chat_call(services, context_of(request.scope).caller, sent)
    return InputTokens(input_tokens=await count_tokens(services, call.arguments, NAMES))


@router.get("/{response_id}")
async def retrieve(
    response_id: str, request: Request, services: ServicesParameter, stream: bool | None = None
) -> ResponseObject:
    """A stored response; 501 where this server stores none."""
    if stream:
        # OpenAI's library reads events then, and would find none in the object.
        raise InvalidRequest("stream: a stored response has no events; leave stream out", "stream")
    stored = await asyncio.to_thread(_store(services).get, context_of(request.scope).caller, response_id)
    return ResponseObject.model_validate(stored.response)


@router.delete("/{response_id}")
async def delete(response_id: str, request: Request, services: ServicesParameter) -> DeletedResponse:
    """Delete a stored response; those that continue it can no longer be continued."""
    await asyncio.to_thread(_store(services).delete, context_of(request.scope).caller, response_id)
    return DeletedResponse(id=response_id)


@router.get("/{response_id}/input_items")
async def input_items(
    response_id: str,
    request: Request,
    services: ServicesParameter,
    limit: int = Query(20, ge=1, le=100),
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> ItemList:
    """The items that a stored response answered, the newest first."""
    stored = await asyncio.to_thread(_store(services).get, context_of(request.scope).caller, response_id)
    # Null is "not sent", as everywhere: a reader asks for the next page by the last item's id.
    items = [{**item, "id": item.get("id") or f"item_{index}"} for index, item in enumerate(stored.items)]
    items = items if order == "asc" else items[::-1]
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise ModelNotFound(f"there is no item {after[:64]!r}", "after")
    first = 0 if after is None else ids.index(after) + 1
    page = items[first : first + limit]
    return ItemList(
        data=page,
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=first + limit < len(items),
    )


def _store(services: Services) -> ResponseStore:
    if services.response_store is None:
        raise NotOffered("this server stores no responses; start it with --response-store FILE")
    return services.response_store


def _is_stored(services: Services, sent: dict[str, Any]) -> bool:
    """As with OpenAI a response is stored unless the caller declines, where this server stores any."""
    if sent.get("store") and services.response_store is None:
        raise InvalidRequest(
            "store: this server stores no responses; send store: false, or start it with --response-store FILE", "store"
        )
    return services.response_store is not None and sent.get("store", True)


async def _chat_call(services: Services, owner: str, sent: dict[str, Any]) -> ChatCall:
    """The chat of a request. Truncation needs token counts, and so the model; nothing else does."""
    history = await _history(services, owner, sent)
    # The errors of the items come first, from a thread: a long conversation takes a while.
    call = await asyncio.to_thread(chat_call, sent, history)
    if sent.get("truncation") != AUTO:
        return call
    chats = services.client.chat.completions
    fitting = services.loader.call(sent["model"], lambda: fitting_call(chats, sent, history))
    return await with_names(fitting, NAMES)


async def _history(services: Services, owner: str, sent: dict[str, Any]) -> list[dict[str, Any]]:
    previous = sent.get("previous_response_id")
    if previous is None:
        return []
    if services.response_store is None:
        raise InvalidRequest(
            "previous_response_id: this server stores no responses; send the whole conversation as input",
            "previous_response_id",
        )
    try:
        return await asyncio.to_thread(services.response_store.conversation, owner, previous)
    except ModelNotFound as error:
        raise InvalidRequest(f"previous_response_id: {error.message}", "previous_response_id") from None
