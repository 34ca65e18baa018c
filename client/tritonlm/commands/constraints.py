"""The options that constrain a text: a JSON schema, a regular expression, choices, a grammar.

Mistakes name the file and the place in it. What a grammar means, the server knows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from tritonlm.contract import InvalidRequest
from tritonlm.contract.structured_outputs import CHOICE, GRAMMAR, JSON, NAME, REGEX, StructuredOutputs

Schema = Annotated[Path | None, typer.Option(metavar="FILE", help="a JSON schema that the output follows")]
Regex = Annotated[str | None, typer.Option(metavar="R", help="a regular expression that the output matches")]
Choice = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="the output is one of these; repeat it")]
Grammar = Annotated[Path | None, typer.Option(metavar="FILE", help="a grammar (Lark or GBNF) that the output follows")]


@dataclass(frozen=True)
class Constraint:
    """The request's parameter, and the option or file that it comes from."""

    parameters: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Errors about the constraint have the name of the option or file."""
        try:
            yield
        except InvalidRequest as error:
            if not self.concerns(error):
                raise
            raise type(error)(error.message.replace(error.param or "", self.source, 1), error.param) from None

    def concerns(self, error: InvalidRequest) -> bool:
        return bool(self.source) and error.param is not None and error.param.startswith(NAME)


def read_constraint(
    schema: Path | None, regex: str | None, choices: list[str] | None, grammar: Path | None
) -> Constraint:
    sent = {"--schema": schema, "--regex": regex, "--choice": choices or None, "--grammar": grammar}
    names = [name for name, value in sent.items() if value is not None]
    if not names:
        return Constraint()
    if len(names) > 1:
        raise InvalidRequest(f"{names[0]} and {names[1]} both constrain the output; use one of them")
    if schema is not None:
        constraint = Constraint({NAME: {JSON: _json_of(schema)}}, str(schema))
    elif grammar is not None:
        constraint = Constraint({NAME: {GRAMMAR: _text_of(grammar)}}, str(grammar))
    else:
        kind, value = (REGEX, regex) if regex is not None else (CHOICE, choices)
        constraint = Constraint({NAME: {kind: value}}, names[0])
    with constraint.named():
        # Refused before a server is asked.
        StructuredOutputs()(NAME, constraint.parameters[NAME])
    return constraint


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{file} is not UTF-8 (byte {error.start})") from None


def _json_of(file: Path) -> Any:
    try:
        return json.loads(_text_of(file))
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{file}:{error.lineno}:{error.colno} is not valid JSON: {error.msg}") from None
    except RecursionError:
        raise InvalidRequest(f"{file} is nested too deeply") from None
