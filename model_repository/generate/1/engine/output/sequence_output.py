"""One request's answer: sampled tokens in, chunks out, the last of them with a finish reason.

It knows usage, chunk indexes, end tokens and when a chunk may leave; what text may leave is `release`'s matter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from tritonlm.contract import Chunk, TokenLogprob, Usage

from ..request import Request
from .release import TextRelease, Window

# Token ids and whether special tokens are left out -> text.
Decode = Callable[[list[int], bool], str]

STOP, LENGTH, TIMEOUT, CANCELLED = "stop", "length", "timeout", "cancelled"


class Answer:
    def __init__(self, request: Request, decode: Decode, end_ids: Collection[int]) -> None:
        wanted = request.parameters
        assert wanted.max_tokens is not None and wanted.seed is not None  # noqa: PT018 (tokenize settles both)
        self._request = request
        self._max_tokens = wanted.max_tokens
        self._seed = wanted.seed
        self._end_ids = {*wanted.stop_token_ids, *(() if wanted.ignore_eos else end_ids)}
        resumed = wanted.resume_token_ids
        self._release = TextRelease(
            lambda ids: decode(ids, wanted.skip_special_tokens),
            request.prompt_ids,
            wanted.stop,
            wanted.min_tokens,
            request.wanted.include_prompt and not resumed,
        )
        self._index = 0
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        # The prompt's entries go with the first chunk, whose window begins with the whole prompt.
        self._scored_prompt = len(request.prompt_ids) if request.scores_prompt and not resumed else 0
        self.finish_reason = LENGTH if self._max_tokens == 0 and not request.scores_prompt else ""
        for token_id in resumed:
            if not self.finish_reason:
                self.finish_reason = self._end_after(token_id)
        # The earlier try has sent this already.
        self._release.take() if resumed else None

    def score_prompt(self, entries: list[TokenLogprob]) -> None:
        """Log-probabilities of the prompt's tokens, in order."""
        self._logprobs += entries

    def end_of_prompt(self) -> None:
        """The prompt has been computed: without tokens to generate, that was all."""
        if self._max_tokens == 0:
            self.finish_reason = LENGTH

    def feed(self, token_id: int, logprob: TokenLogprob | None) -> None:
        """Take one generated token, which the request's ids hold already."""
        self._ids.append(token_id)
        if logprob is not None:
            self._logprobs.append(logprob)
        self.finish_reason = self._end_after(token_id)
        if not self.finish_reason and self._request.generated >= self._max_tokens:
            self.finish_reason = LENGTH

    def _end_after(self, token_id: int) -> str:
        if token_id in self._end_ids:
            return STOP
        return STOP if self._release.feed(token_id) else ""

    def chunk(self, due: bool) -> Chunk | None:
        """What may leave now, if anything: the first text at once, the rest when chunks are due."""
        if not self._request.wanted.stream or (self._index and not due):
            return None
        window = self._release.take()
        return None if window is None else self._make(window, "")

    def final(self, reason: str) -> Chunk:
        return self._make(self._release.flush(), reason)

    def _make(self, window: Window, reason: str) -> Chunk:
        request, wanted = self._request, self._request.parameters
        chunk = Chunk(
            index=self._index,
            window_ids=window.ids,
            window_new=window.new + self._scored_prompt,
            cut_start=window.cut_start,
            cut_end=window.cut_end,
            skip_special_tokens=wanted.skip_special_tokens,
            finish_reason=reason,
            usage=Usage(len(request.prompt_ids), request.generated, request.cached_tokens),
            token_ids=self._ids if wanted.return_token_ids else [],
            seed=self._seed,
            logprobs=self._logprobs if wanted.logprobs is not None else None,
            as_piece=wanted.as_piece,
        )
        self._index += 1
        self._ids, self._logprobs, self._scored_prompt = [], [], 0
        return chunk
