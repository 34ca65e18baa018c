"""Compiles grammars on a few threads of its own, and keeps the last ones. All engines of a process share one compiler.

The tokenizer's table takes 0.3 s for 50,000 tokens and 4 s for 260,000, and 50 to 270 MB. It is made once, when the
first grammar is compiled, so that a model that never gets one pays nothing and needs no llguidance. Nothing here runs
on an engine's thread.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonlm.contract import EngineFailure, NotOffered, TritonLMError

from ..memory import trim_heap
from .constraint import Constraint
from .token_table import TokenTable, load_token_table

if TYPE_CHECKING:
    from llguidance import LLMatcher

_log = logging.getLogger("tritonlm.engine")
_THREADS = 2
# Grammars that are kept compiled. One takes up to some megabytes.
_KEPT = 64

Compiled = Constraint | TritonLMError
Done = Callable[[Compiled], None]


class ConstraintCompiler:
    def __init__(self, tokenizer_file: Path, vocab_size: int, end_ids: Collection[int]) -> None:
        """`vocab_size` is that of the logits. `end_ids` end a text."""
        self._tokenizer_file, self._vocab_size = tokenizer_file, vocab_size
        self._end_ids = sorted(token_id for token_id in end_ids if token_id < vocab_size)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._lock, self._table_lock = threading.Lock(), threading.Lock()
        # Both are guarded by the lock. No future is kept: it would keep its callbacks, and with them requests.
        self._kept: OrderedDict[str, LLMatcher | TritonLMError] = OrderedDict()
        self._waiting: dict[str, list[Done]] = {}
        self._table: TokenTable | NotOffered | None = None

    def compile(self, structured_outputs: Mapping[str, Any], done: Done) -> None:
        """Call `done` with a constraint before its first token, or with the error that refuses the grammar.

        It is called on a thread of the compiler, or at once on the caller's if the grammar is compiled already.
        """
        # The order of a schema's properties is that of the text, so it belongs to the key.
        key = json.dumps(structured_outputs)
        with self._lock:
            if key in self._waiting:
                self._waiting[key].append(done)
                return
            kept = self._kept.get(key)
            if kept is None:
                future = self._pool.submit(self._compile, structured_outputs)
                self._waiting[key] = [done]
            else:
                self._kept.move_to_end(key)
        if kept is None:
            future.add_done_callback(partial(self._finish, key))
        else:
            done(self._result(kept))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _finish(self, key: str, future: Future[LLMatcher]) -> None:
        """Keep what was compiled, or why the grammar is refused, and pass it to all that wait for it."""
        result = _outcome(future)
        with self._lock:
            waiting = self._waiting.pop(key)
            # Other failures, such as a lack of memory, may pass: the next request tries again.
            if not isinstance(result, BaseException) or isinstance(result, TritonLMError):
                self._kept[key] = result
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        for done in waiting:
            done(self._result(result))

    def _compile(self, structured_outputs: Mapping[str, Any]) -> LLMatcher:
        from .grammars import compile_grammar  # noqa: PLC0415

        with self._table_lock:
            if self._table is None:
                self._table = load_token_table(self._tokenizer_file, self._vocab_size, self._end_ids)
                trim_heap()
        if isinstance(self._table, NotOffered):
            raise self._table
        return compile_grammar(structured_outputs, self._table.tokenizer)

    def _result(self, result: LLMatcher | BaseException) -> Compiled:
        if isinstance(result, TritonLMError):
            # A new one for each request: errors carry the headers of their response.
            return type(result)(result.message, result.param)
        try:
            if isinstance(result, BaseException):
                raise result
            assert isinstance(self._table, TokenTable)
            return Constraint(
                result.deep_copy(), self._table.end_ids, self._table.mask_words, self._vocab_size,
                can_end=bool(self._end_ids),
            )  # fmt: skip
        except BaseException as error:  # a library's failure, or a compiler that is closed
            _log.exception("a grammar could not be compiled", exc_info=error)
            return EngineFailure(f"the grammar could not be compiled ({type(error).__name__}); send the request again")


def _outcome(future: Future[LLMatcher]) -> LLMatcher | BaseException:
    if future.cancelled():
        return CancelledError()
    return future.exception() or future.result()
