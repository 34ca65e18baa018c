"""API keys: the scope of every route, the limits of a key, and reloading the key file."""

from __future__ import annotations

import asyncio
import json
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes.fake_transport import LM
from limits import RateLimitItem
from limits.aio.strategies import MovingWindowRateLimiter
from tritonlm.access.exposure import is_loopback
from tritonlm.access.keys import SCOPES, KeyFile, KeyRing, KeysError, Limits
from tritonlm.cli import app
from tritonlm.contract import RateLimited, file_edits
from tritonlm.gateway.limits.quota import Caller, Quota
from tritonlm.gateway.limits.scopes import PUBLIC_PATHS, scope_of
from tritonlm.gateway.serve import check_settings
from tritonlm.gateway.settings import GatewaySettings
from tritonlm.serving import ServingError
from typer.testing import CliRunner

from .conftest import Gateway, running_gateway

NONE = Limits()
BODY = {"model": LM, "prompt": "a", "max_tokens": 4}


@dataclass
class Locked:
    gateway: Gateway
    file: KeyFile
    secrets: dict[str, str]

    def ask(self, method: str, path: str, who: str = "") -> httpx.Response:
        return self.gateway.http.request(method, path, headers=self.headers(who))

    def headers(self, who: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secrets.get(who, who)}"} if who else {}

    def complete(self, who: str, **body: object) -> httpx.Response:
        return self.gateway.http.post("/v1/completions", json={**BODY, **body}, headers=self.headers(who))


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Locked]:
    """A gateway with a key for each scope, a revoked key, and some with limits."""
    file = KeyFile(tmp_path / "keys.json")
    secrets = {scope: file.create(scope, [scope], NONE) for scope in SCOPES}
    secrets["gone"] = file.create("gone", SCOPES, NONE)
    file.revoke("gone")
    secrets["few"] = file.create("few", ["infer"], Limits(requests_per_minute=2))
    secrets["short"] = file.create("short", ["infer"], Limits(tokens_per_minute=5))
    secrets["one"] = file.create("one", ["infer", "admin"], Limits(running_requests=1))
    with running_gateway(keys=file.path, training=False) as gateway:
        yield Locked(gateway, file, secrets)


def routes(locked: Locked) -> list[tuple[str, str]]:
    paths = locked.ask("GET", "/openapi.json", "infer").json()["paths"]
    documented = [(method.upper(), path.replace("{", "").replace("}", "")) for path in paths for method in paths[path]]
    return [*documented, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nowhere")]


def test_every_route_needs_a_key_with_its_scope(locked: Locked) -> None:
    """Each route with each kind of key."""
    checked = routes(locked)
    assert len(checked) > 30
    for method, path in checked:
        required = scope_of(method, path)
        for who in ("", "wrong", "gone", *SCOPES):
            response = locked.ask(method, path, who)
            case = f"{method} {path} as {who or 'anonymous'}"
            if path in PUBLIC_PATHS:
                assert response.status_code == 200, case
            elif who not in SCOPES:
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), case
            elif who != required:
                assert (response.status_code, response.json()["error"]["code"]) == (403, "insufficient_scope"), case
            else:
                assert response.status_code not in (401, 403), case
            assert not any(secret in response.text for secret in locked.secrets.values())


def test_routes_that_change_the_service_need_the_admin_scope() -> None:
    for method, path in (
        ("POST", "/api/models/x/load"), ("POST", "/api/models/x/unload"), ("DELETE", "/v1/models/x"),
        ("POST", "/api/load_model"), ("POST", "/api/train"), ("GET", "/api/jobs"), ("POST", "/api/jobs/1/cancel"),
        ("GET", "/api/usage"),
    ):  # fmt: skip
        assert scope_of(method, path) == "admin"
    assert scope_of("GET", "/metrics") == "metrics"
    assert scope_of("GET", "/v1/models") == scope_of("POST", "/v1/completions") == "infer"


def test_the_key_file_holds_no_secret_and_is_readable_by_its_owner_only(locked: Locked) -> None:
    text = locked.file.path.read_text()
    assert not any(secret in text for secret in locked.secrets.values())
    assert stat.S_IMODE(locked.file.path.stat().st_mode) == 0o600


def test_a_gateway_reloads_the_key_file(locked: Locked) -> None:
    secret = locked.file.create("late", ["infer"], NONE)
    locked.gateway.wait_until(lambda: locked.complete(secret).status_code == 200)
    locked.file.revoke("late")
    locked.gateway.wait_until(lambda: locked.complete(secret).status_code == 401)
    assert "revoked" in locked.complete(secret).json()["error"]["message"]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_a_missing_or_damaged_key_file_gives_no_access(locked: Locked, damage: object) -> None:
    assert callable(damage)
    damage(locked.file.path)
    time.sleep(1.1)
    assert locked.complete("").status_code == 401
    assert locked.complete("infer").status_code == 200


def test_requests_per_minute_are_limited(locked: Locked) -> None:
    answers = [locked.complete("few") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert locked.complete("infer").status_code == 200


def test_tokens_per_minute_are_limited(locked: Locked) -> None:
    first = locked.complete("short")
    assert (first.status_code, first.headers["x-ratelimit-limit-tokens"]) == (200, "5")
    used = first.json()["usage"]["total_tokens"]
    assert used >= 5, "the fake model counts a word of the prompt and four tokens"
    refused = locked.complete("short")
    assert (refused.status_code, refused.headers["x-ratelimit-remaining-tokens"]) == (429, "0")
    assert "5 tokens a minute" in refused.json()["error"]["message"]


def test_concurrent_requests_are_limited(locked: Locked) -> None:
    locked.gateway.transport.pause = 0.3
    headers = locked.headers("one")
    body = {**BODY, "stream": True, "max_tokens": 40}
    with locked.gateway.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        assert response.status_code == 200
        assert locked.complete("one").status_code == 429
        assert locked.complete("infer").status_code == 200
    locked.gateway.transport.pause = 0.0
    locked.gateway.wait_until(lambda: locked.complete("one").status_code == 200)


def test_concurrent_requests_are_limited_while_the_rates_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Remote(MovingWindowRateLimiter):
        """Answers later, as a Redis does."""

        async def hit(self, item: RateLimitItem, *identifiers: str, cost: int = 1) -> bool:
            await asyncio.sleep(0)
            return await super().hit(item, *identifiers, cost=cost)

    async def acquire() -> None:
        quota = Quota("memory://")
        one = Caller("one", Limits(running_requests=1, requests_per_minute=2))
        results = await asyncio.gather(*(quota.acquire(one) for _ in range(20)), return_exceptions=True)
        assert sum(isinstance(result, dict) for result in results) == 1
        await quota.release(one, None, served=True)
        await quota.acquire(one)
        await quota.release(one, None, served=True)
        # A refused request does not count as running.
        with pytest.raises(RateLimited, match="2 requests a minute"):
            await quota.acquire(one)
        assert quota.running["one"] == 0

    monkeypatch.setattr("tritonlm.gateway.limits.quota.MovingWindowRateLimiter", Remote)
    asyncio.run(acquire())


def test_usage_is_reported_by_key(locked: Locked) -> None:
    for _ in range(2):
        locked.complete("infer")
    locked.complete("few", prompt="a b c", stream=True)

    def report() -> dict[str, Any]:
        return {entry["key"]: entry for entry in locked.ask("GET", "/api/usage", "admin").json()["keys"]}

    # A stream counts as running until its reader has read all of it.
    locked.gateway.wait_until(lambda: report().get("few", {}).get("running") == 0)
    used = report()
    assert (used["infer"]["requests"], used["infer"]["completion_tokens"]) == (2, 8)
    assert (used["few"]["requests"], used["few"]["prompt_tokens"], used["few"]["running"]) == (1, 3, 0)
    text = locked.ask("GET", "/metrics", "metrics").text
    assert 'tritonlm_key_tokens_total{key="infer",kind="completion"}' in text


def test_invalid_names_and_unknown_scopes_are_refused(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    for name, scopes, message in (
        ("a b", ["infer"], "letters, digits"),
        ("", ["infer"], "letters"),
        ("x\n", [], "letters"),
        ("x", ["root"], "no scope 'root'"),
    ):
        with pytest.raises(KeysError, match=message):
            file.create(name, scopes, NONE)
    file.create("x", ["infer"], NONE)
    with pytest.raises(KeysError, match="already"):
        file.create("x", ["infer"], NONE)
    file.revoke("x")
    with pytest.raises(KeysError, match="there is no key 'x'"):
        file.revoke("x")
    # A revoked key's name can be used again; the old secret stays invalid.
    file.create("x", ["admin"], NONE)
    assert [(key.name, key.scopes, key.revoked) for key in file.read()] == [("x", ("admin",), None)]


def test_a_key_that_is_revoked_while_another_is_created_stays_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.json"
    KeyFile(path).create("old", ["infer"], NONE)
    revoking = threading.Thread(target=KeyFile(path).revoke, args=["old"])

    def secret_after_the_other_edit(length: int) -> str:
        """A new key's secret is made between reading and writing. The other edit ends now, or waits for this one."""
        revoking.start()
        revoking.join(1.0)
        return "s" * length

    monkeypatch.setattr("tritonlm.access.keys.secrets.token_urlsafe", secret_after_the_other_edit)
    KeyFile(path).create("new", ["infer"], NONE)
    revoking.join()
    assert {key.name: key.revoked is not None for key in KeyFile(path).read()} == {"old": True, "new": False}


def test_an_edit_waits_for_another_one_with_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_edits, "LOCK_SECONDS", 0.0)
    path = tmp_path / "keys.json"
    with file_edits.locked(path):
        result = CliRunner().invoke(app, ["keys", "create", "x", "--keys", str(path)])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: another process has been editing")
    assert KeyFile(path).read() == []


def test_an_invalid_key_file_is_reported(tmp_path: Path) -> None:
    for text in ("", "[]", json.dumps({"keys": [{"name": 1}]})):
        (tmp_path / "keys.json").write_text(text)
        with pytest.raises(KeysError, match="cannot be read as a key file"):
            KeyFile(tmp_path / "keys.json").read()
        with pytest.raises(ServingError, match="cannot be read"):
            check_settings(GatewaySettings(keys=tmp_path / "keys.json"))


def test_without_a_key_only_loopback_is_allowed(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    check_settings(GatewaySettings(keys=keys))
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        assert not is_loopback(host)
        with pytest.raises(ServingError, match="tritonlm keys create"):
            check_settings(GatewaySettings(keys=keys, host=host))
        check_settings(GatewaySettings(keys=keys, host=host, allow_anonymous=True))
        check_settings(GatewaySettings(keys=keys, host=host, api_key="long-enough"))
    KeyFile(keys).create("x", ["infer"], NONE)
    check_settings(GatewaySettings(keys=keys, host="0.0.0.0"))
    assert is_loopback("localhost")


def test_a_key_is_required_after_the_last_one_is_revoked(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    assert KeyRing(file, None).is_empty
    file.create("x", ["infer"], NONE)
    file.revoke("x")
    assert not KeyRing(file, None).is_empty


def test_the_playground_needs_no_key_and_has_security_headers(locked: Locked) -> None:
    """The page asks for a key itself. It loads nothing from elsewhere and cannot be framed."""
    for path in ("/playground", "/playground/app.js", "/playground/style.css"):
        answer = locked.gateway.http.get(path)
        assert answer.status_code == 200, path
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    browser = {"accept": "text/html,application/xhtml+xml"}
    redirect = locked.gateway.http.get("/", headers=browser)
    assert (redirect.status_code, redirect.headers["location"]) == (307, "playground")
    assert locked.gateway.http.get("/", headers={"accept": "*/*"}).status_code == 401
    for name in ("nothing.js", "..%2fapp.py", "%2e%2e%2fapp.py", "__init__.py"):
        assert locked.gateway.http.get(f"/playground/{name}").status_code == 404, name
    assert locked.gateway.http.get("/playgrounds").status_code == 401
