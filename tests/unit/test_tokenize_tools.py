"""Chats with tools in the model `tokenize`: what templates get, and templates that know no tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import chat_templates
from fakes.checkpoints import END, byte_level_tokenizer, write_checkpoint
from fakes.fake_pb_utils import InferenceRequest
from fakes.models import load_module, start_model
from fakes.tokenize_calls import ids_of, refused
from tritonlm.contract import CheckpointError, InvalidRequest
from tritonlm.contract.tensors import MESSAGES, RENDERED_PROMPT, TEXT_INPUT

messages = load_module("tokenize", "messages")
chat = load_module("tokenize", "chat")
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}},
}
CALL_ID = "abcdefghi"
CALLS = [{"id": CALL_ID, "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}]
HISTORY = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": CALLS, "reasoning_content": "I ask."},
    {"role": "tool", "tool_call_id": CALL_ID, "content": "rain"},
]


def render(template: str, history: list[dict[str, Any]], **options: Any) -> str:
    fields = {"messages": history, **options}
    rendered: str = chat.ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"}).render(
        messages.read_chat(json.dumps(fields))
    )
    return rendered


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (
            chat_templates.QWEN,
            ['"name": "weather"', '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>',
             "<think>\nI ask.\n</think>", "<tool_response>\nrain\n</tool_response>", "<|im_start|>assistant\n"],
        ),
        (
            chat_templates.LLAMA,
            ['{"name": "weather", "parameters": {"city": "Zürich"}}<|eot_id|>', 'ipython<|end_header_id|>\n\n"rain"'],
        ),
        (
            chat_templates.MISTRAL,
            ['[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Zürich"}, "id": "abcdefghi"}]</s>',
             '[TOOL_RESULTS]{"content": "rain", "call_id": "abcdefghi"}'],
        ),
        (
            chat_templates.GEMMA,
            ["<start_function_call>call:weather{city:Zürich}", "response:weather{value:<escape>rain<escape>}"],
        ),
        (
            chat_templates.HARMONY,
            ["analysis<|message|>I ask.<|end|>",
             'to=functions.weather<|channel|>commentary json<|message|>{"city": "Zürich"}',
             '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"rain"'],
        ),
    ],
    ids=["qwen", "llama", "mistral", "gemma", "harmony"],
)  # fmt: skip
def test_the_families_templates_get_calls_and_results(template: str, parts: list[str]) -> None:
    text = render(template, HISTORY, tools=[TOOL])
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (chat_templates.QWEN, '<tools>\n{"type": "function", "function": {"name": "weather"'),
        (chat_templates.LLAMA, '"name": "weather"'), (chat_templates.MISTRAL, "[AVAILABLE_TOOLS][{"),
        (chat_templates.PHI4, "<|tool|>[{"), (chat_templates.HARMONY, "type weather ="),
        (chat_templates.GEMMA, "<start_function_declaration>weather"),
    ],
)  # fmt: skip
def test_the_families_templates_show_the_tools(template: str, shown: str) -> None:
    history = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]
    assert shown in render(template, history, tools=[TOOL])
    assert shown not in render(template, history)


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    history = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "x"}]
    assert "<|im_start|>system\nBe brief." in render(chat_templates.QWEN, history)
    assert "<|start|>developer" in render(chat_templates.HARMONY, history)


def test_a_template_without_tools_gets_a_text() -> None:
    template = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    history = [{"role": "system", "content": "Be brief."}, *HISTORY, {"role": "tool", "content": "sun"}]
    text = render(template, history, tools=[TOOL])
    assert text.startswith("[system]Be brief.\n\nYou may call functions")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text
    assert '[assistant]<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>[user]' in text
    assert text.endswith("[user]<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>")
    assert "You may call" not in render(template, history)


def test_where_a_system_message_is_refused_the_text_begins_the_chat() -> None:
    text = render(chat_templates.PLAIN, HISTORY, tools=[TOOL])
    assert text.startswith("[user]You may call functions")
    assert "</tool_call>\n\nWeather?[assistant]<tool_call>" in text
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        render(chat_templates.PLAIN, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], tools=[TOOL])


class TestOptions:
    COUNT = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one, two, "}]  # noqa: RUF012

    def test_the_last_message_can_be_continued(self) -> None:
        for template in (chat_templates.QWEN, chat_templates.PLAIN, chat_templates.LLAMA, chat_templates.REASONING):
            text = render(template, self.COUNT, continue_final_message=True)
            assert text.endswith("one, two, "), text

    @pytest.mark.parametrize(
        ("history", "options", "param"),
        [
            (HISTORY, {}, "continue_final_message"), (HISTORY[:2], {}, "continue_final_message"),
            (HISTORY[:1], {}, "continue_final_message"),
            ([{"role": "assistant", "content": "x"}], {"add_generation_prompt": True}, "add_generation_prompt"),
        ],
    )  # fmt: skip
    def test_only_a_text_of_the_assistant_is_continued(
        self, history: list[dict[str, Any]], options: dict[str, Any], param: str
    ) -> None:
        with pytest.raises(InvalidRequest) as error:
            render(chat_templates.QWEN, history, continue_final_message=True, **options)
        assert error.value.param == param

    def test_a_template_that_drops_the_message_cannot_continue_it(self) -> None:
        with pytest.raises(InvalidRequest, match="cannot be continued"):
            render("{{ messages[0].content }}", self.COUNT, continue_final_message=True)

    def test_the_generation_prompt_can_be_left_out(self) -> None:
        assert not render(chat_templates.QWEN, HISTORY[:1], add_generation_prompt=False).endswith("assistant\n")

    def test_variables_of_the_template(self) -> None:
        text = render(chat_templates.QWEN, HISTORY[:1], chat_template_kwargs={"enable_thinking": False})
        assert text.endswith("<think>\n\n</think>\n\n")
        assert "Reasoning: high" in render(
            chat_templates.HARMONY, HISTORY[:1], chat_template_kwargs={"reasoning_effort": "high"}
        )

    @pytest.mark.parametrize(
        ("effort", "ending"), [("none", "<think>\n\n</think>\n\n"), ("low", "assistant\n"), (None, "assistant\n")]
    )
    def test_the_effort_switches_reasoning(self, effort: str | None, ending: str) -> None:
        assert render(chat_templates.QWEN, HISTORY[:1], reasoning_effort=effort).endswith(ending)

    def test_the_effort_is_one_of_several_variables(self) -> None:
        template = "{{ thinking is defined }} {{ thinking }} {{ reasoning_effort }} {{ enable_thinking }}"
        assert render(template, HISTORY[:1], reasoning_effort="high") == "True True high True"
        assert render(template, HISTORY[:1], reasoning_effort="none") == "True False  False"
        own = {"reasoning_effort": "max"}
        assert render(template, HISTORY[:1], reasoning_effort="low", chat_template_kwargs=own) == "True True max True"

    def test_a_template_without_the_effort_s_variables_is_rendered(self) -> None:
        assert render("{{ messages[0].content }}", HISTORY[:1], reasoning_effort="low") == "Weather?"

    def test_documents(self) -> None:
        template = "{% for document in documents %}{{ document.text }}{% endfor %}"
        assert render(template, HISTORY[:1], documents=[{"text": "a"}, {"text": "b"}]) == "ab"

    @pytest.mark.parametrize(
        ("options", "param"),
        [
            ({"chat_template_kwargs": {"enable_thought": True}}, "chat_template_kwargs.enable_thought"),
            ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
            ({"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs.eos_token"),
            ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs.tools"),
            ({"chat_template_kwargs": {"enable_thinking": "x" * 20_000}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {f"v{n}": 1 for n in range(33)}}, "chat_template_kwargs"),
            ({"documents": [{"text": "a"}]}, "documents"), ({"documents": ["a"]}, "documents"),
            ({"tools": {}}, "tools"), ({"add_generation_prompt": 1}, "add_generation_prompt"), ({"turns": 1}, "turns"),
            ({"reasoning_effort": "huge"}, "reasoning_effort"), ({"reasoning_effort": 1}, "reasoning_effort"),
        ],
    )  # fmt: skip
    def test_what_the_template_would_ignore_is_refused(self, options: dict[str, Any], param: str) -> None:
        with pytest.raises(InvalidRequest) as error:
            render(chat_templates.QWEN, HISTORY[:1], **options)
        assert error.value.param == param


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "messages[0]"),
        ({"role": "user", "content": "x", "tool_calls": CALLS}, "messages[0]"),
        ({"role": "user", "content": "x", "name": "Ada"}, "messages[0]"),
        ({"role": "assistant", "content": "x", "audio": {}}, "messages[0]"),
        ({"role": "assistant", "content": None}, "messages[0].content"),
        ({"role": "assistant", "tool_calls": {}}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"id": 5, "function": {"name": "f"}}]}, "messages[0].tool_calls[0].id"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"role": "assistant", "content": "x", "reasoning_content": 5}, "messages[0].reasoning_content"),
        ({"role": "tool", "tool_call_id": "1"}, "messages[0].content"),
    ],
)  # fmt: skip
def test_wrong_messages_are_refused_with_their_path(message: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        render(chat_templates.QWEN, [message])
    assert error.value.param == param


def test_empty_lists_of_an_echoed_answer_are_ignored() -> None:
    echoed = {"role": "assistant", "content": "x", "tool_calls": [], "annotations": [], "audio": None}
    assert "x<|im_end|>" in render(chat_templates.QWEN, [{"role": "user", "content": "a"}, echoed])


class TestModel:
    def start(self, folder: Path, **parameters: str) -> Any:
        return start_model(
            "tokenize", write_checkpoint(folder / "lm", chat_template=chat_templates.PLAIN), **parameters
        )

    def rendered(self, model: Any, text: str) -> str:
        request = InferenceRequest({MESSAGES.name: MESSAGES.pack(text)}, [RENDERED_PROMPT.name])
        (response,) = model.execute([request])
        assert response.error() is None, response.error().message()
        (tensor,) = response.output_tensors()
        return RENDERED_PROMPT.text(tensor.as_numpy())

    def test_a_chat_as_an_object_is_tokenized_as_it_is_rendered(self, tmp_path: Path) -> None:
        model = self.start(tmp_path)
        text = json.dumps({"messages": HISTORY[:1], "tools": [TOOL]})
        rendered = self.rendered(model, text)
        assert "You may call functions" in rendered
        assert byte_level_tokenizer().decode(ids_of(model, messages=text), skip_special_tokens=False) == rendered

    def test_an_unknown_format_is_refused_at_the_start(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="tool_format must be auto or one of"):
            self.start(tmp_path, tool_format="xml")
        with pytest.raises(CheckpointError, match="tool_format must be auto or one of"):
            start_model("tokenize", write_checkpoint(tmp_path / "other", tool_format="xml"))

    def test_rendering_needs_messages(self, tmp_path: Path) -> None:
        model = self.start(tmp_path)
        assert refused(model, messages='{"messages": []}').param == "messages"
        request = InferenceRequest({TEXT_INPUT.name: TEXT_INPUT.pack("x")}, [RENDERED_PROMPT.name])
        (response,) = model.execute([request])
        assert "rendered_prompt needs messages" in response.error().message()


def test_the_checkpoint_reports_the_tokens_that_matter_in_a_chat(tmp_path: Path) -> None:
    from tritonlm.contract import Checkpoint  # noqa: PLC0415

    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<tool_call>", "<unused1>"])
    tokenizer.add_special_tokens(["<|im_start|>"])
    folder = write_checkpoint(
        tmp_path / "lm", tokenizer, chat_template=chat_templates.QWEN, response_template={"fields": {}},
        tool_format="phi4",
    )  # fmt: skip
    about = Checkpoint(folder).about
    ids = {text: tokenizer.token_to_id(text) for text in ("<tool_call>", "<|im_start|>", END)}
    assert about["chat_tokens"] == {
        "<tool_call>": [ids["<tool_call>"], False], "<|im_start|>": [ids["<|im_start|>"], True], END: [ids[END], True],
    }  # fmt: skip
    assert (about["tool_format"], about["response_template"]) == ("phi4", {"fields": {}})
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    assert Checkpoint(folder).about["chat_tokens"] == {}
