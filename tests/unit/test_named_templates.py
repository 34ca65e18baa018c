"""Several chat templates of one checkpoint: the one named tool_use is for chats with tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes.checkpoints import write_checkpoint
from fakes.models import load_module
from tritonlm.checkpoints.texts import copy_texts
from tritonlm.client.chat_parsing.profile import ChatProfile
from tritonlm.contract import Checkpoint
from tritonlm.contract.tool_formats import HERMES, LLAMA_JSON, QWEN_XML

PLAIN = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
TOOL_USE = "{{ tools | length }} tools, write <tool_call>:" + PLAIN
# As Command R shows calls, which no format reads.
UNREAD = '{{ tools | length }} tools, write [{"tool_name": a, "parameters": b}]:' + PLAIN
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": template} for name, template in templates.items()]


def rendered(folder: Path, tool_format: str | None = None, **options: Any) -> str:
    encoder = load_module("tokenize", "prompt").PromptEncoder(Checkpoint(folder), tool_format)
    text: str = encoder.render(json.dumps({"messages": [{"role": "user", "content": "x"}], **options}))
    return text


def test_chats_with_tools_have_the_template_named_tool_use(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "lm", chat_template=named(default=PLAIN, tool_use=TOOL_USE))
    assert rendered(folder) == "[user]x"
    assert rendered(folder, tools=[TOOL]) == "1 tools, write <tool_call>:[user]x"
    assert ChatProfile.of(Checkpoint(folder).about).format.name == HERMES


def test_templates_in_files_come_before_those_of_the_configuration(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "lm", chat_template=named(default="other", tool_use="other"))
    (folder / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
    assert Checkpoint(folder).tool_use_template is None
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE, encoding="utf-8")
    assert rendered(folder, tools=[TOOL]) == "1 tools, write <tool_call>:[user]x"
    (tmp_path / "copy").mkdir()
    copy_texts(folder, tmp_path / "copy")
    assert Checkpoint(tmp_path / "copy").tool_use_template == TOOL_USE


def test_a_template_whose_calls_nothing_reads_is_not_used(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "lm", chat_template=named(default=PLAIN, tool_use=UNREAD))
    assert rendered(folder, tools=[TOOL]).startswith("[system]You may call functions")
    assert ChatProfile.of(Checkpoint(folder).about).format.name == HERMES
    # The setting says how they are read.
    assert rendered(folder, LLAMA_JSON, tools=[TOOL]).startswith("1 tools, write")


@pytest.mark.parametrize(
    ("default", "tool_use", "name", "reasons"),
    [
        (PLAIN, "{{ tools }}<function=", QWEN_XML, False), ("<think></think>", "{{ tools }}<function=", QWEN_XML, True),
        ("{{ tools }}<function=", UNREAD, QWEN_XML, False), ("<function=", None, QWEN_XML, False),
    ],
)  # fmt: skip
def test_the_format_of_calls_and_reasoning_are_those_of_either_template(
    default: str, tool_use: str | None, name: str, reasons: bool
) -> None:
    profile = ChatProfile.of({"chat_template": default, "tool_use_template": tool_use})
    assert (profile.format.name, profile.format.reasoning is not None) == (name, reasons)


def test_tokens_of_either_template_are_reported(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "lm", chat_template=named(default="{{ x }}", tool_use="{{ y }}<|end|>"))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.pop("bos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert list(Checkpoint(folder).about["chat_tokens"]) == ["<|end|>"]
