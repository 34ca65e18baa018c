"""Grammars for tests of structured outputs, and how they are compiled and sent."""

from __future__ import annotations

import queue
from typing import Any

from engine.constraints.compiler import Compiled, ConstraintCompiler
from engine.engine import Engine

from .harness import Collected, submit

PROMPT = [5, 6, 7]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["alphabetical", "alphanumerical"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "json": {"json": PERSON},
    "object": {"json_object": True},
    "regex": {"regex": "(ab|cd|é){3,9}[0-9]*"},
    "choice": {"choice": ["left", "lefthand side", "right", "über\n"]},
    "lark": {"grammar": 'start: "sum " NUMBER (" + " NUMBER)* " done"\nNUMBER: /[1-9][0-9]{0,2}/'},
    "gbnf": {"grammar": 'root ::= "<" [a-c]+ ">"'},
}


def constrained(engine: Engine, constraint: str, seed: int = 7, **parameters: Any) -> Collected:
    return submit(
        engine, PROMPT, structured_outputs=CONSTRAINTS[constraint], seed=seed, **{"max_tokens": 60, **parameters}
    )


def compiled(compiler: ConstraintCompiler, structured_outputs: dict[str, Any]) -> Compiled:
    results: queue.Queue[Compiled] = queue.Queue()
    compiler.compile(structured_outputs, results.put)
    return results.get(timeout=60)
