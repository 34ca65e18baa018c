"""Models of the Hub against a local server of its protocol: download, resume, check, cache, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes.adapter_folders import adapter_folder
from fakes.checkpoints import write_checkpoint
from fakes.hub_server import COMMIT, HubServer, hub_server
from fakes.ports import port_variables
from tritonlm.contract.adapters_file import read_adapters

WEIGHTS = "model.safetensors"
WEIGHT_BYTES = 25_000_000
# The Hub's library writes blocks of 10 MiB.
BLOCK = 10 << 20


@dataclass
class Machine:
    """The command line with a Hub and a cache of its own."""

    hub: HubServer
    home: Path

    def environment(self, **variables: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {**clean, **port_variables(), "HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.home), **variables}

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tritonlm.cli", *words]
        return subprocess.run(
            command, env=self.environment(**variables), capture_output=True, text=True, timeout=120, check=False
        )

    def pull(self, model: str, **variables: str) -> Path:
        """The path of the model, which must be there."""
        result = self.run("pull", model, "--json", **variables)
        assert result.returncode == 0, result.stderr
        return Path(json.loads(result.stdout)["path"])

    def refusal(self, *words: str, **variables: str) -> str:
        """The only line that a command prints, which must fail."""
        result = self.run(*words, **variables)
        assert result.returncode != 0, result.stdout
        (line,) = [line for line in result.stderr.splitlines() if not line.startswith("downloading")]
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    def parts(self) -> list[Path]:
        return list(self.home.rglob("*.tritonlm-part"))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    folder = write_checkpoint(tmp_path / "lm")
    (folder / WEIGHTS).write_bytes(os.urandom(WEIGHT_BYTES))
    (folder / "consolidated.safetensors").write_bytes(b"the same again")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.bin").write_bytes(b"another format")
    pickled = write_checkpoint(tmp_path / "pickled")
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    with hub_server(lm=folder, pickled=pickled) as hub:
        yield Machine(hub, tmp_path / "hf")


def test_a_model_is_downloaded_once_and_found_without_a_network(machine: Machine) -> None:
    path = machine.pull("org/lm")
    assert path == machine.home / "hub" / "models--org--lm" / "snapshots" / COMMIT
    assert (path / WEIGHTS).read_bytes() == (machine.hub.repositories["org/lm"] / WEIGHTS).read_bytes()
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    assert machine.hub.downloads(WEIGHTS) == [""]
    assert machine.pull("org/lm") == machine.pull("org/lm@v1") == path
    assert machine.hub.downloads(WEIGHTS) == [""]
    assert machine.pull("org/lm", HF_HUB_OFFLINE="1") == path
    assert machine.pull("org/lm", HF_ENDPOINT="http://127.0.0.1:9") == path
    assert machine.parts() == []


def test_a_lost_connection_is_resumed_within_one_download(machine: Machine) -> None:
    machine.hub.cut_after, machine.hub.cuts = 12_000_000, 2
    machine.pull("org/lm")
    assert machine.hub.downloads(WEIGHTS) == ["", f"bytes={BLOCK}-", f"bytes={2 * BLOCK}-"]


def test_a_killed_download_continues_where_it_stopped(machine: Machine) -> None:
    machine.hub.cut_after, machine.hub.cuts = 12_000_000, 1
    command = [sys.executable, "-m", "tritonlm.cli", "pull", "org/lm"]
    with subprocess.Popen(command, env=machine.environment(), stderr=subprocess.DEVNULL) as process:
        # The library waits a second before it asks for the rest.
        deadline = time.monotonic() + 60
        while not any(part.stat().st_size == BLOCK for part in machine.parts()):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    first = machine.hub.downloads(WEIGHTS)
    path = machine.pull("org/lm")
    assert machine.hub.downloads(WEIGHTS)[len(first) :] == [f"bytes={BLOCK}-"]
    assert (path / WEIGHTS).read_bytes() == (machine.hub.repositories["org/lm"] / WEIGHTS).read_bytes()
    assert machine.parts() == []


def test_a_damaged_download_is_fetched_again_and_then_refused(machine: Machine) -> None:
    machine.hub.replaced[WEIGHTS] = bytes(WEIGHT_BYTES)
    assert f"{WEIGHTS} of org/lm arrives damaged" in machine.refusal("pull", "org/lm")
    assert machine.hub.downloads(WEIGHTS) == ["", ""]
    machine.hub.replaced.clear()
    assert (machine.pull("org/lm") / WEIGHTS).stat().st_size == WEIGHT_BYTES


def test_two_processes_download_a_file_once(machine: Machine) -> None:
    command = [sys.executable, "-m", "tritonlm.cli", "pull", "org/lm"]
    processes = [
        subprocess.Popen(command, env=machine.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(3)
    ]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert machine.hub.downloads(WEIGHTS) == [""]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("hf://org/none", "the Hugging Face Hub has no model org/none; check the name, and for a private one set HF_"),
        (
            "elsewhere/step_2920",
            "the Hugging Face Hub has no model elsewhere/step_2920 and there is no folder elsewhere/step_2920; check",
        ),
        ("org/lm@v9", "org/lm has no revision v9"),
        ("org/pickled", "org/pickled has no safetensors weights, only pickled ones, which can run code"),
        ("org/lm:Q4_K_M", "org/lm has no GGUF files"),
    ],
)
def test_what_the_hub_does_not_have_is_refused_before_any_process_starts(
    machine: Machine, model: str, message: str
) -> None:
    for command in ("pull", "serve"):
        assert machine.refusal(command, model).startswith(message)
    assert not machine.hub.downloads("pytorch_model.bin")


def test_a_model_that_is_nowhere(machine: Machine) -> None:
    assert machine.refusal("serve", "org/lm", HF_HUB_OFFLINE="1").startswith(
        "org/lm is not on this machine, there is no folder org/lm, and HF_HUB_OFFLINE is set"
    )
    unreachable = machine.refusal("serve", "hf://org/lm", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.startswith("org/lm is not on this machine, and http://127.0.0.1:9 does not answer")


def test_a_hub_that_fails_does_not_hide_what_is_on_this_machine(machine: Machine) -> None:
    path = machine.pull("org/lm")
    machine.hub.failure = 500
    assert machine.pull("org/lm") == path
    assert machine.refusal("pull", "hf://org/other").startswith("org/other is not on this machine, and http://127")
    machine.hub.failure = 418
    assert "the Hugging Face Hub refuses org/lm (HTTP status 418)" in machine.refusal("pull", "org/lm")


def test_private_and_gated_models_need_a_token(machine: Machine) -> None:
    machine.hub.token = "hf_secret"
    unknown = machine.refusal("pull", "hf://org/lm")
    assert "no model org/lm; check the name, and for a private one set HF_TOKEN" in unknown
    wrong = machine.refusal("pull", "hf://org/lm", HF_TOKEN="hf_wrong")
    assert "no model org/lm; check the name, and the token that is set has no access" in wrong
    machine.hub.token, machine.hub.gated = "", {"org/lm"}
    gated = machine.refusal("pull", "org/lm")
    assert (
        gated
        == f"org/lm is gated: accept its terms at {machine.hub.endpoint}/org/lm, and set HF_TOKEN to a token of yours"
    )
    assert machine.hub.downloads(WEIGHTS) == []
    machine.hub.token = "hf_secret"
    # The token is sent to the Hub, and not to the host of the files, which would refuse it.
    assert machine.pull("org/lm", HF_TOKEN="hf_secret").is_dir()


def test_an_incomplete_cache_is_named_without_a_network(machine: Machine) -> None:
    path = machine.pull("org/lm")
    (path / WEIGHTS).unlink()
    message = machine.refusal("pull", "org/lm", HF_HUB_OFFLINE="1")
    assert message.startswith(f"org/lm is not complete on this machine ({WEIGHTS} is missing)")


def test_an_adapter_is_downloaded_once_without_other_files(tmp_path: Path) -> None:
    pirate, folder = adapter_folder(tmp_path / "pirate"), tmp_path / "adapters"
    (pirate / "optimizer.pt").write_bytes(b"of the training")
    with hub_server(pirate=pirate) as hub:
        machine = Machine(hub, tmp_path / "hf")
        add = ("adapters", "add", "pirate", "--base", "lm", "--path", "org/pirate", "--replace")
        variables = {"TRITONLM_ADAPTERS_FOLDER": str(folder)}
        assert machine.run(*add, **variables).returncode == 0
        entry = read_adapters(folder / "lm.json")["pirate"]
        assert entry.source == "org/pirate"
        assert sorted(file.name for file in Path(entry.path).iterdir()) == [
            "adapter_config.json", "adapter_model.safetensors"
        ]  # fmt: skip
        assert (Path(entry.path) / "adapter_model.safetensors").read_bytes() == b"weights"
        assert len(hub.downloads("adapter_model.safetensors")) == 1
        hub.failure = 503
        assert machine.run(*add, HF_HUB_OFFLINE="1", **variables).returncode == 0
        assert "org/ghost" in machine.refusal(*add[:-2], "org/ghost", **variables)
