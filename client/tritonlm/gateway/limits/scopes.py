"""The scope that each route requires. Routes that are not listed here need `infer`. It knows paths, not callers."""

from __future__ import annotations

from tritonlm.access.keys import ADMIN, INFER, METRICS

# Health checks need no key, since supervisors have none.
PUBLIC_PATHS = ("/health/live", "/health/ready")
# The page itself is public; its API calls need a key.
PLAYGROUND = "/playground"
# Routes that change the service for everybody, or show the activity of others.
_ADMIN = (
    ("POST", "/api/models/"), ("DELETE", "/v1/models/"), ("POST", "/api/load_model"), ("POST", "/api/train"),
    ("", "/api/jobs"), ("", "/api/usage"), ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
)  # fmt: skip


# Their requests only store something; what a batch sends counts by itself.
_NOT_COMPUTED = ("/v1/files", "/v1/batches")


def scope_of(method: str, path: str) -> str:
    if path == "/metrics":
        return METRICS
    needs_admin = any(path.startswith(start) and listed in ("", method) for listed, start in _ADMIN)
    return ADMIN if needs_admin else INFER


def is_public(path: str, accept: str) -> bool:
    """Whether the route needs no key; `accept` is the request's Accept header."""
    is_playground = path == PLAYGROUND or path.startswith(f"{PLAYGROUND}/")
    return path in PUBLIC_PATHS or is_playground or redirects_to_playground(path, accept)


def redirects_to_playground(path: str, accept: str) -> bool:
    """Whether a browser requests the root page."""
    return path == "/" and "text/html" in accept


def is_inference(method: str, path: str) -> bool:
    """Whether a request needs a slot, since a model computes for it."""
    return method == "POST" and scope_of(method, path) == INFER and not path.startswith(_NOT_COMPUTED)
