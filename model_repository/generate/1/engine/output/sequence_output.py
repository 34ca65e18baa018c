"""The output of one sequence: it takes sampled tokens and makes chunks, the last of them with a finish reason.

It knows usage, chunk indexes, end tokens and when a chunk may be sent. Which text may be sent is decided in `release`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from tritonlm.contract import Chunk, TokenLogprob, Usage

from ..request import Request
from .release import TextRelease, Window

# (token ids, skip_special_tokens) -> text.
Decode = Callable[[list[int], bool], str]

STOP, LENGTH, TIMEOUT, CANCELLED = "stop", "length", "timeout", "cancelled"


class SequenceOutput:
    def __init__(self, request: Request, decode: Decode, end_ids: Collection[int]) -> None:
        params = request.parameters
        assert params.max_tokens is not None and params.seed is not None  # noqa: PT018 (tokenize sets both)
        self._request = request
        self._max_tokens = params.max_tokens
        self._seed = params.seed
        self.end_ids = {*params.stop_token_ids, *(() if params.ignore_eos else end_ids)}
        resumed = params.resume_token_ids
        self._release = TextRelease(
            lambda ids: decode(ids, params.skip_special_tokens),
            request.prompt_ids,
            params.stop,
            params.min_tokens,
            request.generation.include_prompt and not resumed,
        )
        self._index = 0
        self._is_prompt_computed = False
        self._ids: list[int] = []
        # The prompt's log-probabilities belong to the first chunk, whose window begins with the whole prompt. The first
        # token has none, and neither have those before `logprobs_start`.
        prompt_ids = request.prompt_ids if request.scores_prompt else []
        self._logprobs = [TokenLogprob(token_id, None) for token_id in prompt_ids[: request.scored_tokens + 1]]
        self._scored_prompt_tokens = len(prompt_ids)
        self.finish_reason = LENGTH if self._max_tokens == 0 and not request.scores_prompt else ""
        for token_id in resumed:
            if not self.finish_reason:
                self.finish_reason = self._end_after(token_id)
        # The interrupted attempt has sent the text of the resumed tokens.
        if resumed:
            self._release.take()

    def add_prompt_logprobs(self, entries: list[TokenLogprob]) -> None:
        """Add log-probabilities of the prompt's next tokens, in order."""
        self._logprobs += entries

    def finish_prompt(self) -> None:
        """Note that the prompt is computed. With max_tokens 0 the sequence ends here."""
        self._is_prompt_computed = True
        if self._max_tokens == 0:
            self.finish_reason = LENGTH

    def feed(self, token_id: int, logprob: TokenLogprob | None) -> None:
        """Add one generated token. The request's ids hold it already."""
        self._ids.append(token_id)
        if logprob is not None:
            self._logprobs.append(logprob)
        self.finish_reason = self._end_after(token_id)
        if not self.finish_reason and self._request.generated >= self._max_tokens:
            self.finish_reason = LENGTH

    def _end_after(self, token_id: int) -> str:
        if token_id in self.end_ids:
            return STOP
        return STOP if self._release.feed(token_id) else ""

    def chunk(self, due: bool) -> Chunk | None:
        """The chunk to send now, if any: the first text at once, later text when a chunk is due.

        The text of an echoed prompt waits for the prompt's log-probabilities, and for a token to resume after.
        """
        if not self._request.generation.stream or not self._is_prompt_computed or (self._index and not due):
            return None
        window = self._release.take()
        return None if window is None else self._make(window, "")

    def finish(self, reason: str) -> Chunk:
        return self._make(self._release.flush(), reason)

    def _make(self, window: Window, reason: str) -> Chunk:
        request, params = self._request, self._request.parameters
        chunk = Chunk(
            index=self._index,
            window_ids=window.ids,
            window_new=window.new + self._scored_prompt_tokens,
            cut_start=window.cut_start,
            cut_end=window.cut_end,
            skip_special_tokens=params.skip_special_tokens,
            finish_reason=reason,
            stop=self._release.stop if reason == STOP else "",
            usage=Usage(len(request.prompt_ids), request.generated, request.cached_tokens),
            token_ids=self._ids if params.return_token_ids else [],
            seed=self._seed,
            logprobs=self._logprobs if params.logprobs is not None else None,
            as_piece=params.as_piece,
        )
        self._index += 1
        self._ids, self._logprobs, self._scored_prompt_tokens = [], [], 0
        return chunk
