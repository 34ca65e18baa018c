"""`tritonlm chat --tools`: calls are printed, and run only when asked to. With the fake transport."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.chat_templates import QWEN
from fakes.fake_transport import ABOUT_LM, LM, FakeTransport
from tritonlm import Client
from tritonlm.cli import app
from tritonlm.commands import chat as chat_command
from tritonlm.commands.chat import ChatSession
from tritonlm.commands.tool_functions import ToolFunctions
from tritonlm.contract import TimedOut
from typer.testing import CliRunner

CALL = '<tool_call>\n{"name": "rain", "arguments": {"city": "Bern"}}\n</tool_call>'


def rain(city: str) -> str:
    """Whether it rains."""
    return f"never in {city}"


@pytest.fixture
def transport() -> FakeTransport:
    transport = FakeTransport()
    transport.about = {**ABOUT_LM, "chat_template": QWEN}
    return transport


@pytest.fixture
def client(transport: FakeTransport) -> Iterator[Client]:
    with Client(transports=[transport]) as client:
        yield client


def sent_roles(transport: FakeTransport) -> list[str]:
    chat: Any = json.loads(transport.calls[-1].prompt.messages or "")
    return [message["role"] for message in chat["messages"]]


def test_a_call_is_only_printed(client: Client, transport: FakeTransport, capsys: pytest.CaptureFixture[str]) -> None:
    transport.answers = [["I look.", CALL], ["Dry."]]
    session = ChatSession(client, LM, "Be brief.", ToolFunctions({"rain": rain}), runs=False)
    session.send("Rain?", {})
    assert capsys.readouterr().out == "I look.\nwould call rain(city='Bern')\n"
    assert len(transport.calls) == 1
    session.send("And?", {})
    assert sent_roles(transport) == ["system", "user", "assistant", "tool", "user"]
    assert "has not run" in (transport.calls[-1].prompt.messages or "")


def test_a_call_is_run_when_asked_to(
    client: Client, transport: FakeTransport, capsys: pytest.CaptureFixture[str]
) -> None:
    transport.answers = [["<think>hm</think>", CALL], ["Dry."]]
    session = ChatSession(client, LM, None, ToolFunctions({"rain": rain}), runs=True)
    session.send("Rain?", {})
    captured = capsys.readouterr()
    assert captured.out == "\ncalls rain(city='Bern')\n  → never in Bern\nDry.\n"
    assert "hm" in captured.err
    assert sent_roles(transport) == ["user", "assistant", "tool"]


def test_a_model_that_only_calls_is_stopped(client: Client, transport: FakeTransport) -> None:
    transport.answers = [[CALL] for _ in range(20)]
    ChatSession(client, LM, None, ToolFunctions({"rain": rain}), runs=True).send("Rain?", {})
    assert len(transport.calls) == 8


def test_the_options_are_checked(tmp_path: Path) -> None:
    missing = CliRunner().invoke(app, ["chat", "--run-tools"])
    assert (missing.exit_code, "--run-tools needs --tools" in missing.output) == (2, True)
    wrong = CliRunner().invoke(app, ["chat", "--tools", str(tmp_path / "no.py")])
    assert (wrong.exit_code, "is no Python file" in wrong.output) == (1, True)


def test_a_mistyped_model_does_not_end_the_chat(
    client: Client, transport: FakeTransport, capsys: pytest.CaptureFixture[str]
) -> None:
    transport.answers = [["Dry."]]
    session = ChatSession(client, LM, None, None, runs=False)
    assert session.run_command("/model nope")
    assert "the model 'nope' does not exist" in capsys.readouterr().err
    session.send("Rain?", {})
    assert capsys.readouterr().out == "Dry.\n"


def test_a_busy_server_does_not_end_the_chat(
    client: Client, transport: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_command, "connected", lambda _: contextlib.nullcontext(client))
    transport.trouble = [TimedOut("time is up")]
    transport.answers = [["Dry."]]
    chat = CliRunner().invoke(app, ["chat", "--model", LM], input="Rain?\nRain?\n/exit\n")
    assert chat.exit_code == 0, chat.output
    assert [text in chat.output for text in ("time is up", "Dry.")] == [True] * 2
