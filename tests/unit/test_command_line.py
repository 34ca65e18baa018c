"""The command line in unusual surroundings: closed standard streams, variables with spaces, brackets in names."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes.fake_transport import LM, FakeTransport
from tritonlm import AsyncClient
from tritonlm.checkpoints.gguf.folder import _cache as gguf_cache
from tritonlm.cli import app
from tritonlm.commands import bench
from tritonlm.commands.common import addresses, console
from tritonlm.commands.watch import table
from tritonlm.contract import CheckpointError
from tritonlm.contract.adapters_file import AdapterEntry, adapters_file, add_adapter
from tritonlm.serving import ServingError, paths, terminal
from typer.testing import CliRunner

DEFAULT = ["127.0.0.1:8001"]


@pytest.mark.parametrize("closed", [(0,), (0, 1), (0, 1, 2)])
def test_standard_streams_that_are_closed_are_those_of_dev_null(closed: tuple[int, ...], tmp_path: Path) -> None:
    """Otherwise the gateway's socket got number 0, and the gateway lost it."""
    program = (
        "import json, os, sys, types, tritonlm.__main__ as program\n"
        "sys.modules['tritonlm.cli'] = types.SimpleNamespace(app=lambda: None)\n"
        "program.main()\n"
        "print('text', flush=True)\n"
        "found = [os.open('/', 0) > 2, sys.stdin.read(), *(os.get_inheritable(number) for number in range(3))]\n"
        "open(sys.argv[1], 'w').write(json.dumps(found))\n"
    )

    def close() -> None:
        for number in closed:
            os.close(number)

    result = tmp_path / "result"
    subprocess.run(
        [sys.executable, "-c", program, str(result)], preexec_fn=close, timeout=60, check=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert json.loads(result.read_text()) == [True, "", True, True, True]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # As typer reads TRITONLM_TRITON="a:1, b:2".
        (["a:1,", "b:2"], ["a:1", "b:2"]),
        (["a:1, b:2"], ["a:1", "b:2"]),
        (["a:1,"], ["a:1"]),
        ([","], DEFAULT),
        (None, DEFAULT),
    ],
)
def test_addresses_may_have_spaces_behind_their_commas(words: list[str] | None, expected: list[str]) -> None:
    assert addresses(words) == expected


def test_doctor_names_a_variable_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONLM_PORT", "abc")
    result = CliRunner().invoke(app, ["doctor"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--port (TRITONLM_PORT)" in result.stderr


def test_brackets_in_a_path_are_shown(tmp_path: Path) -> None:
    add_adapter(adapters_file(tmp_path, "lm"), "pirate", AdapterEntry("/r[lr]", "", ""))
    result = CliRunner().invoke(app, ["adapters", "list", "--adapters-folder", str(tmp_path)])
    assert "/r[lr]" in result.stdout


def test_brackets_in_a_name_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONLM_TRITON", "127.0.0.1:1")
    result = CliRunner().invoke(app, ["load", "[/x]"])
    assert (result.exit_code, result.exception.__class__) == (3, SystemExit)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with terminal.step("merging /r[/x]") as update:
        update("merging /r[/y]")


def test_waiting_requests_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (
        "running", "finished", "refused", "tokens_per_second", "blocks_used", "prompt_tokens", "cached_tokens", "slots",
    )  # fmt: skip
    report = dict.fromkeys(numbers, 0) | {"blocks": 8, "waiting": 3}
    with console.capture() as shown:
        console.print(table({"lm": [report]}))
    assert " 3 " in shown.get()


@pytest.mark.parametrize("name", ["stderr", "stdout"])
def test_a_server_goes_on_when_nobody_reads_its_messages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `tritonlm serve 2>&1 | head`: the message of a restart would end the server instead."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", closefd=False)
    monkeypatch.setattr(sys, name, stream)
    terminal.say("Triton ended unexpectedly: restarting it")
    terminal.show_banner("tritonlm is serving")
    with contextlib.suppress(OSError):
        stream.close()
    os.close(writer)


@pytest.mark.parametrize(
    ("call", "variable"),
    [(paths.cache, "XDG_CACHE_HOME"), (paths.keys, "XDG_CONFIG_HOME"), (gguf_cache, "XDG_CACHE_HOME")],
)
def test_a_user_without_a_home_is_an_error_with_a_remedy(
    call: Callable[[], Path], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs as a number which /etc/passwd does not have."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(paths, "in_checkout", lambda: False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises((ServingError, CheckpointError), match=f"set HOME or {variable}"):
        call()


def test_bench_finds_an_adapter_by_its_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = FakeTransport()
    transport.adapters_file = adapters_file(tmp_path, LM)
    add_adapter(transport.adapters_file, "pirate", AdapterEntry("/pirate", "", ""))
    monkeypatch.setenv("TRITONLM_ADAPTERS_FOLDER", str(tmp_path))
    monkeypatch.setattr(bench, "AsyncClient", lambda _, **rest: AsyncClient(transports=[transport], **rest))
    result = CliRunner().invoke(app, ["bench", "--model", "pirate", "--requests", "2", "--json"])
    assert (result.exit_code, transport.calls[-1].parameters["adapter"]) == (0, "pirate")
