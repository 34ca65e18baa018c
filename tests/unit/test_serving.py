"""The checks of `tritonlm serve` before Triton starts, with real ports and files; each error is one line."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.checkpoints import write_checkpoint
from fakes.ports import free_ports, port_variables
from tritonlm.access import control_secret as secret
from tritonlm.cli import app
from tritonlm.gateway.settings import GatewaySettings
from tritonlm.serving import ServingError, Settings, preflight
from tritonlm.serving.backend import PYTHON, Installation, assemble, find_installation, missing_libraries
from tritonlm.serving.control import one_line
from tritonlm.serving.paths import model_repository
from tritonlm.serving.ports import check_port, reachable_host
from tritonlm.serving.repository import find_language_model
from tritonlm.serving.settings import env_name, option_name
from tritonlm.serving.triton import triton_command, triton_environment
from typer.testing import CliRunner


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The model repository, with a checkpoint that has no weights."""
    copy = tmp_path / "models"
    for model in ("abacus", "tokenize", "generate", "detokenize"):
        (copy / model / "1").mkdir(parents=True)
        shutil.copy(model_repository() / model / "config.pbtxt", copy / model)
    write_checkpoint(copy / "abacus" / "1")
    return copy


def one_line_message(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_busy_port_error_names_the_option() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ServingError) as error:
            check_port("127.0.0.1", port, "HTTP", "http_port")
    for part in (str(port), "in use", "--http-port", "TRITONLM_HTTP_PORT"):
        assert part in one_line_message(error)
    check_port("127.0.0.1", port, "HTTP", "http_port")


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ServingError, match=r"cannot listen on 192\.0\.2\.1:8000"):
        check_port("192.0.2.1", 8000, "HTTP", "http_port")


@pytest.mark.parametrize("host", ["a" * 300, "no host", ".."])
def test_an_invalid_host_is_a_one_line_error(host: str) -> None:
    with pytest.raises(ServingError) as error:
        check_port(host, 8000, "HTTP", "http_port")
    assert host in one_line_message(error)


def test_too_little_shared_memory_is_an_error_with_sizes(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free // 2**20
    with pytest.raises(ServingError) as error:
        preflight.check_shared_memory(tmp_path, free + 1000)
    assert f"{free + 1000} are needed" in one_line_message(error)
    assert "--shm-size" in one_line_message(error)
    with pytest.raises(ServingError, match="mount a tmpfs"):
        preflight.check_shared_memory(tmp_path / "nowhere")


def test_a_missing_libpython_error_names_the_package(tmp_path: Path) -> None:
    installation = find_installation()
    backend = assemble(installation)
    environment = triton_environment(installation, Settings())
    preflight.check_libraries(installation, backend, environment)
    # Patch the stub to require a library that no machine has.
    library = f"libpython{PYTHON}.so".encode()
    stub = (backend / "python" / preflight.STUB).read_bytes()
    assert library in stub
    (tmp_path / "python").mkdir()
    broken = tmp_path / "python" / preflight.STUB
    broken.write_bytes(stub.replace(library, library.replace(b"python", b"pythom")))
    broken.chmod(0o755)
    assert missing_libraries(broken, environment) == [f"libpythom{PYTHON}.so.1.0"]
    broken.write_bytes(stub.replace(library, f"libpython{'9' * len(PYTHON)}.so".encode()))
    with pytest.raises(ServingError) as error:
        preflight.check_libraries(installation, tmp_path, environment)
    assert f"apt-get install libpython{PYTHON}" in one_line_message(error)


def test_the_backend_is_assembled_once() -> None:
    backend = assemble(find_installation())
    stamp = (backend / "python" / "STAMP").stat()
    assert assemble(find_installation()) == backend
    assert (backend / "python" / "STAMP").stat().st_mtime_ns == stamp.st_mtime_ns


def test_a_wheel_without_a_stub_for_this_python_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritonlm.serving.paths.cache", lambda: tmp_path / "cache")
    with pytest.raises(ServingError, match="has no Python backend for Python"):
        assemble(Installation(tmp_path, tmp_path, "0.0"))


def test_a_full_triton_installation_is_used_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's images contain the binary, the libraries and the Python backend in one folder."""
    monkeypatch.setenv("TRITONLM_TRITON_HOME", str(tmp_path))
    with pytest.raises(ServingError, match="contains no Triton"):
        find_installation()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").touch()
    installation = find_installation()
    assert installation.binary == tmp_path / "bin" / "tritonserver"
    assert assemble(installation) == tmp_path / "backends"


def test_a_configured_secret_is_used_by_triton_and_its_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(secret.VARIABLE, "shared with gateways elsewhere")
    assert secret.new_secret() == secret.secret_for("triton-1.somewhere:8001") == "shared with gateways elsewhere"
    monkeypatch.delenv(secret.VARIABLE)
    assert secret.new_secret() != secret.new_secret()


def test_find_language_model_returns_the_engine_and_the_checkpoint(repository: Path) -> None:
    model = find_language_model("abacus", [repository.parent / "models"])
    assert model.generate == "generate"
    assert model.sources == (repository / "abacus" / "1",)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nothing", "there is no nothing/config.pbtxt in"),
        ("generate", "generate is not a language model"),
        ("../abacus", "is not a valid model name"),
        ("..", "is not a valid model name"),
    ],
)
def test_find_language_model_refuses_other_names(repository: Path, name: str, text: str) -> None:
    with pytest.raises(ServingError, match=text) as error:
        find_language_model(name, [repository])
    one_line_message(error)


def test_an_ensemble_without_an_engine_is_refused(repository: Path) -> None:
    config = repository / "generate" / "config.pbtxt"
    config.write_text(config.read_text(encoding="utf-8").replace('"control"', '"remote"'), encoding="utf-8")
    with pytest.raises(ServingError, match="must have the input 'control', and 0 have it"):
        find_language_model("abacus", [repository])


def test_a_missing_repository_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="does not exist; name another with --model-repository"):
        find_language_model("abacus", [tmp_path / "nowhere"])


@pytest.mark.parametrize("broken", ["config.json", "tokenizer.json", "weights"])
def test_a_broken_checkpoint_ends_the_command_with_one_line_and_code_1(repository: Path, broken: str) -> None:
    if broken != "weights":
        (repository / "abacus" / "1" / broken).write_text("{", encoding="utf-8")
    result = CliRunner().invoke(
        app, ["serve", "--model-repository", str(repository), "--load", "abacus"], env=port_variables()
    )
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "abacus/1" in line


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "notes.txt",
            "notes.txt is neither a folder in Hugging Face format nor a GGUF file; give the folder that holds",
        ),
        ("nowhere.gguf", "there is no folder or GGUF file nowhere.gguf"),
        ("nowhere", "there is no folder or GGUF file nowhere; a model of the Hugging Face Hub is named ORG/NAME"),
        ("empty", "has no config.json; save it with save_pretrained()"),
        ("pickled", "has no *.safetensors weights; pickled weights are not loaded"),
        ("sharded", "has no model-00002-of-00002.safetensors, which model.safetensors.index.json lists"),
        (
            "quantized",
            "quantized cannot be loaded: quantization_config.quant_method is hqq, which is not read (awq, compressed",
        ),
        ("several", "several holds several GGUF files (a.gguf, b.gguf); name one"),
        ("x-generate=pickled", "a name must not end in tokenize, generate, detokenize"),
        ("abacus=pickled", "two language models are named abacus; name one as NAME=MODEL"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, message: str
) -> None:
    monkeypatch.setattr("tritonlm.serving.paths.cache", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    for folder in ("empty", "several"):
        (tmp_path / folder).mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "several" / name).write_bytes(b"GGUF")
    (write_checkpoint(tmp_path / "pickled") / "pytorch_model.bin").write_bytes(b"pickle")
    (write_checkpoint(tmp_path / "sharded") / "model-00001-of-00002.safetensors").write_bytes(b"")
    quantized = write_checkpoint(tmp_path / "quantized", config={"quantization_config": {"quant_method": "hqq"}})
    (quantized / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(shards), encoding="utf-8")
    result = CliRunner().invoke(app, ["serve", "--port", str(free_ports(1)[0]), model])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_an_open_address_without_a_key_is_refused_before_any_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITONLM_KEYS", str(tmp_path / "keys.json"))
    monkeypatch.setattr("tritonlm.serving.supervisor.serve", lambda *_: None)

    def serve(**variables: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0", "--port", str(free_ports(1)[0])], env=variables)
        return result.exit_code, result.stderr

    code, text = serve()
    assert code == 2
    assert text.startswith("error: listening on 0.0.0.0 without a key would give everybody access; create one with")
    assert text.count("\n") == 1
    assert serve(TRITONLM_ALLOW_ANONYMOUS="true") == (0, "")
    assert serve(TRITONLM_API_KEY="a long secret") == (0, "")
    assert serve(TRITONLM_MAX_RUNNING="none")[0] == 2


@pytest.mark.parametrize(
    ("field", "path", "problem"),
    [
        ("tls_certificate", "nowhere.pem", "must be a file that can be read, got"),
        ("tls_certificate", "folder", "must be a file that can be read, got"),
        ("tls_key", "nowhere.pem", "must be a file that can be read, got"),
        ("tls_key", "file", "needs --tls-certificate (TRITONLM_TLS_CERTIFICATE)"),
        ("triton_authorities", "nowhere.pem", "must be a file that can be read, got"),
        ("batch_folder", "file", "must be a folder that can be written, got"),
        ("batch_folder", "file/batches", "must be a folder that can be written, got"),
    ],
)
def test_what_the_gateway_cannot_use_is_refused_before_any_process_starts(
    field: str, path: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonlm.serving.supervisor.serve", lambda *_: None)
    monkeypatch.setattr("tritonlm.gateway.serve.asyncio.run", lambda served: served.close())
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    value = str(tmp_path / path)
    for words, environment in (
        (["gateway", option_name(field), value], {}),
        (["gateway"], {env_name(field): value}),
        (["serve"], {env_name(field): value}),
    ):
        result = CliRunner().invoke(app, [*words, "--port", str(free_ports(1)[0])], env=environment)
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {option_name(field)} ({env_name(field)})")
        assert problem in line


def test_a_folder_for_batches_that_does_not_exist_yet_is_accepted(tmp_path: Path) -> None:
    assert GatewaySettings(batch_folder=tmp_path / "new" / "batches").batch_folder == tmp_path / "new" / "batches"
    assert not (tmp_path / "new").exists()


def test_a_bad_option_ends_the_command_with_code_2() -> None:
    result = CliRunner().invoke(app, ["serve", "--device", "tpu"])
    assert result.exit_code == 2
    assert "--device (TRITONLM_DEVICE)" in result.stderr


def test_tritons_command_sets_the_address_and_restricts_the_control_api(tmp_path: Path) -> None:
    settings = Settings(model_repository=[tmp_path], triton_host="127.0.0.1", http_port=9000)
    command = triton_command(tmp_path / "tritonserver", tmp_path, settings, [tmp_path], "prefix-", "secret")
    for flag in ("--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1",
                 "--http-port=9000", "--model-control-mode=explicit"):  # fmt: skip
        assert flag in command
    restricted = [flag.partition("=")[2] for flag in command if "restricted" in flag]
    assert len(restricted) == 2
    for flag in restricted:
        kinds, _, key = flag.partition(":")
        assert {"model-repository", "shared-memory"} <= set(kinds.split(","))
        assert key == "tritonlm-control=secret"


@pytest.mark.parametrize(
    ("host", "expected"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("10.1.2.3", "10.1.2.3"), ("box", "box")],
)
def test_reachable_host(host: str, expected: str) -> None:
    assert reachable_host(host) == expected


@pytest.mark.parametrize("host", ["::1", "::"])
def test_triton_gets_an_ipv6_address_as_each_of_its_servers_writes_it(host: str, tmp_path: Path) -> None:
    """HTTP's takes ::1 for a broadcast address, gRPC's for a host and a port."""
    settings = Settings(model_repository=[tmp_path], triton_host=host)
    command = triton_command(tmp_path / "tritonserver", tmp_path, settings, [tmp_path], "prefix-", "secret")
    addresses = [f"--http-address=ipv6:{host}", f"--grpc-address=[{host}]", f"--metrics-address=ipv6:{host}"]
    assert [flag for flag in command if "-address=" in flag] == addresses


def test_a_triton_error_is_reduced_to_one_line() -> None:
    text = "failed to load, Internal: CheckpointError: no weights\n\nAt:\n  /a/secret/path.py(3): f\n"
    assert one_line(text) == "no weights"
    assert one_line("failed, Internal: Odd: thing\n\nAt:\n  /a/path.py(3): f\n") == "failed, Internal: Odd: thing"


def test_the_supervisor_imports_only_what_every_start_needs() -> None:
    """Two tenths of a second pass before Triton starts if it imports numpy and the client library."""
    modules = "tritonlm.cli, tritonlm.serving.supervisor, tritonlm.checkpoints.gguf"
    program = f"import {modules}, sys, json; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(json.loads(ran.stdout))
    assert "tritonlm.serving.reloader" in loaded
    assert not loaded & {"numpy", "torch", "tokenizers", "grpc", "fastapi", "tritonlm.client.sync", "huggingface_hub"}


def test_the_commands_that_need_no_client_import_none() -> None:
    commands = ("adapters", "checkpoints", "doctor", "inspect", "jobs", "keys", "merge", "registry", "train")
    modules = ", ".join(f"tritonlm.commands.{command}" for command in commands)
    program = f"import tritonlm.cli, {modules}, sys, json; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(json.loads(ran.stdout))
    assert "tritonlm.commands.train" in loaded
    assert not loaded & {"tritonlm.client.async_client", "tritonlm.client.types", "torch", "grpc", "fastapi"}
