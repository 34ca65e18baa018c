"""What a request waits for before the engine's thread takes it: its adapter, then its grammar.

Both come from threads of their own. It does not know how they are loaded or compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tritonlm.contract import NotOffered, TritonLMError

from .adapters.loaded import LoadedAdapter
from .adapters.store import AdapterStore
from .constraints.compiler import ConstraintCompiler
from .constraints.constraint import Constraint
from .request import Request


@dataclass(frozen=True)
class Prepared:
    """What the request waited for, or the error that refuses it."""

    adapter: LoadedAdapter | None = None
    constraint: Constraint | None = None
    refusal: TritonLMError | None = None


Done = Callable[[Request, Prepared], None]


class Preparation:
    def __init__(self, adapters: AdapterStore | None, constraints: ConstraintCompiler | None) -> None:
        self._adapters, self._constraints = adapters, constraints

    def check(self, request: Request) -> None:
        """Refuse what this engine does not offer."""
        parameters = request.parameters
        if parameters.structured_outputs and (request.embeds or self._constraints is None):
            raise NotOffered("structured_outputs is offered for generated text only, by an engine with a tokenizer")
        if parameters.adapter and self._adapters is None:
            raise NotOffered("this LM has no adapters; set adapters_file, and add them with tritonlm adapters add")

    def prepare(self, request: Request, done: Done) -> None:
        """Call `done` when the request has what it needs, at once if that is nothing, or on another thread."""
        if self._adapters and request.parameters.adapter:
            self._adapters.acquire(request.parameters.adapter, lambda acquired: self._compile(request, acquired, done))
        else:
            self._compile(request, None, done)

    def release(self, adapter: LoadedAdapter | None) -> None:
        """Give up an adapter that a request got."""
        if adapter and self._adapters:
            self._adapters.release(adapter)

    def _compile(self, request: Request, adapter: LoadedAdapter | TritonLMError | None, done: Done) -> None:
        if isinstance(adapter, TritonLMError):
            done(request, Prepared(refusal=adapter))
            return
        grammar = request.parameters.structured_outputs
        if not grammar or self._constraints is None:
            done(request, Prepared(adapter))
            return

        def put(compiled: Constraint | TritonLMError) -> None:
            if isinstance(compiled, TritonLMError):
                done(request, Prepared(adapter, refusal=compiled))
            else:
                done(request, Prepared(adapter, compiled))

        self._constraints.compile(grammar, put)
