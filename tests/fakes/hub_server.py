"""A local server of the Hugging Face Hub's protocol, as its library speaks it: models, trees, files with ranges.

Large files (*.safetensors, *.gguf) have a SHA-256 in the tree and are served from another host through a redirect, as
the Hub does: without the caller's token. A test can gate a model, ask for a token, or cut a download.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "c" * 40
_LARGE = (".safetensors", ".gguf", ".bin")
# A server that is told to stop looks as often; half a second by default, in each test.
_POLL_SECONDS = 0.02


@dataclass
class HubServer:
    """`repositories`: folders by repository. `requests`: method, path and Range of each request."""

    repositories: dict[str, Path]
    token: str = ""
    gated: set[str] = field(default_factory=set)
    # The connection of a large file's download is closed after this many bytes, as often as `cuts` says.
    cut_after: int = 0
    cuts: int = 0
    # The status of every response, where it is not 0.
    failure: int = 0
    # Content that is sent in place of a file's own.
    replaced: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    endpoint: str = ""
    files_host: str = ""

    def downloads(self, name: str) -> list[str]:
        """The Range of each download of a large file."""
        return [given for method, path, given in self.requests if method == "GET" and path.endswith(f"/files/{name}")]


@contextlib.contextmanager
def hub_server(**repositories: Path) -> Iterator[HubServer]:
    """Keyword arguments name repositories of the organization `org`."""
    hub = HubServer({f"org/{name.replace('_', '-')}": folder for name, folder in repositories.items()})
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(_serving(type("Served", (_Handler,), {"hub": hub}))) for _ in range(2)]
        hub.endpoint, hub.files_host = addresses
        yield hub


@contextlib.contextmanager
def _serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(_POLL_SECONDS,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def _respond(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.failure:
            self._send(self.hub.failure, b"{}")
        elif match := re.fullmatch(r"/(org/[^/]+)/files/(.+)", path):
            self._send_large(match[1], match[2])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?(?:/)?", path):
            self._send_api(match[1], match[2] or "revision", match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(match[1], match[2], match[3])
        else:
            self._send(404, b"{}")

    def _refused(self, repository: str, revision: str, needs_terms: bool = False) -> bool:
        has_token = self.headers.get("Authorization") == f"Bearer {self.hub.token}" if self.hub.token else True
        if repository not in self.hub.repositories or (self.hub.token and not has_token and not needs_terms):
            self._send(401 if not self.headers.get("Authorization") else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif needs_terms and repository in self.hub.gated and not (self.hub.token and has_token):
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif revision not in ("main", "v1", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _send_api(self, repository: str, kind: str, revision: str) -> None:
        if self._refused(repository, revision, needs_terms=False):
            return
        folder = self.hub.repositories[repository]
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        if kind == "revision":
            body: Any = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
        else:
            body = [self._tree_entry(folder, file) for file in files]
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _tree_entry(self, folder: Path, file: Path) -> dict[str, Any]:
        entry = {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": "0" * 40}
        if file.suffix in _LARGE:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            entry["lfs"] = {"oid": digest, "size": file.stat().st_size, "pointerSize": 134}
        return entry

    def _send_file(self, repository: str, revision: str, name: str) -> None:
        if self._refused(repository, revision, needs_terms=True):
            return
        file = self.hub.repositories[repository] / name
        if not file.is_file():
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        content, headers = file.read_bytes(), {"X-Repo-Commit": COMMIT}
        if file.suffix in _LARGE:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self._send(302, b"", {**headers, "Location": f"{self.hub.files_host}/{repository}/files/{name}"})
        else:
            self._send(200, content, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _send_large(self, repository: str, name: str) -> None:
        """As the Hub's store: an address that is signed, and so takes no token."""
        if self.headers.get("Authorization"):
            self._send(400, b"only one of a signature and a token may be sent")
            return
        content = self.hub.replaced.get(name) or (self.hub.repositories[repository] / name).read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = (int(match[1]), int(match[2] or len(content)) + 1) if match else (0, len(content))
        rest = content[begin:end]
        headers = {"Content-Range": f"bytes {begin}-{begin + len(rest) - 1}/{len(content)}"} if match else {}
        if self.hub.cuts and self.hub.cut_after < len(rest):
            self.hub.cuts -= 1
            self._send(206 if match else 200, rest[: self.hub.cut_after], headers, length=len(rest))
            self.close_connection = True
        else:
            self._send(206 if match else 200, rest, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length or len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
