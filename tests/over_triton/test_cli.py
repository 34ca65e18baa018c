"""The commands of `tritonlm` with a real Triton: output for people and scripts, and exit codes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tritonlm.cli import app
from typer.testing import CliRunner, Result

from .servers import LM, Server

pytestmark = pytest.mark.triton


def tritonlm(server: Server, *words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [*words, "--triton", server.grpc], input=stdin)


def test_list_and_status_as_table_and_as_json(server: Server) -> None:
    assert LM in tritonlm(server, "list").stdout
    (model,) = json.loads(tritonlm(server, "list", "--json").stdout)
    assert (model["id"], model["state"]) == (LM, "ready")
    status = json.loads(tritonlm(server, "status", "--json").stdout)
    assert status["engines"][LM]["slots"] == 64
    assert "1 language models ready" in tritonlm(server, "status").stdout


def test_status_watch_updates_until_interrupted(server: Server) -> None:
    command = [sys.executable, "-m", "tritonlm.cli", "status", "--watch", "--every", "0.2", "--triton", server.grpc]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        tables = 0
        for line in process.stdout:
            tables += LM in line
            if tables == 3:
                break
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(20) == 130


def test_generate_reads_an_argument_or_standard_input(server: Server) -> None:
    options = ("--max-tokens", "12", "--temperature", "0")
    result = tritonlm(server, "generate", "Once upon", *options)
    piped = tritonlm(server, "generate", "-", *options, stdin="Once upon")
    whole = json.loads(tritonlm(server, "generate", "Once upon", *options, "--json").stdout)
    assert result.exit_code == 0
    assert result.stdout == piped.stdout == whole["choices"][0]["text"] + "\n"


def test_an_output_follows_a_schema_a_regex_choices_and_a_grammar(server: Server, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "animal.json", tmp_path / "animal.lark"
    schema.write_text('{"type": "object", "properties": {"legs": {"enum": [2, 4]}}, "required": ["legs"], '
                      '"additionalProperties": false}', encoding="utf-8")  # fmt: skip
    grammar.write_text('start: ("fox" | "owl") "s"', encoding="utf-8")
    legs = tritonlm(server, "generate", "a", "--schema", str(schema), "--max-tokens", "60")
    assert legs.exit_code == 0, legs.stderr
    assert json.loads(legs.stdout)["legs"] in (2, 4)
    assert tritonlm(server, "generate", "a", "--choice", "yes", "--choice", "no").stdout in ("yes\n", "no\n")
    assert re.fullmatch("[ab]{3}\n", tritonlm(server, "generate", "a", "--regex", "[ab]{3}").stdout)
    assert tritonlm(server, "generate", "a", "--grammar", str(grammar)).stdout in ("foxs\n", "owls\n")
    cut = tritonlm(server, "generate", "a", "--schema", str(schema), "--max-tokens", "1")
    assert (cut.exit_code, "ended by length" in cut.stderr) == (1, True)
    # The server's refusal names the file and the place in it.
    schema.write_text('{"properties": {"a": {"contains": {}}}}', encoding="utf-8")
    refused = tritonlm(server, "generate", "a", "--schema", str(schema))
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"error: {schema}: contains is not supported (at")
    assert refused.stderr.count("\n") == 1


def test_chat_commands(small_server: Server) -> None:
    lines = "Once\n/system Be brief.\nAnd?\n/clear\n/help\n/quit\nnever\n"
    result = tritonlm(small_server, "chat", "--max-tokens", "4", "--temperature", "0", stdin=lines)
    assert result.exit_code == 0, result.output
    assert "/quit: exit" in result.stderr


def test_a_chat_continues_after_a_message_that_is_too_long(small_server: Server) -> None:
    result = tritonlm(small_server, "chat", "--max-tokens", "400", stdin=f"{'birds ' * 200}\n/quit\n")
    assert result.exit_code == 0
    assert "maximum context length" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("generate", "a", "--temperature", "3"), 2, "temperature must be"),
        (("generate", "a", "--model", "nope"), 2, "does not exist"),
        (("load", "nope"), 2, "does not exist"),
        (("chat",), 1, "chat template"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(server: Server, words: tuple[str, ...], code: int, message: str) -> None:
    result = tritonlm(server, *words, stdin="hello\n")
    assert result.exit_code == code
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


def test_without_a_triton_the_exit_code_is_3() -> None:
    result = CliRunner().invoke(app, ["list", "--triton", "127.0.0.1:9"])
    assert (result.exit_code, result.stderr) == (3, "error: no Triton answers at 127.0.0.1:9\n")


def test_unload_and_load(small_server: Server) -> None:
    assert "unavailable" in tritonlm(small_server, "unload", LM).stdout
    assert "ready" in tritonlm(small_server, "load", LM).stdout


def test_doctor_runs_all_checks() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    results = {row["check"]: row["ok"] for row in json.loads(result.stdout)}
    assert set(results) == {"machine", "Triton", "ports", "/dev/shm", "checkpoints"}
    assert results["Triton"]
    assert results["checkpoints"]
    assert result.exit_code == (0 if all(results.values()) else 1)


def test_complete_prints_one_line_per_completion(server: Server) -> None:
    options = ("--max-tokens", "8", "--temperature", "0")
    result = tritonlm(server, "complete", "Once upon", "Two\nlines", "-n", "2", *options)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert lines[0] == lines[1]
    piped = tritonlm(server, "complete", *options, stdin="Once upon\nTwo\n")
    assert piped.stdout.splitlines()[0] == lines[0]
    whole = json.loads(tritonlm(server, "complete", "Once upon", *options, "--logprobs", "1", "--json").stdout)
    assert whole["choices"][0]["text"].replace("\n", "\\n") == lines[0]
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == 8


def test_options_of_the_older_command_line_are_accepted(server: Server) -> None:
    words = ("generate", "--prompt", "Once upon", "--max_tokens", "8", "--temperature", "0", "--top_k", "5")
    assert tritonlm(server, *words).stdout == tritonlm(server, "generate", "Once upon", *words[3:]).stdout
    assert "ready" in tritonlm(server, "load", "--model_type", LM).stdout
    assert "ready" in tritonlm(server, "load", "--model_path", f"out/{LM}").stdout
    assert tritonlm(server, "load").exit_code == 2


def test_bench_reports_throughput(server: Server) -> None:
    words = ("bench", "--requests", "6", "--concurrency", "3", "--prompt-tokens", "4", "--max-tokens", "5")
    report = json.loads(tritonlm(server, *words, "--json").stdout)
    assert (report["model"], report["requests"]) == (LM, 6)
    assert report["tokens_per_second"] > 0
    assert "tokens per second" in tritonlm(server, *words).stdout


def test_embed_names_the_setting_that_enables_it(server: Server) -> None:
    result = tritonlm(server, "embed", "a")
    assert result.exit_code == 1
    assert "TRITONLM_ENABLE_EMBEDDINGS" in result.stderr
