"""Renders chats to text with the checkpoint's chat template, in a sandbox.

It knows jinja2; `messages` knows the schema of chats. Of tokens it knows only the texts of the special ones.
"""

from __future__ import annotations

import json
import re
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
from tritonlm.contract.tool_formats import effort_variables, tool_format_of

from .messages import PARAM, Chat, Message
from .tool_text import with_tools_as_text, without_system

# Marks the end of the message to continue: characters that no text may hold.
_CONTINUE = "\ufdd0\ufdd1\ufdd0"


class ChatTemplate:
    def __init__(self, source: str | None, special_tokens: Mapping[str, str], tool_format: str | None = None) -> None:
        """`tool_format` is the setting of that name."""
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._format = tool_format_of(source, tool_format)

    def check_offered(self) -> None:
        if self._source is None:
            raise NotOffered(
                "this model has no chat template; send the prompt as text instead (completions, text_input)", PARAM
            )

    def render(self, chat: Chat) -> str:
        """The chat as text: up to the beginning of the model's answer, or to the end of the message to continue."""
        self._check_variables(chat)
        messages = [self._adapted(message) for message in chat.messages]
        if chat.continue_final_message:
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + _CONTINUE}
        if not self._format.native:
            messages = with_tools_as_text(messages, chat.tools)
        try:
            text = self._render(chat, messages)
        except _Refusal as error:
            if self._format.native or not chat.tools or messages[0]["role"] != "system" or len(messages) < 2:
                raise _refused(error) from error
            try:
                text = self._render(chat, without_system(messages))
            except _Refusal as second:
                raise _refused(second) from second
        if chat.continue_final_message:
            text, marker, _ = text.rpartition(_CONTINUE)
            if not marker:
                raise InvalidRequest(
                    "this model's chat template does not write the last message, so it cannot be continued",
                    "continue_final_message",
                )
        return text

    def _render(self, chat: Chat, messages: list[Message]) -> str:
        try:
            return self._template.render(
                **{
                    **self._special_tokens,
                    **(effort_variables(self._source, chat.reasoning_effort) if chat.reasoning_effort else {}),
                    **chat.template_kwargs,
                    "messages": messages,
                    "add_generation_prompt": chat.add_generation_prompt,
                    # Templates test whether these are none, and not whether they are defined.
                    "tools": chat.tools if self._format.native else None,
                    "documents": chat.documents,
                }
            )
        except (CheckpointError, _Refusal):
            raise
        except SecurityError as error:
            raise CheckpointError(f"this model's chat template uses a forbidden operation: {error}") from error
        except Exception as error:  # a template is a program and may raise anything
            raise InvalidRequest(
                f"this model's chat template fails on these messages: {str(error)[:200]}", PARAM
            ) from error

    def _check_variables(self, chat: Chat) -> None:
        """Refuse what the template would ignore."""
        sent = {f"chat_template_kwargs.{name}": name for name in chat.template_kwargs}
        if chat.documents:
            sent["documents"] = "documents"
        for param, name in sent.items():
            if name in self._special_tokens or not self._mentions(name):
                raise InvalidRequest(f"this model's chat template has no variable {name}; leave it out", param)

    def _adapted(self, message: Message) -> Message:
        """The message in the words of this template."""
        if message["role"] == "developer" and not self._mentions("developer"):
            return {**message, "role": "system"}
        if "reasoning_content" in message and self._mentions("thinking"):
            return {**message, "thinking": message["reasoning_content"]}
        return message

    def _mentions(self, word: str) -> bool:
        return re.search(rf"\b{re.escape(word)}\b", self._source or "") is not None

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


def _refused(error: _Refusal) -> InvalidRequest:
    return InvalidRequest(f"this model's chat template refuses these messages: {error}", PARAM)


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
