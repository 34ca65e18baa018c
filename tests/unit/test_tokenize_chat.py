"""Chats in the model `tokenize`: messages, the checkpoint's chat template, and its sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes.checkpoints import CONTEXT, END, byte_level_tokenizer, write_checkpoint
from fakes.models import start_model
from fakes.tokenize_calls import accepted, refused
from tritonlm.contract import CheckpointError, InvalidRequest, NotOffered

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

# Starts the model with this chat template.
Start = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return start_model(
        "tokenize", write_checkpoint(tmp_path_factory.mktemp("repository") / "lm", chat_template=TEMPLATE)
    )


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return lambda **config: start_model("tokenize", write_checkpoint(tmp_path / "lm", **config))


def chat(*messages: tuple[str, object]) -> str:
    return json.dumps([{"role": role, "content": content} for role, content in messages])


class TestChat:
    def text(self, model: Any, messages: str) -> str:
        ids, _ = accepted(model, {"max_tokens": 1}, messages=messages)
        text: str = byte_level_tokenizer().decode(ids, skip_special_tokens=False)
        return text

    def test_the_template_renders_the_prompt(self, model: Any) -> None:
        assert self.text(model, chat(("user", "hello"), ("assistant", "猫"))) == (
            f"{END}user: hello\nassistant: 猫\nassistant:"
        )

    def test_a_chat_may_fill_the_context_when_max_tokens_is_not_sent(self, model: Any) -> None:
        ids, request = accepted(model, messages=chat(("user", "x")))
        assert request.parameters.max_tokens == CONTEXT - len(ids)

    def test_text_parts_are_joined(self, model: Any) -> None:
        parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "fox"}]
        assert "user: the\nfox\n" in self.text(model, chat(("user", parts)))

    def test_null_fields_are_ignored(self, model: Any) -> None:
        assert "user: x" in self.text(model, '[{"role": "user", "content": "x", "name": null}]')

    def test_a_message_is_never_evaluated_as_a_template(self, model: Any) -> None:
        assert "user: {{ 7 * 7 }}\n" in self.text(model, chat(("user", "{{ 7 * 7 }}")))

    @pytest.mark.parametrize(
        ("messages", "param"),
        [
            ("{", "messages"),
            ("[" * 100_000, "messages"),
            ("{}", "messages"),
            ("[]", "messages"),
            ("5", "messages"),
            ("[5]", "messages[0]"),
            ('[{"content": "x"}]', "messages[0].role"),
            ('[{"role": 5, "content": "x"}]', "messages[0].role"),
            ('[{"role": "", "content": "x"}]', "messages[0].role"),
            ('[{"role": "user"}]', "messages[0].content"),
            ('[{"role": "user", "content": null}]', "messages[0].content"),
            ('[{"role": "user", "content": 5}]', "messages[0].content"),
            ('[{"role": "user", "content": []}]', "messages[0].content"),
            ('[{"role": "user", "content": ["x"]}]', "messages[0].content[0]"),
            ('[{"role": "user", "content": [{"type": "text"}]}]', "messages[0].content[0]"),
            (
                '[{"role": "u", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}]',
                "messages[0].content[1]",
            ),
            ('[{"role": "a", "content": "x"}, {"role": "b", "content": "x", "tool_calls": []}]', "messages[1]"),
            ('[{"role": "user", "content": "\\ud800"}]', "messages"),
        ],
    )
    def test_invalid_messages_are_refused_with_their_path(self, model: Any, messages: str, param: str) -> None:
        error = refused(model, messages=messages)
        assert (type(error), error.param) == (InvalidRequest, param)

    def test_without_a_template_chats_are_refused(self, start: Start) -> None:
        error = refused(start(), messages=chat(("user", "x")))
        assert isinstance(error, NotOffered)
        assert "completions" in error.message

    @pytest.mark.parametrize(
        ("template", "text"),
        [
            # Lines with blocks only are removed.
            ("{% if true %}\n  {% for m in messages %}\n{{ m.content }}\n  {% endfor %}\n{% endif %}\n", "é<\n"),
            ("{{ messages | tojson }}", '[{"role": "user", "content": "é<"}]'),
            ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "é<"\n}'),
            ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "é<!"),
            ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
            ("{% if tools is not none or documents is not none %}tools{% else %}none{% endif %}", "none"),
            ("{{ strftime_now('%d') | length }}{{ pad_token }}.", "2."),
        ],
    )
    def test_templates_may_use_the_usual_features(self, start: Start, template: str, text: str) -> None:
        assert self.text(start(chat_template=template), chat(("user", "é<"))) == text

    def test_a_template_may_raise_an_exception(self, start: Start) -> None:
        template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first, please') }}{% endif %}x"
        model = start(chat_template=template)
        error = refused(model, messages=chat(("system", "x")))
        assert (type(error), error.param) == (InvalidRequest, "messages")
        assert "user first, please" in error.message
        assert accepted(model, messages=chat(("user", "x")))

    @pytest.mark.parametrize("template", ["{{ messages[5].content.x }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "  "])
    def test_a_failing_template_is_an_invalid_request(self, start: Start, template: str) -> None:
        model = start(chat_template=template.strip() + "{# nothing #}")
        error = refused(model, messages=chat(("user", "x")))
        assert (type(error), error.param) == (InvalidRequest, "messages")

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.__class__.__init__.__globals__ }}",
            "{{ raise_exception.__globals__['sys'] }}",
            "{{ strftime_now.__globals__['json'].codecs.open('/etc/passwd').read() }}",
            "{{ self.__init__.__globals__.__builtins__ }}",
            "{% set _ = messages.append(1) %}{{ messages }}",
            "{{ messages[0].update({'role': 'system'}) }}",
        ],
    )
    def test_a_template_cannot_leave_the_sandbox(self, start: Start, template: str) -> None:
        error = refused(start(chat_template=template), messages=chat(("user", "x")))
        assert isinstance(error, CheckpointError)
        assert "forbidden operation" in error.message

    def test_a_template_cannot_read_attributes_by_formatting(self, start: Start) -> None:
        model = start(chat_template="{{ '{0.__class__}'.format(messages) }}.")
        assert self.text(model, chat(("user", "x"))) == "."

    def test_a_template_cannot_loop_endlessly(self, start: Start) -> None:
        model = start(chat_template="{% for n in range(10000000) %}x{% endfor %}")
        assert "Range too big" in refused(model, messages=chat(("user", "x"))).message

    def test_completions_work_with_a_broken_template(self, start: Start) -> None:
        model = start(chat_template="{% for %}")
        error = refused(model, messages=chat(("user", "x")))
        assert isinstance(error, CheckpointError)
        assert "broken" in error.message
        assert accepted(model, text_input="x")
