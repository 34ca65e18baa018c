"""The HTTP calls that the supervisor makes to its Triton: liveness, load, one token, engine commands.

It knows Triton's URLs. It does not know processes: the caller decides what a lost connection means.
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
_CALL_SECONDS, _POLL_SECONDS, _MAX_FAILED_POLLS = 2.0, 0.1, 5


@dataclass(frozen=True)
class PingResult:
    """Whether a part's process replied, and for how long its engine has made no progress."""

    replied: bool
    stalled_seconds: float = 0.0


def one_line(text: str) -> str:
    """Triton's error as one line: without the traceback's locations, the machine-readable suffix and line breaks."""
    text = re.split(r"\n\s*At:", text, maxsplit=1)[0]
    return " ".join(from_wire(text.strip()).message.split()).rstrip(";, ")


class TritonControl:
    def __init__(self, host: str, http_port: int) -> None:
        self.url = f"http://{reachable_host(host)}:{http_port}"
        # trust_env=False: no proxy between the supervisor and its own child.
        self._http = httpx.Client(base_url=self.url, timeout=_COMMAND_SECONDS, trust_env=False)
        self._address = f"{reachable_host(host)}:{http_port}"

    def __enter__(self) -> TritonControl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def is_live(self, seconds: float = _COMMAND_SECONDS) -> bool:
        try:
            return self._http.get("/v2/health/live", timeout=seconds).is_success
        except httpx.TransportError:
            return False

    def begin_load(self, model: str) -> bool:
        """Start to load a model and the parts of its ensemble; return whether it is loaded already."""
        try:
            response = self._restricted(f"models/{model}/load", {}, _CALL_SECONDS)
        except httpx.ReadTimeout:
            # The load continues. Do not wait for the response: the models' processes inherit the connection, so it
            # stays open when Triton dies.
            return False
        _refuse_failure(response, f"{model} does not load")
        return True

    def _restricted(self, path: str, body: dict[str, Any], seconds: float) -> httpx.Response:
        """Call the control API, which requires the secret."""
        headers = {secret.HEADER: secret.secret_for(self._address)}
        return self._http.post(f"/v2/repository/{path}", json=body, headers=headers, timeout=seconds)

    def load(self, model: str, check: Callable[[], None]) -> None:
        """Load a model and wait for it. `check` is called at every poll and raises to end the wait."""
        done, failed_polls = self.begin_load(model), 0
        while not done:
            check()
            time.sleep(_POLL_SECONDS)
            try:
                done, failed_polls = self.is_loaded(model), 0
            except (ServingError, httpx.ReadTimeout):
                # Between the loads of the parts and of the ensemble, Triton briefly reports nothing as loading.
                failed_polls += 1
                if failed_polls >= _MAX_FAILED_POLLS:
                    raise

    def is_loaded(self, model: str) -> bool:
        """Whether a load that was started has finished; ServingError gives the reason when it failed."""
        models = {entry["name"]: entry for entry in self._index({})}
        states = {name: entry.get("state") for name, entry in models.items()}
        if states.get(model) == "READY":
            return True
        if "LOADING" in states.values():
            return False
        # An ensemble whose part has failed has no state of its own.
        related = [name for name in models if name == model or name.startswith(f"{model}-") or name in PARTS]
        failed = [name for name in sorted(related, key=len, reverse=True) if states[name] == "UNAVAILABLE"]
        reasons = [one_line(models[name].get("reason", "")) for name in failed]
        raise ServingError(f"{model} does not load: {next(filter(None, reasons), 'see the log of Triton')}")

    def unload(self, model: str) -> None:
        response = self._restricted(f"models/{model}/unload", {}, _COMMAND_SECONDS)
        _refuse_failure(response, f"{model} does not unload")

    def loaded_engines(self) -> list[str]:
        """The `generate` parts of all loaded language models."""
        return [name for name in self.loaded_parts() if part_of(name) == GENERATE]

    def loaded_parts(self) -> list[str]:
        """The parts of all loaded language models; each has a process."""
        names = [entry["name"] for entry in self._index({"ready": True}) if entry.get("state") == "READY"]
        return [name for name in names if part_of(name)]

    def _index(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        response = self._restricted("index", query, _CALL_SECONDS)
        _refuse_failure(response, "Triton does not list its models")
        entries: list[dict[str, Any]] = response.json()
        return entries

    def ping(self, part: str, seconds: float) -> PingResult:
        """Send a part's process a minimal request. An error from the process counts as a reply."""
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
            return PingResult(replied=False)
        if not response.is_success:
            # `Broken` is Triton's own report that the process does not reply.
            return PingResult(replied=not isinstance(from_wire(_reason_of(response)), Broken))
        stalled = json.loads(response.json()[REPORT.name])["still_seconds"] if kind == GENERATE else 0.0
        return PingResult(replied=True, stalled_seconds=float(stalled))

    def can_generate(self, model: str) -> bool:
        """Whether an LM generates one token for a prompt of one token id."""
        body = {INPUT_IDS.name: [0], "max_tokens": 1, "temperature": 0}
        try:
            response = self._http.post(f"/v2/models/{model}/generate", json=body)
        except httpx.ReadTimeout:
            return False
        _refuse_failure(response, f"{model} is loaded, but does not generate")
        return True

    def command(self, generate: str, command: Command) -> dict[str, Any]:
        """Send the engine of a `generate` model a command; return its report."""
        response = self._http.post(f"/v2/models/{generate}/generate", json={CONTROL.name: command.to_json()})
        _refuse_failure(response, f"{generate} refuses the command {command.name!r}")
        report = json.loads(response.json()[REPORT.name])
        assert isinstance(report, dict), f"a report is a JSON object, got {report!r}"
        return report


def deadline_check(seconds: float) -> Callable[[], None]:
    """A `check` for `TritonControl.load` that raises ServingError after this time."""
    deadline = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > deadline:
            raise ServingError(f"the load took longer than {seconds:g} s")

    return check


def _refuse_failure(response: httpx.Response, problem: str) -> None:
    if not response.is_success:
        raise ServingError(f"{problem}: {one_line(_reason_of(response))}")


def _reason_of(response: httpx.Response) -> str:
    """The reason of a failed call; empty for a successful one."""
    if response.is_success:
        return ""
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {response.status_code}"
