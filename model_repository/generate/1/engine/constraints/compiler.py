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
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tritonlm.contract import EngineFailure, NotOffered, TritonLMError

from ..memory import trim_heap
from .constraint import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_log = logging.getLogger("tritonlm.engine")
_THREADS = 2
# Grammars that are kept compiled. One takes up to some megabytes.
_KEPT = 64
# Stands for the end of text where a checkpoint has none: llguidance needs one. It is never sampled.
_NO_END = "<|tritonlm: no end of text|>"

Compiled = Constraint | TritonLMError


class ConstraintCompiler:
    def __init__(self, tokenizer_file: Path, vocab_size: int, end_ids: Collection[int]) -> None:
        """`vocab_size` is that of the logits. `end_ids` end a text."""
        self._tokenizer_file, self._vocab_size = tokenizer_file, vocab_size
        self._end_ids = sorted(token_id for token_id in end_ids if token_id < vocab_size)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._kept: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._lock, self._table_lock = threading.Lock(), threading.Lock()
        self._table: _Table | NotOffered | None = None

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
            future = self._kept[key] = self._pool.submit(self._compile, structured_outputs)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return future

    def _compile(self, structured_outputs: Mapping[str, Any]) -> LLMatcher:
        from .grammars import compile_grammar  # noqa: PLC0415

        with self._table_lock:
            if self._table is None:
                self._table = _load(self._tokenizer_file, self._vocab_size, self._end_ids)
                trim_heap()
        if isinstance(self._table, NotOffered):
            raise self._table
        return compile_grammar(structured_outputs, self._table.tokenizer)

    def _result(self, matcher: Future[LLMatcher]) -> Compiled:
        try:
            copy = matcher.result().deep_copy()
            assert isinstance(self._table, _Table)
            return Constraint(copy, self._table.end_ids, self._table.mask_words, can_end=bool(self._end_ids))
        except TritonLMError as error:
            # A new one for each request: errors carry the headers of their response.
            return type(error)(error.message, error.param)
        except BaseException as error:  # a library's failure, or a compiler that is closed
            _log.exception("a grammar could not be compiled", exc_info=error)
            return EngineFailure(f"the grammar could not be compiled ({type(error).__name__}); send the request again")


@dataclass(frozen=True)
class _Table:
    tokenizer: LLTokenizer
    end_ids: list[int]

    @property
    def mask_words(self) -> int:
        return -(-self.tokenizer.vocab_size // 32)


def _load(file: Path, vocab_size: int, end_ids: Sequence[int]) -> _Table | NotOffered:
    try:
        from llguidance import LLTokenizer  # noqa: PLC0415

        tokenizer = Tokenizer.from_file(str(file))
        # Settings from the tokenizer's training: they would change forced texts.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if not end_ids:
            tokenizer.add_special_tokens([_NO_END])
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocab_size, 1 + max(vocabulary.values()))
        ends = list(end_ids) or [vocabulary[_NO_END]]
        return _Table(LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=ends), ends)
    except Exception as error:  # the libraries raise nothing narrower
        return NotOffered(f"structured_outputs is not offered: this model's tokenizer is not supported ({error})")
