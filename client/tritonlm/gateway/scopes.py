"""Which scope a route wants. What is not named here is a model's use; it knows paths, not who asks."""

from __future__ import annotations

from tritonlm.access.keys import ADMIN, INFER, METRICS

# A supervisor has no key and must be able to look.
OPEN = ("/health/live", "/health/ready")
# A page that asks for the key; what it calls wants it.
PLAYGROUND = "/playground"
# What changes the service for everybody, or shows what others do.
_ADMIN = (
    ("POST", "/api/models/"), ("DELETE", "/v1/models/"), ("POST", "/api/load_model"), ("POST", "/api/train"),
    ("", "/api/jobs"), ("", "/api/usage"),
)  # fmt: skip


def scope_of(method: str, path: str) -> str:
    if path == "/metrics":
        return METRICS
    wants_admin = any(path.startswith(start) and wanted in ("", method) for wanted, start in _ADMIN)
    return ADMIN if wants_admin else INFER


def is_open(path: str, accepts: str) -> bool:
    """Whether anybody may ask; `accepts`: what kind of answer the caller would like to have."""
    return path in OPEN or path == PLAYGROUND or path.startswith(f"{PLAYGROUND}/") or leads_on(path, accepts)


def leads_on(path: str, accepts: str) -> bool:
    """Whether it is a browser at the door, which is shown the way to the playground."""
    return path == "/" and "text/html" in accepts


def is_work(method: str, path: str) -> bool:
    """Whether a request takes a place: it has a model compute something."""
    return method == "POST" and scope_of(method, path) == INFER
