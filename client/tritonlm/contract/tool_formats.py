"""How a checkpoint writes tool calls and reasoning: names of the formats, their markers, recognition by chat template.

`tokenize` renders tools by it, and the client library parses answers by it. It knows texts of templates, and neither
jinja nor parsers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import CheckpointError

HERMES, QWEN_XML, LLAMA_JSON, PYTHONIC = "hermes", "qwen_xml", "llama3_json", "pythonic"
MISTRAL, MISTRAL_ARGS, PHI4, GEMMA, GEMMA4, HARMONY = (
    "mistral", "mistral_args", "phi4", "gemma", "gemma4", "harmony",
)  # fmt: skip
FORMATS = (HERMES, QWEN_XML, LLAMA_JSON, PYTHONIC, MISTRAL, MISTRAL_ARGS, PHI4, GEMMA, GEMMA4, HARMONY)
# The default of the setting `tool_format`: recognized from the chat template.
AUTO = "auto"
SETTING, VARIABLE = "tool_format", "TRITONLM_TOOL_FORMAT"

# The texts by which a chat template is recognized, first match first.
_SIGNS: tuple[tuple[str, str], ...] = (
    ("<|channel|>", HARMONY),
    ("[ARGS]", MISTRAL_ARGS),
    ("[TOOL_CALLS]", MISTRAL),
    ("<|tool_call>", GEMMA4),
    ("<start_function_call>", GEMMA),
    ("<|tool_call|>", PHI4),
    ("<|tool|>", PHI4),
    ("<function=", QWEN_XML),
    ("<tool_call>", HERMES),
    ("[func_name1(", PYTHONIC),
    ("<|python_start|>", PYTHONIC),
    ("<|python_tag|>", LLAMA_JSON),
    ('"parameters":', LLAMA_JSON),
)
# How templates of calls that no format reads show them: Command R's list of tool_name and parameters.
_UNREAD = '"tool_name":'
# Begin and end of reasoning, by the end's text in a chat template.
_REASONING: tuple[tuple[str, str], ...] = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_GEMMA4_REASONING = ("<|channel>", "<channel|>")
# How much a model reasons, as OpenAI and Anthropic name it, least first.
EFFORT = "reasoning_effort"
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS: tuple[str, ...] = get_args(Effort)
# Tokens with a meaning in answers; those of a tokenizer among them are reported to the client.
MARKERS = frozenset(
    {
        "<tool_call>", "</tool_call>", "<|python_tag|>", "<|python_start|>", "<|python_end|>", "[TOOL_CALLS]", "[ARGS]",
        "[CALL_ID]", "<|tool_call|>", "<|/tool_call|>", "<start_function_call>", "<end_function_call>", "<escape>",
        "<|tool_call>", "<tool_call|>", '<|"|>', "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>",
        "<|return|>", "<|constrain|>", "<think>", "</think>", "[THINK]", "[/THINK]", "<|channel>", "<channel|>",
    }
)  # fmt: skip


@dataclass(frozen=True)
class ToolFormat:
    """How a checkpoint's answers are written."""

    name: str
    # Begin and end of reasoning inside an answer; harmony has channels instead.
    reasoning: tuple[str, str] | None = None
    # Whether the chat template shows tools to the model by itself.
    native: bool = False


def tool_format_of(template: str | None, setting: str | None = None) -> ToolFormat:
    """The format of a chat template, or the one that the setting names."""
    source = template or ""
    native = re.search(r"\btools\b", source) is not None
    name = setting if setting and setting != AUTO else next((name for sign, name in _SIGNS if sign in source), HERMES)
    if name not in FORMATS:
        raise CheckpointError(f"{SETTING} must be {AUTO} or one of {', '.join(FORMATS)} (got {name[:60]!r})")
    return ToolFormat(name, _reasoning_of(name, source), native)


def tool_template(template: str | None, tool_use: str | None, setting: str | None = None) -> str | None:
    """The template of chats with tools: that named tool_use if its calls can be read, else the one of all chats."""
    if not tool_use or template is None:
        return template
    is_known = bool(setting) and setting != AUTO
    is_recognized = _UNREAD not in tool_use and any(sign in tool_use for sign, _ in _SIGNS)
    return tool_use if is_known or is_recognized else template


def _reasoning_of(name: str, source: str) -> tuple[str, str] | None:
    if name == HARMONY:
        return None
    if name == GEMMA4:
        return _GEMMA4_REASONING if _GEMMA4_REASONING[0] in source else None
    return next((pair for pair in _REASONING if pair[1] in source), None)


def may_begin_in_reasoning(template: str | None, reasoning: tuple[str, str]) -> bool:
    """Whether some prompts of this template end inside reasoning, so that answers begin there."""
    source = template or ""
    end = source[source.rfind("add_generation_prompt") :] if "add_generation_prompt" in source else ""
    begin, close = map(re.escape, reasoning)
    # An empty pair, which switches reasoning off, is closed.
    return re.search(begin, re.sub(rf"{begin}(?:\s|\\n)*{close}", "", end)) is not None


def effort_variables(template: str | None, effort: str) -> dict[str, Any]:
    """What of a chat template's variables says how much the model reasons, and whether; empty where it has none."""
    thinks = effort != EFFORTS[0]
    variables = {"enable_thinking": thinks, "thinking": thinks, **({EFFORT: effort} if thinks else {})}
    return {name: value for name, value in variables.items() if re.search(rf"\b{name}\b", template or "")}


def chat_tokens(added_tokens: Mapping[str, tuple[int, bool]], template: str | None, special: Mapping[str, str]) -> Any:
    """The added tokens that matter in a chat, ready for JSON: {text: [id, whether it is special]}."""
    source, named = template or "", set(special.values())
    return {
        text: list(entry)
        for text, entry in added_tokens.items()
        if text in MARKERS or text in named or (len(text) > 2 and text in source)
    }
