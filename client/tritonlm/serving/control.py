"""The few HTTP calls that the supervisor makes to its Triton: is it there, load, one token, engine commands.

It knows Triton's URLs. It does not know processes: whoever calls decides what a lost connection means.
"""

from __future__ import annotations

import ipaddress
import json
import re
from types import TracebackType
from typing import Any

import httpx

from tritonlm.contract.control import Command
from tritonlm.contract.errors import from_wire
from tritonlm.contract.tensors import CONTROL, INPUT_IDS, REPORT

from .errors import ServingError

_COMMAND_SECONDS = 5.0


def reachable_host(host: str) -> str:
    """The host to call when a server listens on this one, ready to stand in a URL."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return host if address.version == 4 else f"[{host}]"


def one_line(text: str) -> str:
    """Triton's error as one line: without the traceback's places, the machine-readable tail and line breaks."""
    text = re.split(r"\n\s*At:", text, maxsplit=1)[0]
    return " ".join(from_wire(text.strip()).message.split()).rstrip(";, ")


class TritonControl:
    def __init__(self, host: str, http_port: int) -> None:
        self.url = f"http://{reachable_host(host)}:{http_port}"
        # trust_env: a proxy has no business between a supervisor and its own child.
        self._http = httpx.Client(base_url=self.url, timeout=_COMMAND_SECONDS, trust_env=False)

    def __enter__(self) -> TritonControl:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def is_live(self) -> bool:
        try:
            return self._http.get("/v2/health/live").is_success
        except httpx.TransportError:
            return False

    def load(self, model: str, seconds: float) -> None:
        """Load a model, and the parts of an ensemble with it."""
        response = self._http.post(f"/v2/repository/models/{model}/load", json={}, timeout=seconds)
        _refuse_failure(response, f"{model} does not load")

    def loaded_engines(self) -> list[str]:
        """The `generate` parts of all language models that are loaded."""
        response = self._http.post("/v2/repository/index", json={"ready": True})
        _refuse_failure(response, "Triton does not list its models")
        names = [entry["name"] for entry in response.json() if entry.get("state") == "READY"]
        return [name for name in names if name.rpartition("-")[2] == "generate"]

    def generate_token(self, model: str, seconds: float) -> None:
        """The proof that an LM answers: one token for a prompt of one token, whatever its tokenizer knows."""
        body = {INPUT_IDS.name: [0], "max_tokens": 1, "temperature": 0}
        response = self._http.post(f"/v2/models/{model}/generate", json=body, timeout=seconds)
        _refuse_failure(response, f"{model} is loaded, but does not generate")

    def command(self, generate: str, command: Command) -> dict[str, Any]:
        """Give the engine of a `generate` model a command; return its report."""
        response = self._http.post(f"/v2/models/{generate}/generate", json={CONTROL.name: command.to_json()})
        _refuse_failure(response, f"{generate} refuses the command {command.name!r}")
        report = json.loads(response.json()[REPORT.name])
        assert isinstance(report, dict), f"a report is a JSON object, got {report!r}"
        return report


def _refuse_failure(response: httpx.Response, what: str) -> None:
    if response.is_success:
        return
    try:
        reason = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        reason = f"HTTP status {response.status_code}"
    raise ServingError(f"{what}: {one_line(reason)}")
