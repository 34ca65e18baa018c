"""The few HTTP calls that the supervisor makes to its Triton: is it there, load, one token, engine commands.

It knows Triton's URLs. It does not know processes: whoever calls decides what a lost connection means.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from tritonlm.access import control_secret as secret
from tritonlm.contract import Broken, Chunk
from tritonlm.contract.control import PING, Command
from tritonlm.contract.errors import from_wire
from tritonlm.contract.parts import GENERATE, PARTS, TOKENIZE, part_of
from tritonlm.contract.tensors import CHUNK, CONTROL, INPUT_IDS, REPORT

from .errors import ServingError
from .ports import reachable_host

_COMMAND_SECONDS = 5.0
_PATIENCE_SECONDS, _POLL_SECONDS, _FAILED_LOOKS = 2.0, 0.1, 5


@dataclass(frozen=True)
class Sign:
    """What a process's ping has shown: whether it answered, and how long its work has made no progress."""

    answered: bool
    still_seconds: float = 0.0


def one_line(text: str) -> str:
    """Triton's error as one line: without the traceback's places, the machine-readable tail and line breaks."""
    text = re.split(r"\n\s*At:", text, maxsplit=1)[0]
    return " ".join(from_wire(text.strip()).message.split()).rstrip(";, ")


class TritonControl:
    def __init__(self, host: str, http_port: int) -> None:
        self.url = f"http://{reachable_host(host)}:{http_port}"
        # trust_env: a proxy has no business between a supervisor and its own child.
        self._http = httpx.Client(base_url=self.url, timeout=_COMMAND_SECONDS, trust_env=False)
        self._address = f"{reachable_host(host)}:{http_port}"

    def __enter__(self) -> TritonControl:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def is_live(self, seconds: float = _COMMAND_SECONDS) -> bool:
        try:
            return self._http.get("/v2/health/live", timeout=seconds).is_success
        except httpx.TransportError:
            return False

    def begin_load(self, model: str) -> bool:
        """Have a model loaded, and the parts of an ensemble with it; whether that is done already."""
        try:
            response = self._restricted(f"models/{model}/load", {}, _PATIENCE_SECONDS)
        except httpx.ReadTimeout:
            # It goes on. Whoever waited for this answer would not learn of a Triton that dies meanwhile: the models'
            # processes hold its connections, too.
            return False
        _refuse_failure(response, f"{model} does not load")
        return True

    def _restricted(self, path: str, body: dict[str, Any], seconds: float) -> httpx.Response:
        """A call of the control API, which wants the secret."""
        headers = {secret.HEADER: secret.of(self._address)}
        return self._http.post(f"/v2/repository/{path}", json=body, headers=headers, timeout=seconds)

    def load(self, model: str, still: Callable[[], None]) -> None:
        """Load a model and wait for it; `still` raises what ends the waiting."""
        done, failed_looks = self.begin_load(model), 0
        while not done:
            still()
            time.sleep(_POLL_SECONDS)
            try:
                done, failed_looks = self.is_loaded(model), 0
            except (ServingError, httpx.ReadTimeout):
                # Between its parts' loads and its own, for a moment nothing seems to load; a machine may stand still.
                failed_looks += 1
                if failed_looks >= _FAILED_LOOKS:
                    raise

    def is_loaded(self, model: str) -> bool:
        """Whether a load that was begun has ended; ServingError tells why it failed."""
        found = {entry["name"]: entry for entry in self._index({})}
        states = {name: entry.get("state") for name, entry in found.items()}
        if states.get(model) == "READY":
            return True
        if "LOADING" in states.values():
            return False
        # An LM whose part has failed has no state itself.
        mine = [name for name in found if name == model or name.startswith(f"{model}-") or name in PARTS]
        failed = [name for name in sorted(mine, key=len, reverse=True) if states[name] == "UNAVAILABLE"]
        reasons = [one_line(found[name].get("reason", "")) for name in failed]
        raise ServingError(f"{model} does not load: {next(filter(None, reasons), 'see the log of Triton')}")

    def unload(self, model: str) -> None:
        response = self._restricted(f"models/{model}/unload", {}, _COMMAND_SECONDS)
        _refuse_failure(response, f"{model} does not unload")

    def loaded_engines(self) -> list[str]:
        """The `generate` parts of all language models that are loaded."""
        return [name for name in self.loaded_parts() if part_of(name) == GENERATE]

    def loaded_parts(self) -> list[str]:
        """The parts of all language models that are loaded: each has a process."""
        names = [entry["name"] for entry in self._index({"ready": True}) if entry.get("state") == "READY"]
        return [name for name in names if part_of(name)]

    def _index(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        response = self._restricted("index", wanted, _PATIENCE_SECONDS)
        _refuse_failure(response, "Triton does not list its models")
        found: list[dict[str, Any]] = response.json()
        return found

    def ping(self, part: str, seconds: float) -> Sign:
        """Have a part's process answer. Refusals are answers, unless Triton itself says that it does not."""
        kind = part_of(part)
        if kind == GENERATE:
            body: dict[str, Any] = {CONTROL.name: Command(PING).to_json()}
        elif kind == TOKENIZE:
            body = {INPUT_IDS.name: [0]}
        else:
            body = {CHUNK.name: Chunk(0, [0], 1, 0, 0).to_json()}
        try:
            response = self._http.post(f"/v2/models/{part}/generate", json=body, timeout=seconds)
        except httpx.ReadTimeout:
            return Sign(answered=False)
        if not response.is_success:
            return Sign(answered=not isinstance(from_wire(_reason_of(response)), Broken))
        still = json.loads(response.json()[REPORT.name])["still_seconds"] if kind == GENERATE else 0.0
        return Sign(answered=True, still_seconds=float(still))

    def generates(self, model: str) -> bool:
        """The proof that an LM answers: one token for a prompt of one token, whatever its tokenizer knows."""
        body = {INPUT_IDS.name: [0], "max_tokens": 1, "temperature": 0}
        try:
            response = self._http.post(f"/v2/models/{model}/generate", json=body)
        except httpx.ReadTimeout:
            return False
        _refuse_failure(response, f"{model} is loaded, but does not generate")
        return True

    def command(self, generate: str, command: Command) -> dict[str, Any]:
        """Give the engine of a `generate` model a command; return its report."""
        response = self._http.post(f"/v2/models/{generate}/generate", json={CONTROL.name: command.to_json()})
        _refuse_failure(response, f"{generate} refuses the command {command.name!r}")
        report = json.loads(response.json()[REPORT.name])
        assert isinstance(report, dict), f"a report is a JSON object, got {report!r}"
        return report


def bounded(seconds: float) -> Callable[[], None]:
    """For a wait that only time ends: raises ServingError when it is over."""
    deadline = time.monotonic() + seconds

    def still() -> None:
        if time.monotonic() > deadline:
            raise ServingError(f"that took longer than {seconds:g} s")

    return still


def _refuse_failure(response: httpx.Response, what: str) -> None:
    if not response.is_success:
        raise ServingError(f"{what}: {one_line(_reason_of(response))}")


def _reason_of(response: httpx.Response) -> str:
    """Why a call failed; empty where it did not."""
    if response.is_success:
        return ""
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {response.status_code}"
