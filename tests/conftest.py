"""Groups and orders the tests for parallel workers, and ends the processes that a run leaves behind.

It knows folders and fixtures by name, not what the tests check.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import os
import signal
import ssl
import sys
from collections.abc import Generator
from importlib.machinery import ModuleSpec
from types import ModuleType

import hypothesis
import process_owner
import pytest
from httpx._transports import default as httpx_transports
from tritonlm.contract.imports import without_collections

# Fixtures that start a Triton for a whole session; the first two serve the same files.
_SHARED = {"shared_server": "shared", "shared_small_server": "shared", "bundled": "bundled",
           "served_smollm2": "smollm2"}  # fmt: skip
# Folders whose tests take minutes.
_LONG = ("over_triton", "real_models")
# Files whose tests need little set-up and take long together: any worker takes any of their tests.
_SPREAD = ("test_schema",)
# A busy machine is no fault: generated examples have no deadline, which hypothesis sets by default.
_PROFILE = "without_deadline"
# New objects before a garbage collection. With Python's 700 a worker, which keeps many, collects all the time.
_NEW_OBJECTS = 20_000
# Characters of a text in a test's id: the workers send the ids of all tests to one another.
_ID_CHARACTERS = 60
# They take seconds to import and few tests use them: a worker imports them for the first test that does.
_LATE = ("anthropic", "openai", "peft")
# They name other certificates than those that httpx brings.
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def pytest_configure(config: pytest.Config) -> None:
    """The run owns its processes; its workers inherit the mark."""
    # A shell starts a command in the background with SIGINT ignored, and every process below it inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    is_worker = hasattr(config, "workerinput")
    if not is_worker:
        process_owner.own_processes()
    hypothesis.settings.register_profile(_PROFILE, hypothesis.settings(), deadline=None)
    hypothesis.settings.load_profile(_PROFILE)
    _read_certificates_once()
    # Its import looks into every module that is there: with thousands of them, that takes seconds. The controller of
    # workers runs no test.
    if is_worker or not config.getoption("numprocesses", None):
        with without_collections():
            importlib.import_module("torch")
    for name in _LATE:
        spec = importlib.util.find_spec(name)
        if name not in sys.modules and spec is not None:
            sys.modules[name] = _LateModule(spec)


def pytest_make_parametrize_id(val: object) -> str | None:
    """The id of a long text is its beginning: some tests have texts of megabytes."""
    if isinstance(val, (str, bytes)) and len(val) > _ID_CHARACTERS:
        return f"{val[:_ID_CHARACTERS]!a}..."
    return None


def _read_certificates_once() -> None:
    """Each httpx client reads the certificates of the authorities, also for http, which takes longer than a request.

    Those of the SDKs are httpx clients, too. A client with a context of its own keeps it.
    """
    create = httpx_transports.create_ssl_context

    @functools.cache
    def shared(trust_env: bool, *files: str | None) -> object:
        return create(trust_env=trust_env)

    def create_or_share(
        verify: ssl.SSLContext | str | bool = True, cert: object = None, trust_env: bool = True
    ) -> object:
        if verify is True and cert is None:
            return shared(trust_env, *map(os.environ.get, _CERTIFICATES))
        return create(verify, cert, trust_env)

    httpx_transports.create_ssl_context = create_or_share


class _LateModule(ModuleType):
    """In place of a module until something of it is used. importlib's LazyLoader loads with the first `import`."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__file__ = spec, spec.origin

    def __getattr__(self, name: str) -> object:
        # pytest and inspect ask every module for such names.
        if name.startswith("__") and name not in ("__path__", "__version__"):
            raise AttributeError(name)
        if sys.modules[self.__name__] is self:
            del sys.modules[self.__name__]
        module = importlib.import_module(self.__name__)
        vars(self).update(vars(module))
        return getattr(module, name)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collecting imports most of what the tests use. A fifth of its time would go into garbage collections, and all
    later ones would look at what it made.
    """
    with without_collections():
        collected = yield
    gc.set_threshold(_NEW_OBJECTS)
    return collected


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests by the server that they share, or by file; the longest groups start first."""
    for item in items:
        if item.path.stem not in _SPREAD:
            item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=_rank)


def pytest_collection_finish(session: pytest.Session) -> None:
    """pytest-xdist marks groups in private names of pytest; a release that renames them silently ungroups the tests."""
    grouped = [item for item in session.items if item.path.stem not in _SPREAD]
    if grouped and getattr(session.config.option, "loadgroup", False):
        assert "@" in grouped[0].nodeid, "pytest-xdist ignores groups under this pytest: pin an older one"


def _group(item: pytest.Item) -> str:
    fixtures = set(getattr(item, "fixturenames", ()))
    shared = (group for fixture, group in _SHARED.items() if fixture in fixtures)
    return next(shared, f"{item.path.parent.name}/{item.path.stem}")


def _rank(item: pytest.Item) -> int:
    if _group(item) in _SHARED.values():
        return 0
    return 1 if item.path.parent.name in _LONG else 2
