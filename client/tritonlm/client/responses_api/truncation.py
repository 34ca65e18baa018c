"""`truncation: "auto"`: the oldest items of a conversation are left out until its prompt fits into the context.

System and developer messages stay, and so does the last user message. What belongs together goes together: a user
message with the answers to it, a tool's call with its output. It does not know how tokens are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tritonlm.client.calls import ChatCompletions
from tritonlm.client.chats import prompt_arguments

from .items import CALLS, OUTPUTS, Item, as_items
from .request import ChatCall, chat_call

AUTO = "auto"


class _Cut(NamedTuple):
    """What stays: the user message at `start`, the items from `end` on, and all instructions."""

    start: int
    end: int

    def of(self, items: Sequence[Item]) -> list[Item]:
        return [
            item
            for index, item in enumerate(items)
            if index == self.start or index >= self.end or item.get("role") in ("system", "developer")
        ]


async def fitting_call(chats: ChatCompletions, sent: Mapping[str, Any], history: Sequence[Item] = ()) -> ChatCall:
    """The chat of a request. With `truncation: "auto"` as few of the oldest items as needed are left out."""
    call = chat_call(sent, history)
    if sent.get("truncation") != AUTO:
        return call
    items = [*history, *as_items(sent["input"])]
    room: int = await chats.context_length(sent["model"]) - sent.get("max_output_tokens", 1)

    async def fits(arguments: Mapping[str, Any]) -> bool:
        return bool(await chats.count_tokens(**prompt_arguments(arguments)) <= room)

    if await fits(call.arguments):
        return call
    cuts = _cuts(items)
    if not cuts:
        return call
    # The first cut that fits, by bisection; if none does, the shortest prompt is refused like any that is too long.
    low, high = 0, len(cuts) - 1
    while low < high:
        middle = (low + high) // 2
        if await fits(_shortened(sent, cuts[middle].of(items)).arguments):
            high = middle
        else:
            low = middle + 1
    kept = cuts[low].of(items)
    warning = f"truncation: {len(items) - len(kept)} of {len(items)} items are left out, the oldest ones"
    return replace(call, arguments=_shortened(sent, kept).arguments, warnings=[*call.warnings, warning])


def _shortened(sent: Mapping[str, Any], items: list[Item]) -> ChatCall:
    return chat_call({**sent, "input": items})


def _cuts(items: Sequence[Item]) -> list[_Cut]:
    """What may stay, the longest first: from a later user message on; after the last one, without its oldest calls."""
    # Before these positions every call has its output.
    whole = _whole_positions(items)
    messages = [index for index, item in enumerate(items) if item.get("role") == "user"]
    cuts = [_Cut(index, index + 1) for index in messages[1:] if index in whole]
    if messages and messages[-1] in whole:
        outputs = (index for index in range(messages[-1] + 1, len(items) - 1) if items[index].get("type") in OUTPUTS)
        cuts += [_Cut(messages[-1], index + 1) for index in outputs if index + 1 in whole]
    return cuts


def _whole_positions(items: Sequence[Item]) -> set[int]:
    positions, pending = {0}, 0
    for index, item in enumerate(items):
        kind = item.get("type")
        pending += (kind in CALLS) - (kind in OUTPUTS)
        if pending == 0:
            positions.add(index + 1)
    return positions
