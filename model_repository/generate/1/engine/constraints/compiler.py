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
from concurrent.futures import Future, ThreadPoolExecutor
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


class ConstraintCompiler:
    def __init__(self, tokenizer_file: Path, vocab_size: int, end_ids: Collection[int]) -> None:
        """`vocab_size` is that of the logits. `end_ids` end a text."""
        self._tokenizer_file, self._vocab_size = tokenizer_file, vocab_size
        self._end_ids = sorted(token_id for token_id in end_ids if token_id < vocab_size)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._kept: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._lock, self._table_lock = threading.Lock(), threading.Lock()
        self._table: TokenTable | NotOffered | None = None

    def compile(self, structured_outputs: Mapping[str, Any], done: Callable[[Compiled], None]) -> None:
        """Call `done` with a constraint before its first token, or with the error that refuses the grammar.

        It is called on a thread of the compiler, or at once on the caller's if the grammar is compiled already.
        """
        self._compiled(structured_outputs).add_done_callback(lambda matcher: done(self._result(matcher)))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _compiled(self, structured_outputs: Mapping[str, Any]) -> Future[LLMatcher]:
        # The order of a schema's properties is that of the text, so it belongs to the key.
        key = json.dumps(structured_outputs)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            future = self._kept[key] = self._pool.submit(self._compile, key, structured_outputs)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return future

    def _compile(self, key: str, structured_outputs: Mapping[str, Any]) -> LLMatcher:
        try:
            return self._compile_once(structured_outputs)
        except TritonLMError:
            raise
        except BaseException:  # such as a lack of memory, which may pass: the next request tries again
            with self._lock:
                self._kept.pop(key, None)
            raise

    def _compile_once(self, structured_outputs: Mapping[str, Any]) -> LLMatcher:
        from .grammars import compile_grammar  # noqa: PLC0415

        with self._table_lock:
            if self._table is None:
                self._table = load_token_table(self._tokenizer_file, self._vocab_size, self._end_ids)
                trim_heap()
        if isinstance(self._table, NotOffered):
            raise self._table
        return compile_grammar(structured_outputs, self._table.tokenizer)

    def _result(self, matcher: Future[LLMatcher]) -> Compiled:
        try:
            copy = matcher.result().deep_copy()
            assert isinstance(self._table, TokenTable)
            return Constraint(copy, self._table.end_ids, self._table.mask_words, can_end=bool(self._end_ids))
        except TritonLMError as error:
            # A new one for each request: errors carry the headers of their response.
            return type(error)(error.message, error.param)
        except BaseException as error:  # a library's failure, or a compiler that is closed
            _log.exception("a grammar could not be compiled", exc_info=error)
            return EngineFailure(f"the grammar could not be compiled ({type(error).__name__}); send the request again")
