"""The life of `tritonlm serve`: check, start, load, serve, monitor and restart, drain, stop.

It knows the order of these steps. `triton` knows how Triton runs, `control` which calls it takes, `draining` when
nothing runs any more.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import httpx

from tritonlm.contract.control import STATUS, Command
from tritonlm.contract.load_progress import load_file, read_progress

from . import preflight, terminal
from .backend import assemble, find_installation
from .backoff import RestartBackoff
from .child import Child
from .control import TritonControl
from .draining import drain
from .errors import ServingError, TritonUnresponsive
from .gateway import LocalGateway
from .model_selection import download_models, language_models, select_models, write_models
from .placeholder import PlaceholderListener
from .reloader import Reloader
from .repository import LanguageModel, compile_code
from .restart_counts import RestartCounts, restart_counts_file
from .settings import Settings
from .triton import LocalTriton, triton_environment
from .watchdog import Watchdog, retry_failed_load

_START_ATTEMPTS = 3
_START_SECONDS = 60.0
_POLL_SECONDS = 0.1
# Triton is live after some tenths of a second.
_LIVE_POLL_SECONDS = 0.02
_MONITOR_SECONDS = 0.25
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Loaded = TypeVar("Loaded")


class StopRequested(BaseException):
    """Raised by a stop signal. Not an Exception (like KeyboardInterrupt), so that no handler catches it by accident."""


def serve(settings: Settings, gateway_url: str, placeholder: PlaceholderListener | None) -> None:
    """Serve until a stop signal; ServingError says why serving could not start or continue.

    The gateway runs only when there is a placeholder listener, whose sockets it takes over.
    """
    with contextlib.suppress(StopRequested), stop_signals():
        selection = download_models(select_models(settings))
        models = preflight.check_language_models(language_models(settings, selection))
        preflight.check_ports(settings)
        preflight.check_shared_memory()
        repositories = write_models(settings, selection)
        children: list[Child] = []
        with stopping(children), TritonControl(settings.triton_host, settings.http_port) as control:
            # The gateway starts first: it reports more about what is not ready than the placeholder listener does.
            gateway = LocalGateway(settings, gateway_url, selection.default, placeholder) if placeholder else None
            if gateway:
                children.append(gateway)
                gateway.start()
            triton = prepare(settings, repositories)
            children.insert(0, triton)

            def load_all() -> dict[str, Any]:
                return {model.name: load(model, triton, control, settings.load_seconds) for model in models}

            reports = start(triton, control, load_all)
            if gateway:
                gateway.wait_until_live()
            chats = [model.name for model in models if model.has_chats]
            terminal.show_banner(terminal.banner(settings, gateway_url, reports, chats, triton.log))
            monitor = Monitor(settings, models, triton, control, gateway)
            try:
                monitor.run()
            except StopRequested:
                drain(models, triton, control, gateway, monitor.watchdog, settings.drain_seconds)


def prepare(settings: Settings, repositories: Sequence[Path]) -> LocalTriton:
    """A Triton that is ready to start: backend assembled, libraries checked, models compiled."""
    installation = find_installation()
    backend = assemble(installation)
    preflight.check_libraries(installation, backend, triton_environment(installation, settings))
    compile_code(repositories)
    return LocalTriton(settings, installation, backend, repositories)


def start(triton: LocalTriton, control: TritonControl, load_all: Callable[[], Loaded]) -> Loaded:
    """Start Triton and load the models; restart Triton, up to _START_ATTEMPTS times, when it dies or hangs meanwhile.

    Triton aborts when a model's process does not respond for a second while it starts, for example on a machine that
    is suspended for that long: Triton then frees shared memory that the process is about to read.
    """
    triton.start()
    attempts_left = _START_ATTEMPTS
    while True:
        attempts_left -= 1
        try:
            wait_until_live(triton, control)
            return load_all()
        except ServingError as error:
            # An aborting Triton does not always exit, and may still report that it is live.
            is_healthy = triton.is_running() and not isinstance(error, TritonUnresponsive) and control.is_live()
            if not attempts_left or is_healthy:
                raise
            problem = "does not answer" if triton.is_running() else "ended"
        terminal.say(f"Triton {problem} while it loads: restarting it")
        triton.restart()


def wait_until_live(triton: LocalTriton, control: TritonControl) -> None:
    with terminal.step("starting Triton"):
        deadline = time.monotonic() + _START_SECONDS
        while not control.is_live():
            if not triton.is_running():
                raise triton.crash_error()
            if time.monotonic() > deadline:
                message = f"Triton does not answer after {_START_SECONDS:.0f} s; see {triton.log or 'its log'}"
                raise TritonUnresponsive(message)
            time.sleep(_LIVE_POLL_SECONDS)


def load(model: LanguageModel, triton: LocalTriton, control: TritonControl, seconds: float) -> dict[str, Any]:
    """Load an LM and generate one token with it; return its engine's status.

    The time limit counts from the last progress, so that a large checkpoint on a slow disk does not fail.
    """
    file = load_file(triton.process_id, model.generate)
    deadline, loaded = time.monotonic() + seconds, None

    def check(problem: str) -> None:
        """Show the progress; raise when Triton has ended or the time is over."""
        nonlocal deadline, loaded
        if not triton.is_running():
            raise triton.crash_error()
        if (latest := read_progress(file)) != loaded:
            deadline, loaded = time.monotonic() + seconds, latest
            if latest:
                show(terminal.load_progress(model.name, latest))
        if time.monotonic() > deadline:
            raise ServingError(
                f"{problem} after {seconds:g} s; allow more with --load-seconds, or see {triton.log or 'the log'}"
            )

    with connection_errors_explained(triton, f"loading {model.name}"):
        with terminal.step(f"loading {model.name}") as show:
            control.load(model.name, lambda: check(f"{model.name} is not loaded"))
        with terminal.step(f"waiting for the first token of {model.name}"):
            while not control.can_generate(model.name):
                check(f"{model.name} generates no token")
        return control.command(model.generate, Command(STATUS))


@contextlib.contextmanager
def connection_errors_explained(triton: LocalTriton, work: str) -> Iterator[None]:
    """Turn a lost connection into a ServingError, which reports Triton's exit when that is the cause."""
    try:
        yield
    except httpx.TransportError as error:
        # The connection closes shortly before the process exits.
        for _ in range(20):
            if not triton.is_running():
                raise triton.crash_error() from None
            time.sleep(_POLL_SECONDS)
        raise TritonUnresponsive(f"lost the connection to Triton while {work}: {error}") from None


class Monitor:
    """Restarts processes that have died or hang, until a stop signal; one that keeps dying ends the service."""

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
        self._restart_counts = RestartCounts(restart_counts_file(settings.http_port))
        self.watchdog = Watchdog(control, settings.load_seconds, self._restart_counts)
        self._backoffs: dict[str, RestartBackoff] = {}
        # The models that a restarted Triton has not loaded yet.
        self._unloaded: dict[str, RestartBackoff] = {}

    def run(self) -> NoReturn:
        while True:
            if self._reloader:
                self._reloader.check()
            if self._gateway and not self._gateway.is_running():
                self._restart(self._gateway, "ended")
            if not self._triton.is_running():
                self._restart_triton("ended")
            elif self.watchdog.triton_hangs:
                self._restart_triton("does not answer")
            self.watchdog.check(self._triton.process_id)
            self._retry_loads()
            for child in (self._triton, self._gateway):
                if child is not None:
                    child.rotate_log()
            time.sleep(_MONITOR_SECONDS)

    def _restart_triton(self, problem: str) -> None:
        self._restart(self._triton, problem)
        self.watchdog.reset()
        self._unloaded = {model.name: RestartBackoff() for model in self._models}
        try:
            wait_until_live(self._triton, self._control)
            for model in self._models:
                self._load(model)
        except ServingError as error:
            # Triton may have died again: the next iteration restarts it until the backoff is exhausted.
            terminal.print_error(error)

    def _load(self, model: LanguageModel) -> None:
        """Load a model after a restart; raises only when Triton itself fails, so that the other models are loaded."""
        try:
            load(model, self._triton, self._control, self._settings.load_seconds)
            del self._unloaded[model.name]
        except ServingError as error:
            if isinstance(error, TritonUnresponsive) or not self._triton.is_running():
                raise
            terminal.print_error(error)

    def _retry_loads(self) -> None:
        """Start failed loads again, without waiting for them: a slow load must not keep other processes dead."""
        # When the connection to Triton fails, the watchdog finds out why.
        with contextlib.suppress(httpx.HTTPError):
            for name, backoff in list(self._unloaded.items()):
                if retry_failed_load(self._control, name, backoff):
                    terminal.say(f"{name} is loaded again")
                    del self._unloaded[name]
                elif backoff.is_exhausted:
                    terminal.say(f"{name} does not load and is not tried again; tritonlm load {name} loads it")
                    del self._unloaded[name]

    def _restart(self, child: Child, problem: str) -> None:
        backoff = self._backoffs.setdefault(child.name, RestartBackoff())
        if backoff.is_exhausted:
            raise child.crash_error()
        time.sleep(backoff.delay)
        backoff.record_attempt()
        self._restart_counts.add(child.name)
        terminal.say(f"{child.name} {problem} unexpectedly: restarting it")
        child.restart()


@contextlib.contextmanager
def stopping(children: Sequence[Child]) -> Iterator[None]:
    """Stop the children on exit; further signals do not interrupt that (its time is bounded)."""
    try:
        yield
    finally:
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # In reverse order: the gateway before the Triton that it calls.
        for child in reversed(children):
            child.stop()


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise StopRequested in the main thread."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise StopRequested

    # Respect nohup, which ignores SIGHUP.
    handled = [n for n in _STOP_SIGNALS if n is not signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
