"""The constraint of one sequence: a matcher that has consumed its tokens.

Its state is a function of grammar and tokens. So a preempted or resumed sequence needs nothing else, and draft tokens
are checked on a copy: nothing is rolled back. It does not know logits, nor when masks are computed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tritonlm.contract import InvalidRequest, SamplingParameters
from tritonlm.contract.structured_outputs import NAME

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = npt.NDArray[np.int32]


class Constraint:
    def __init__(
        self, matcher: LLMatcher, end_ids: Collection[int], mask_words: int, vocab_size: int, *, can_end: bool = True
    ) -> None:
        """`matcher` before its first token, for this sequence alone. `end_ids` end a text, if anything `can_end` it.

        `vocab_size` is that of the logits: a tokenizer may know tokens beyond it, and so may a grammar.
        """
        self._matcher, self._vocab_size = matcher, vocab_size
        self._ends, self._can_end = sorted(end_ids), can_end
        # The length of its masks.
        self.mask_words = mask_words
        self._count = 0
        # Tokens that may not come although the grammar allows them: at any time, and before so many tokens.
        self._banned: Sequence[int] = ()
        self._banned_early: Sequence[int] = ()
        self._min_tokens = 0

    def start(self, parameters: SamplingParameters) -> None:
        """Set the sequence's bans, and consume the tokens that an earlier attempt generated."""
        stops = parameters.stop_token_ids
        self._banned = self._ends if parameters.ignore_eos or not self._can_end else ()
        self._banned_early, self._min_tokens = (*self._ends, *stops), parameters.min_tokens
        for index, token_id in enumerate(parameters.resume_token_ids):
            if token_id in stops or (token_id in self._ends and not parameters.ignore_eos):
                return
            if not self._matcher.consume_token(token_id):
                raise InvalidRequest(
                    f"resume_token_ids do not follow structured_outputs from index {index} on", "resume_token_ids"
                )
            self._count += 1

    def advance(self, token_id: int) -> None:
        """Consume the sequence's next token."""
        if not self._matcher.consume_token(token_id):
            raise _failure(self._matcher)
        self._count += 1

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def forced_token(self) -> int | None:
        """The next token, if the grammar allows no other one.

        None as well if the model has no such token. Then the mask is empty, and `limit` refuses to go on.
        """
        if self.complete:
            return None
        # The first of these tokens is the only one that the mask allows; the others belong to later masks.
        tokens = self._matcher.compute_ff_tokens()[:1]
        if not tokens or tokens[0] >= self._vocab_size or not self._matcher.validate_tokens(tokens):
            return None
        return tokens[0]

    def accepted(self, draft_tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, the grammar allows next."""
        return int(self._matcher.validate_tokens(list(draft_tokens))) if draft_tokens else 0

    def copies(self, draft_tokens: Sequence[int]) -> Iterator[LLMatcher]:
        """The matcher after no, one, two … of the draft tokens, which it accepts."""
        matcher = self._matcher
        yield matcher
        for token_id in draft_tokens:
            matcher = matcher.deep_copy()
            matcher.consume_token(token_id)
            yield matcher

    def limit(self, matcher: LLMatcher, mask: Words, offset: int) -> bool:
        """Apply the bans to the mask of one of the copies. Return whether it allows a token that is not an end.

        A ban that would leave no token is not applied: the grammar has ended the text.
        """
        if matcher.is_error():
            raise _failure(matcher)
        banned = self._banned_early if self._count + offset < self._min_tokens else self._banned
        if banned:
            before = mask.copy()
            _clear(mask, banned)
            if not mask.any():
                mask[:] = before
        rest = mask.copy()
        _clear(rest, self._ends)
        if rest.any() or matcher.is_accepting():
            return bool(rest.any())
        # An end stands for what the tokenizer does not know, unless the grammar names it.
        ends = [token_id for token_id in self._ends if token_id < self._vocab_size]
        if not any(matcher.deep_copy().consume_token(token_id) for token_id in ends):
            raise InvalidRequest(f"{NAME}: no token of this model's vocabulary continues the grammar", NAME)
        return True


def _clear(mask: Words, ids: Sequence[int]) -> None:
    for token_id in ids:
        if token_id < 32 * len(mask):
            mask.view(np.uint32)[token_id // 32] &= np.uint32(~(1 << token_id % 32) & 0xFFFFFFFF)


def _failure(matcher: LLMatcher) -> InvalidRequest:
    """It has reached a limit of its size, or the vocabulary has no token for it: a wrong one is refused before."""
    reason = " ".join(matcher.get_error().split())[:200]
    return InvalidRequest(f"{NAME}: the grammar is too complex to go on, or no token continues it ({reason})", NAME)
