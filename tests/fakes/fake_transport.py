"""A Triton that is not there: answers made of the request alone, at any speed, with any trouble. In place of gRPC.

An answer's tokens are words drawn from (prompt, seed, choice), so that equal requests get equal texts. Pieces split
characters of one word at random places, as releases do.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from tritonlm.client.transport import Call, Embedded, Listed, Prompt
from tritonlm.client.types import Logprob, Piece, TopLogprob
from tritonlm.contract import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    NotLoaded,
    NotOffered,
    SamplingParameters,
    TritonLMError,
    Unavailable,
)
from tritonlm.contract.control import ABOUT, CANCEL, FIND, PING, RETIRE, STATUS, Command

LM = "fake"
CONTEXT = 512
WORDS = [" the", " fox", " saw", " a", " naïve", " 猫", " 👍🏽", " and", ".", "\n", "\u2028", "\x85"]
ABOUT_LM = {
    "architecture": "gpt2", "layers": 2, "width": 64, "vocab_size": 512, "special_tokens": {"eos_token": "<end>"},
    "chat_template": None, "training": {"step": 2920, "val_loss": 0.2627},
}  # fmt: skip


class FakeTransport:
    def __init__(self, url: str = "fake:1", pause: float = 0.0) -> None:
        self.url, self.pause = url, pause
        self.calls: list[Call] = []
        self.running: set[str] = set()
        self.cancelled: list[str] = []
        # Raised for the next calls, one each, instead of an answer.
        self.trouble: list[TritonLMError] = []
        # Raised after so many pieces of the next call.
        self.breaks_after: tuple[int, TritonLMError] | None = None
        # And of those after it.
        self.breaks_again: list[tuple[int, TritonLMError]] = []
        self.live = True
        # As after a crash: nothing answers.
        self.down = False
        self.loaded = True
        self.loads, self.load_seconds = 0, 0.0
        self.load_trouble: TritonLMError | None = None
        self.has_chats = True
        self.has_embeddings = True

    async def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
        self.calls.append(call)
        self._find(call.model)
        if call.prompt.messages is not None and not self.has_chats:
            raise NotOffered("this model has no chat template; use /v1/completions", "messages")
        if self.trouble:
            raise self.trouble.pop(0)
        if (wanted := call.parameters.get("max_tokens") or 0) > CONTEXT:
            raise ContextLengthExceeded.of(CONTEXT, 1, wanted)
        self.running.add(call.request_id)
        ended = False
        try:
            for number, made in enumerate(answer(call)):
                await asyncio.sleep(self.pause)
                piece = cancelled(made) if call.request_id in self.cancelled else made
                if self.breaks_after and self.breaks_after[0] == number:
                    ended = True
                    error = self.breaks_after[1]
                    self.breaks_after = self.breaks_again.pop(0) if self.breaks_again else None
                    raise error
                ended = bool(piece.finish_reason)
                yield piece
                if ended:
                    return
        finally:
            self.running.discard(call.request_id)
            if not ended:
                self.cancelled.append(call.request_id)

    def _find(self, model: str) -> None:
        if model != LM:
            raise ModelNotFound(f"the model {model!r} does not exist", "model")
        if not self.loaded:
            raise NotLoaded(f"the model {model!r} is not loaded", "model")

    async def embed(self, call: Call) -> Embedded:
        self.calls.append(call)
        self._find(call.model)
        if self.trouble:
            raise self.trouble.pop(0)
        if not self.has_embeddings:
            raise NotOffered("embeddings are off; start the server with TRITONLM_ENABLE_EMBEDDINGS=true")
        text = prompt_text(call.prompt)
        return Embedded([float(len(text)), 0.5], max(1, len(text.split())))

    async def command(self, model: str, command: Command) -> dict[str, Any]:
        self._find(model)
        if command.name == CANCEL:
            found = command.request_id in self.running
            self.cancelled += [command.request_id] if found else []
            return {"cancelled": int(found)}
        if command.name == FIND:
            state = {"state": "running", "position": 0, "completion_tokens": 1}
            return {"requests": [state] if command.request_id in self.running else []}
        if command.name == ABOUT:
            return ABOUT_LM
        assert command.name in (PING, STATUS, RETIRE)
        return {
            "created": 1, "context_length": CONTEXT, "device": "cpu", "dtype": "float32", "places": 64,
            "running": len(self.running), "waiting": 0, "stale": "", "broken": "", "memory_bytes": 2**20,
            "memory_budget": 0, "idle_seconds": 0.0, "idle_unload_seconds": 0.0, "draining": False,
            "tokens_per_second": 12.5, "blocks": 128, "blocks_used": 3,
        }  # fmt: skip

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        self._find(model)
        return [*([0] if add_special_tokens else []), *(prompt.text or "").encode()]

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        self._find(model)
        return bytes(token_id % 256 for token_id in ids if token_id).decode("utf-8", "replace")

    async def ping(self, model: str) -> dict[str, Any]:
        return await self.command(model, Command(PING))

    async def models(self) -> list[Listed]:
        if self.down:
            raise Unavailable(f"no Triton answers at {self.url}")
        return [Listed(LM, self.loaded)]

    async def load(self, model: str, timeout: float) -> None:
        self.loads += 1
        await asyncio.sleep(self.load_seconds)
        if self.load_trouble is not None:
            raise self.load_trouble
        self.loaded = True

    async def unload(self, model: str) -> None:
        self.loaded = False

    async def is_live(self) -> bool:
        return self.live

    async def close(self) -> None:
        pass


def cancelled(piece: Piece) -> Piece:
    return Piece(piece.index, "", "cancelled", 1, 0, 0, piece.seed, [], None)


def prompt_text(prompt: Prompt) -> str:
    if prompt.text is not None:
        return prompt.text
    if prompt.input_ids is not None:
        return "".join(chr(32 + token_id % 90) for token_id in prompt.input_ids)
    contents = [message.get("content") for message in json.loads(prompt.messages or "[]")]
    if not all(isinstance(content, str) for content in contents):
        raise InvalidRequest("messages[0].content must be a string", "messages[0].content")
    return "".join(contents)


def answer(call: Call) -> list[Piece]:
    """All pieces of the answer to a call."""
    wanted = SamplingParameters.from_mapping(call.parameters)
    prompt = prompt_text(call.prompt)
    draw = random.Random(f"{prompt}-{wanted.seed}-{wanted.choice}" if wanted.temperature else prompt)
    limit = 16 if wanted.max_tokens is None else wanted.max_tokens
    words = [draw.choice(WORDS) for _ in range(limit)]
    text, reason = "".join(words), "length"
    for stop in wanted.stop:
        if stop in text:
            text, reason = text[: text.index(stop)], "stop"
    # The tokens that the text needed.
    used = next((n for n in range(len(words) + 1) if len("".join(words[:n])) >= len(text)), len(words))
    words = words[:used]
    entries = [_entry(word, wanted.logprobs or 0, draw) for word in words]
    shown = text
    if wanted.echo:
        shown = prompt + text
        entries = [_entry(prompt, 0, draw, first=True), *entries]
    if not call.stream:
        return [_piece(0, shown, reason, prompt, used, wanted, words, entries)]
    # After so many words, the text up to somewhere in the last of them: the rest is held back.
    ends = list(itertools.accumulate(map(len, words), initial=len(shown) - len(text)))
    stops = sorted({draw.randrange(1, used + 1) for _ in range(3)} - {used}) if used else []
    cuts = [(count, draw.randrange(ends[count - 1] + 1, ends[count] + 1)) for count in stops]
    cuts.append((used, len(shown)))
    pieces, before, start = [], 0, 0
    for count, end in cuts:
        last = count == used
        said = reason if last else ""
        new = words[before:count]
        pieces.append(
            _piece(len(pieces), shown[start:end], said, prompt, count, wanted, new, entries if last else [], start)
        )
        before, start = count, end
    if not wanted.resume_token_ids:
        return pieces
    # What the earlier try has sent is known by its tokens.
    sent = [count for count, _ in cuts].index(len(wanted.resume_token_ids)) + 1
    assert [WORDS.index(word) for word in words[: len(wanted.resume_token_ids)]] == list(wanted.resume_token_ids)
    return [replace(piece, index=index) for index, piece in enumerate(pieces[sent:])]


def _entry(word: str, alternatives: int, draw: random.Random, first: bool = False) -> Logprob:
    tops = tuple(TopLogprob(token=f" top{n}", logprob=-0.5 - n, bytes=[n]) for n in range(alternatives))
    return Logprob(1, word, None if first else -draw.random() * 3, list(word.encode()), 0, tops)


def _piece(
    index: int, text: str, reason: str, prompt: str, used: int, wanted: SamplingParameters, words: list[str],
    entries: list[Logprob], start: int = 0,
) -> Piece:  # fmt: skip
    placed, position = [], -start
    for entry in entries:
        placed.append(Logprob(entry.token_id, entry.token, entry.logprob, entry.bytes, position, entry.top))
        position += len(entry.token)
    return Piece(
        index=index, text=text, finish_reason=reason, prompt_tokens=max(1, len(prompt.split())), completion_tokens=used,
        cached_tokens=0, seed=wanted.seed or 0,
        token_ids=[WORDS.index(word) for word in words] if wanted.return_token_ids else [],
        logprobs=placed if wanted.logprobs is not None else None,
    )  # fmt: skip
