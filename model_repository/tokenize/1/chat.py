"""Chats: validates messages and renders them to text with the checkpoint's chat template, in a sandbox.

It knows jinja2 and the schema of messages. Of tokens it knows only the texts of the special ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateRuntimeError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tritonlm.contract import CheckpointError, InvalidRequest, NotOffered

Message = dict[str, str]

_PARAM = "messages"
_MESSAGE_FIELDS = ("role", "content")


class ChatTemplate:
    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)

    def check_offered(self) -> None:
        if self._source is None:
            raise NotOffered(
                "this model has no chat template; send the prompt as text instead (completions, text_input)", _PARAM
            )

    def render(self, messages: list[Message]) -> str:
        """The chat as text, up to the beginning of the model's answer."""
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                # Templates test whether these are none, and not whether they are defined.
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except CheckpointError:
            raise
        except SecurityError as error:
            raise CheckpointError(f"this model's chat template uses a forbidden operation: {error}") from error
        except _Refusal as error:
            raise InvalidRequest(f"this model's chat template refuses these messages: {error}", _PARAM) from error
        except Exception as error:  # a template is a program and may raise anything
            raise InvalidRequest(
                f"this model's chat template fails on these messages: {str(error)[:200]}", _PARAM
            ) from error

    @cached_property
    def _template(self) -> Template:
        """Compiled at the first chat, so that completions work even with a broken template."""
        assert self._source is not None, "call check_offered first"
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            return environment.from_string(self._source)
        except TemplateError as error:
            line = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
            raise CheckpointError(f"this model's chat template is broken: {error}{line}") from error


class _Refusal(TemplateRuntimeError):
    """Raised by a template through raise_exception."""


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here only its content counts."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, separators: tuple[str, str] | None = None, **options: Any) -> str:
    # Unlike the filter of jinja2, which escapes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, **options)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def read_messages(text: str) -> list[Message]:
    """Parse a caller's JSON to messages whose role and content are strings."""
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"messages is not valid JSON: {error}", _PARAM) from error
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a JSON list of at least one {role, content}", _PARAM)
    return [_read_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _read_message(name: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{name} must be an object with role and content", name)
    for field, value in message.items():
        if field not in _MESSAGE_FIELDS and value is not None:
            raise InvalidRequest(
                f"{name} has the field {field[:60]!r}, which is not supported; send role and content only", name
            )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{name}.role must be a string such as user, assistant or system", f"{name}.role")
    return {"role": role, "content": _read_content(f"{name}.content", message.get("content"))}


def _read_content(name: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f'{name} must be a string or a list of {{"type": "text", "text": "…"}}', name)
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            where = f"{name}[{index}]"
            raise InvalidRequest(f'{where} must be {{"type": "text", "text": "…"}}: only text is supported', where)
        texts.append(text)
    return "\n".join(texts)
