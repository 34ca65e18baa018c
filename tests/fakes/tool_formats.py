"""Writes tool calls as models of each format do."""

from __future__ import annotations

import json
from typing import Any

from tritonlm.contract import tool_formats

Calls = list[tuple[str, dict[str, Any]]]

_JSON_WORDS = ("true", "false", "null", "NaN", "Infinity")
# Those that may have text before the first call.
FORMATS_WITH_TEXTS = (
    "hermes", "qwen_xml", "mistral", "mistral_args", "phi4", "gemma", "gemma4",
)  # fmt: skip


def write_calls(name: str, calls: Calls) -> str:
    """The text of the calls."""
    writers = {
        tool_formats.HERMES: lambda: "\n".join(f"<tool_call>\n{_json(*call)}\n</tool_call>" for call in calls),
        tool_formats.QWEN_XML: lambda: "\n".join(_xml(*call) for call in calls),
        tool_formats.LLAMA_JSON: lambda: "; ".join(_json(*call, key="parameters") for call in calls),
        tool_formats.PYTHONIC: lambda: f"[{', '.join(_python(*call) for call in calls)}]",
        tool_formats.MISTRAL: lambda: f"[TOOL_CALLS][{', '.join(_json(*call) for call in calls)}]",
        tool_formats.MISTRAL_ARGS: lambda: "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls),
        tool_formats.PHI4: lambda: f"<|tool_call|>[{', '.join(_json(*call) for call in calls)}]<|/tool_call|>",
        tool_formats.GEMMA: lambda: _gemma(calls, "<start_function_call>", "<end_function_call>", "<escape>"),
        tool_formats.GEMMA4: lambda: _gemma(calls, "<|tool_call>", "<tool_call|>", '<|"|>'),
        tool_formats.HARMONY: lambda: "".join(
            f"<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>{json.dumps(a)}" for n, a in calls
        ),
    }
    return writers[name]()


def _json(name: str, arguments: dict[str, Any], key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


def _python(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def _xml(name: str, arguments: dict[str, Any]) -> str:
    """Strings that read as JSON are told apart by a schema, so every value is written as JSON here."""
    values = "".join(f"<parameter={key}>\n{_xml_value(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def _xml_value(value: Any) -> str:
    """Plain words without quotation marks; a schema tells other strings from JSON, so they are written as JSON here."""
    return value if isinstance(value, str) and value.isalpha() and value not in _JSON_WORDS else json.dumps(value)


def _gemma(calls: Calls, begin: str, end: str, mark: str) -> str:
    def value(item: Any) -> str:
        if isinstance(item, str):
            return f"{mark}{item}{mark}"
        if isinstance(item, list):
            return f"[{','.join(map(value, item))}]"
        if isinstance(item, dict):
            return "{" + ",".join(f"{key}:{value(inner)}" for key, inner in item.items()) + "}"
        return json.dumps(item)

    return "".join(f"{begin}call:{name}{value(arguments)}{end}" for name, arguments in calls)
