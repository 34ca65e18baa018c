"""What a parser returns: pieces of content and of reasoning, the begin of a tool call, pieces of its arguments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class CallStart:
    """The call of this index begins; calls do not overlap."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next characters of the arguments, which are JSON."""

    index: int
    text: str


Event = Content | Reasoning | CallStart | CallArguments


class Parser(Protocol):
    """Takes an answer as it arrives. The events are the same for every cut, but for where their texts are cut."""

    def feed(self, text: str) -> list[Event]: ...

    def flush(self) -> list[Event]:
        """The rest, at the end of the answer."""
        ...


def joined(events: Iterable[Event]) -> list[Event]:
    """The events with neighbouring texts of one kind put together."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            result[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.index == event.index:
            result[-1] = CallArguments(event.index, last.text + event.text)
        elif not isinstance(event, CallStart) and not event.text:
            continue
        else:
            result.append(event)
    return result
