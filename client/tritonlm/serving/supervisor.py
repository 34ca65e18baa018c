"""The story of `tritonlm serve`: check, start, load, answer, watch and repair, drain, stop.

It knows the order of things; how Triton runs is `triton`'s matter, what is said to it `control`'s.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn, TypeVar

import httpx

from tritonlm.contract.control import DRAIN, STATUS, Command

from . import preflight, terminal
from .backend import assemble, find_installation
from .backoff import Patience
from .catalogue import Catalogue, catalogue
from .child import Child
from .control import TritonControl
from .errors import NoAnswer, ServingError
from .gateway import LocalGateway
from .placeholder import Reception
from .reloader import Reloader
from .repairs import Repairs, file_of
from .repository import LanguageModel, compile_code
from .settings import Settings
from .triton import LocalTriton, triton_environment
from .watchdog import Watchdog

_STARTS = 3
_START_SECONDS = 60.0
_POLL_SECONDS = 0.1
_WATCH_SECONDS = 0.25
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Loaded = TypeVar("Loaded")


class StopRequested(BaseException):
    """A signal asked us to end. Like KeyboardInterrupt it is no Exception, so that nothing catches it by accident."""


def serve(settings: Settings, reception: Reception | None) -> None:
    """Serve until a signal asks to stop; ServingError says why serving could not begin or go on.

    With a reception there is a gateway behind it.
    """
    with contextlib.suppress(StopRequested), stop_signals():
        found = catalogue(settings)
        models = preflight.check_language_models(found.load, found.repositories)
        preflight.check_ports(settings)
        preflight.check_shared_memory()
        children: list[Child] = []
        with stopping(children), TritonControl(settings.triton_host, settings.http_port) as control:
            # First of all: it says more of what is not ready yet than the reception does.
            gateway = LocalGateway(settings, found.default, reception) if reception else None
            if gateway:
                children.append(gateway)
                gateway.start()
            triton = prepare(settings, found)
            children.insert(0, triton)

            def load_all() -> dict[str, Any]:
                return {model.name: load(model, triton, control, settings.load_seconds) for model in models}

            reports = start(triton, control, load_all)
            if gateway:
                gateway.wait_until_live()
            print(terminal.banner(settings, reports, triton.log), flush=True)
            watch = Watch(settings, models, triton, control, gateway)
            try:
                watch.run()
            except StopRequested:
                drain(models, triton, control, gateway, watch.watchdog, settings.drain_seconds)


def prepare(settings: Settings, found: Catalogue) -> LocalTriton:
    """A Triton that finds all it needs, and is not started yet."""
    installation = find_installation()
    backend = assemble(installation)
    preflight.check_libraries(installation, backend, triton_environment(installation, settings))
    compile_code(found.repositories)
    return LocalTriton(settings, installation, backend, found.repositories)


def start(triton: LocalTriton, control: TritonControl, load_all: Callable[[], Loaded]) -> Loaded:
    """Start Triton and have it load; where it dies of that, or answers no more, once more, a few times.

    It does where a model's process does not stir for a second while it starts, as on a machine that stands still for so
    long: Triton takes back what that process is about to read, and aborts when it fails over that.
    """
    triton.start()
    tries_left = _STARTS
    while True:
        tries_left -= 1
        try:
            wait_until_live(triton, control)
            return load_all()
        except ServingError as error:
            # One that aborts does not always end, and may go on saying that it is live.
            answers = triton.is_running() and not isinstance(error, NoAnswer) and control.is_live()
            if not tries_left or answers:
                raise
            what = "does not answer" if triton.is_running() else "ended"
        terminal.say(f"Triton {what} while it loads: starting it again")
        triton.restart()


def wait_until_live(triton: LocalTriton, control: TritonControl) -> None:
    with terminal.step("starting Triton"):
        deadline = time.monotonic() + _START_SECONDS
        while not control.is_live():
            if not triton.is_running():
                raise triton.crash()
            if time.monotonic() > deadline:
                raise NoAnswer(f"Triton does not answer after {_START_SECONDS:.0f} s; see {triton.log or 'its log'}")
            time.sleep(_POLL_SECONDS)


def load(model: LanguageModel, triton: LocalTriton, control: TritonControl, seconds: float) -> dict[str, Any]:
    """Load an LM and have it generate a token; return its engine's status."""
    deadline = time.monotonic() + seconds

    def still(what: str) -> None:
        """There is time left, and a Triton to wait for."""
        if not triton.is_running():
            raise triton.crash()
        if time.monotonic() > deadline:
            raise ServingError(
                f"{what} after {seconds:g} s; allow more with --load-seconds, or see {triton.log or 'the log'}"
            )

    with reached(triton, f"loading {model.name}"):
        with terminal.step(f"loading {model.name}"):
            control.load(model.name, lambda: still(f"{model.name} is not loaded"))
        with terminal.step(f"waiting for the first token of {model.name}"):
            while not control.generates(model.name):
                still(f"{model.name} does not answer")
        return control.command(model.generate, Command(STATUS))


@contextlib.contextmanager
def reached(triton: LocalTriton, work: str) -> Iterator[None]:
    """Inside, a connection that is lost is a ServingError, which tells of Triton's end where that is why."""
    try:
        yield
    except httpx.TransportError as error:
        # The connection goes a moment before the process does.
        for _ in range(20):
            if not triton.is_running():
                raise triton.crash() from None
            time.sleep(_POLL_SECONDS)
        raise NoAnswer(f"lost the connection to Triton while {work}: {error}") from None


class Watch:
    """Until a signal comes: what has died or hangs is brought back; what keeps dying ends the service."""

    def __init__(
        self,
        settings: Settings,
        models: list[LanguageModel],
        triton: LocalTriton,
        control: TritonControl,
        gateway: LocalGateway | None,
    ) -> None:
        self._settings, self._models, self._triton, self._control = settings, models, triton, control
        self._gateway = gateway
        self._reloader = Reloader(settings) if settings.reload else None
        self._repairs = Repairs(file_of(settings.http_port))
        self.watchdog = Watchdog(control, settings.load_seconds, self._repairs)
        self._patience: dict[str, Patience] = {}

    def run(self) -> NoReturn:
        while True:
            if self._reloader:
                self._reloader.look()
            if self._gateway and not self._gateway.is_running():
                self._restart(self._gateway, "ended")
            if not self._triton.is_running():
                self._restart_triton("ended")
            elif self.watchdog.triton_hangs:
                self._restart_triton("does not answer")
            self.watchdog.look(self._triton.process_id)
            for child in (self._triton, self._gateway):
                if child is not None:
                    child.keep_log_short()
            time.sleep(_WATCH_SECONDS)

    def _restart_triton(self, what: str) -> None:
        self._restart(self._triton, what)
        self.watchdog.forget()
        try:
            wait_until_live(self._triton, self._control)
            for model in self._models:
                load(model, self._triton, self._control, self._settings.load_seconds)
        except ServingError as error:
            # It may have died once more: the next look starts it again, as long as there is patience.
            terminal.explain(error)

    def _restart(self, child: Child, what: str) -> None:
        patience = self._patience.setdefault(child.name, Patience())
        if patience.is_over:
            raise child.crash()
        time.sleep(patience.pause)
        patience.note()
        self._repairs.note(child.name)
        terminal.say(f"{child.name} {what} unexpectedly: starting it again")
        child.restart()


def drain(
    models: list[LanguageModel],
    triton: LocalTriton,
    control: TritonControl,
    gateway: LocalGateway | None,
    watchdog: Watchdog,
    seconds: float,
) -> None:
    """Refuse new requests and wait, at most this long, until the running ones have ended; a process that dies meanwhile
    is brought back for them. The gateway ends after its own."""
    deadline = time.monotonic() + seconds
    with terminal.step(f"stopping: running requests may take up to {seconds:g} s more (again Ctrl-C: stop now)"):
        names = _engines(models, control)
        draining = [engine for engine in names if _ask(control, engine, DRAIN) is not None]
        if gateway:
            gateway.ask_to_end()
        while (draining or _runs(gateway)) and time.monotonic() < deadline and triton.is_running():
            watchdog.look(triton.process_id)
            draining = [engine for engine in draining if _is_busy(_ask(control, engine, STATUS))]
            if draining or _runs(gateway):
                time.sleep(_POLL_SECONDS)
    if draining:
        terminal.say(f"cut off the running requests of {', '.join(names[engine] for engine in draining)}")
    elif _runs(gateway):
        terminal.say("cut off the requests that the gateway still had")


def _runs(gateway: LocalGateway | None) -> bool:
    return gateway is not None and gateway.is_running()


def _engines(models: list[LanguageModel], control: TritonControl) -> dict[str, str]:
    """Those that were loaded at the start, and those that requests have loaded since, with their LMs' names."""
    try:
        loaded = control.loaded_engines()
    except (ServingError, httpx.HTTPError):
        loaded = []
    since = {engine: engine.removesuffix("-generate") for engine in loaded}
    return since | {model.generate: model.name for model in models}


def _ask(control: TritonControl, engine: str, command: str) -> dict[str, Any] | None:
    """An engine that does not answer any more has nothing to drain."""
    try:
        return control.command(engine, Command(command))
    except (ServingError, httpx.HTTPError):
        return None


def _is_busy(report: dict[str, Any] | None) -> bool:
    return report is not None and report["running"] + report["waiting"] > 0


@contextlib.contextmanager
def stopping(children: Sequence[Child]) -> Iterator[None]:
    """Whatever happens inside, they are stopped after it, and no further signal interrupts that (it is bounded)."""
    try:
        yield
    finally:
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # The last one first: whoever asks before whoever is asked.
        for child in reversed(children):
            child.stop()


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise StopRequested in the main thread, wherever it is."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise StopRequested

    # nohup's wish is kept: it has the hang-up ignored.
    ours = [n for n in _STOP_SIGNALS if n is not signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
