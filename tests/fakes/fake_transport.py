"""A fake transport in place of gRPC: it computes responses from the request alone, with a pause and errors on demand.

The tokens of a response are words sampled by (prompt, seed, choice), so that equal requests get equal texts. Pieces end
at random characters within a word, as releases do.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tritonlm.client.transport import Call, Prompt, PromptEmbedding, RepositoryModel
from tritonlm.client.types import Logprob, Piece, TopLogprob
from tritonlm.contract import (
    AdapterNotFound,
    CheckpointError,
    ContextLengthExceeded,
    ModelNotFound,
    NotLoaded,
    NotOffered,
    SamplingParameters,
    TritonLMError,
    Unavailable,
)
from tritonlm.contract.adapters_file import read_adapters
from tritonlm.contract.control import ABOUT, CANCEL, FIND, PING, RETIRE, STATUS, Command

from fakes.models import load_module

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
        # Calls from this number on generate nothing before a test sets it back, however slow the machine is.
        self.held_from: int | None = None
        self.calls: list[Call] = []
        self.running: set[str] = set()
        self.cancelled: list[str] = []
        # Raised for the next calls, one each.
        self.trouble: list[TritonLMError] = []
        # An error after this many pieces of the next call.
        self.breaks_after: tuple[int, TritonLMError] | None = None
        # The same for the calls after it.
        self.breaks_again: list[tuple[int, TritonLMError]] = []
        self.live = True
        # As after a crash: no response at all.
        self.down = False
        self.loaded = True
        self.loads, self.load_seconds = 0, 0.0
        self.load_trouble: TritonLMError | None = None
        self.has_chats = True
        # The end of rendered chats.
        self.generation_prompt = "assistant:"
        self.about: dict[str, Any] = ABOUT_LM
        # Answered to calls instead of a random text, if set: one piece for each string, one list for each call.
        self.answers: list[list[str]] = []
        self.has_embeddings = True
        # Its adapters, as an engine finds them; the folder of a broken one holds a file of that name.
        self.adapters_file: Path | None = None

    async def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
        number = len(self.calls)
        self.calls.append(call)
        self._find(call.model)
        self._find_adapter(call)
        if call.prompt.messages is not None and not self.has_chats:
            raise NotOffered("this model has no chat template; use /v1/completions", "messages")
        if self.trouble:
            raise self.trouble.pop(0)
        if (max_tokens := call.parameters.get("max_tokens") or 0) > CONTEXT:
            raise ContextLengthExceeded.for_lengths(CONTEXT, 1, max_tokens)
        self.running.add(call.request_id)
        ended = False
        try:
            made_pieces = scripted(call, self.answers.pop(0)) if self.answers else pieces_of(call)
            for index, made in enumerate(made_pieces):
                await asyncio.sleep(self.pause)
                while self.held_from is not None and number >= self.held_from:
                    await asyncio.sleep(0.005)
                piece = cancelled(made) if call.request_id in self.cancelled else made
                if self.breaks_after and self.breaks_after[0] == index:
                    ended = True
                    error = self.breaks_after[1]
                    self.breaks_after = self.breaks_again.pop(0) if self.breaks_again else None
                    raise error
                ended = bool(piece.finish_reason)
                yield piece
                if ended:
                    return
        finally:
            if not ended:
                self.cancelled.append(call.request_id)
            # Last: a test's thread sees that it is over.
            self.running.discard(call.request_id)

    def _find(self, model: str) -> None:
        if model != LM:
            raise ModelNotFound(f"the model {model!r} does not exist", "model")
        if not self.loaded:
            raise NotLoaded(f"the model {model!r} is not loaded", "model")

    def _find_adapter(self, call: Call) -> None:
        if not (name := call.parameters.get("adapter", "")):
            return
        known = read_adapters(self.adapters_file) if self.adapters_file else {}
        if name not in known:
            raise AdapterNotFound.of(name, call.model, known)
        if (Path(known[name].path) / "broken").exists():
            raise CheckpointError(f"adapter {name!r}: lora_A of x has 3 inputs, not 4")

    async def embed(self, call: Call) -> PromptEmbedding:
        self.calls.append(call)
        self._find(call.model)
        self._find_adapter(call)
        if self.trouble:
            raise self.trouble.pop(0)
        if not self.has_embeddings:
            raise NotOffered("embeddings are off; start the server with TRITONLM_ENABLE_EMBEDDINGS=true")
        text = prompt_text(call.prompt)
        return PromptEmbedding([float(len(text)), 0.5], max(1, len(text.split())))

    async def command(self, model: str, command: Command) -> dict[str, Any]:
        self._find(model)
        if command.name == CANCEL:
            is_running = command.request_id in self.running
            self.cancelled += [command.request_id] if is_running else []
            return {"cancelled": int(is_running)}
        if command.name == FIND:
            state = {"state": "running", "position": 0, "completion_tokens": 1}
            return {"requests": [state] if command.request_id in self.running else []}
        if command.name == ABOUT:
            return self.about
        assert command.name in (PING, STATUS, RETIRE)
        return {
            "created": 1, "context_length": CONTEXT, "device": "cpu", "dtype": "float32", "slots": 64, "places": 64,
            "running": len(self.running), "waiting": 0, "stale": "", "broken": "", "memory_bytes": 2**20,
            "memory_budget": 0, "idle_seconds": 0.0, "idle_unload_seconds": 0.0, "draining": False,
            "tokens_per_second": 12.5, "blocks": 128, "blocks_used": 3,
        }  # fmt: skip

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        self._find(model)
        return [*([0] if add_special_tokens else []), *prompt_text(prompt).encode()]

    async def render(self, model: str, prompt: Prompt) -> str:
        self._find(model)
        if not self.has_chats:
            raise NotOffered("this model has no chat template; use /v1/completions", "messages")
        return f"{prompt_text(prompt)}\n{self.generation_prompt}"

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        self._find(model)
        return bytes(token_id % 256 for token_id in ids if token_id).decode("utf-8", "replace")

    async def ping(self, model: str) -> dict[str, Any]:
        return await self.command(model, Command(PING))

    async def models(self) -> list[RepositoryModel]:
        if self.down:
            raise Unavailable(f"no Triton answers at {self.url}")
        return [RepositoryModel(LM, self.loaded)]

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
    chat = load_module("tokenize", "messages").read_chat(prompt.messages)
    return "".join(message["content"] for message in chat.messages)


def scripted(call: Call, texts: Sequence[str]) -> list[Piece]:
    """An answer of these texts; not streamed, they are one."""
    parts = list(texts) if call.stream else ["".join(texts)]
    return [
        Piece(
            index=index, text=text, finish_reason="stop" if index + 1 == len(parts) else "", prompt_tokens=3,
            completion_tokens=index + 1, cached_tokens=0, seed=1, token_ids=[], logprobs=None,
        )
        for index, text in enumerate(parts)
    ]  # fmt: skip


def pieces_of(call: Call) -> list[Piece]:
    """All pieces of the response to a call."""
    params = SamplingParameters.from_mapping(call.parameters)
    prompt = prompt_text(call.prompt)
    key = params.adapter + prompt
    rng = random.Random(f"{key}-{params.seed}-{params.choice}" if params.temperature else key)
    limit = 16 if params.max_tokens is None else params.max_tokens
    words = [rng.choice(WORDS) for _ in range(limit)]
    text, reason, stopped = "".join(words), "length", ""
    for stop in params.stop:
        if stop in text:
            text, reason, stopped = text[: text.index(stop)], "stop", stop
    # The number of tokens in the text.
    used = next((n for n in range(len(words) + 1) if len("".join(words[:n])) >= len(text)), len(words))
    words = words[:used]
    entries = [_entry(word, params.logprobs or 0, rng) for word in words]
    shown = text
    if params.echo:
        shown = prompt + text
        entries = [*_prompt_entries(call.prompt, prompt, rng, params.logprobs_start), *entries]
    if not call.stream:
        return [replace(_piece(0, shown, reason, prompt, used, params, words, entries), stop=stopped)]
    # After this many words: the text up to a position within the last word. The rest is held back.
    ends = list(itertools.accumulate(map(len, words), initial=len(shown) - len(text)))
    stops = sorted({rng.randrange(1, used + 1) for _ in range(3)} - {used}) if used else []
    cuts = [(count, rng.randrange(ends[count - 1] + 1, ends[count] + 1)) for count in stops]
    cuts.append((used, len(shown)))
    pieces, before, start = [], 0, 0
    for count, end in cuts:
        last = count == used
        finish_reason = reason if last else ""
        new = words[before:count]
        pieces.append(
            _piece(
                len(pieces), shown[start:end], finish_reason, prompt, count, params, new, entries if last else [], start
            )
        )
        before, start = count, end
    pieces[-1] = replace(pieces[-1], stop=stopped)
    if not params.resume_token_ids:
        return pieces
    # The resumed tokens tell what the interrupted attempt has sent.
    sent = [count for count, _ in cuts].index(len(params.resume_token_ids)) + 1
    assert [WORDS.index(word) for word in words[: len(params.resume_token_ids)]] == list(params.resume_token_ids)
    return [replace(piece, index=index) for index, piece in enumerate(pieces[sent:])]


def _prompt_entries(prompt: Prompt, text: str, rng: random.Random, start: int) -> list[Logprob]:
    """Of ids an entry for each, whose value depends on the ids up to it; the first ones have no value."""
    if prompt.input_ids is None:
        return [_entry(text, 0, rng, first=True)]
    ids = prompt.input_ids
    return [
        _entry(character, 0, random.Random(str(ids[: index + 1])), first=index < max(1, start))
        for index, character in enumerate(text)
    ]


def _entry(word: str, alternatives: int, rng: random.Random, first: bool = False) -> Logprob:
    tops = tuple(TopLogprob(token=f" top{n}", logprob=-0.5 - n, bytes=[n]) for n in range(alternatives))
    return Logprob(1, word, None if first else -rng.random() * 3, list(word.encode()), 0, tops)


def _piece(
    index: int, text: str, reason: str, prompt: str, used: int, params: SamplingParameters, words: list[str],
    entries: list[Logprob], start: int = 0,
) -> Piece:  # fmt: skip
    placed, position = [], -start
    for entry in entries:
        placed.append(Logprob(entry.token_id, entry.token, entry.logprob, entry.bytes, position, entry.top))
        position += len(entry.token)
    return Piece(
        index=index, text=text, finish_reason=reason, prompt_tokens=max(1, len(prompt.split())), completion_tokens=used,
        cached_tokens=0, seed=params.seed or 0,
        token_ids=[WORDS.index(word) for word in words] if params.return_token_ids else [],
        logprobs=placed if params.logprobs is not None else None,
    )  # fmt: skip
