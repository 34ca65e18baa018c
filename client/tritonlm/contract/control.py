"""Commands for the `control` input of `generate`. Each is answered with one JSON report.

This module knows their names and fields; the engine carries them out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from .errors import InvalidRequest

CANCEL = "cancel"  # {"command": "cancel", "id": request id} -> {"cancelled": number of requests with that id}
ABOUT = "about"  # the checkpoint: architecture, sizes, special tokens, chat template, training record
PING = "ping"  # the status, without waiting for the current step; still_seconds separates slow from hung
STATUS = "status"  # counters: slots, running, waiting, blocks …
FIND = "find"  # {"command": "find", "id": request id} -> {"requests": [{"state", "position", "completion_tokens"}, …]}
KNOWN = "known"  # {"command": "known", "ids": [request id, …]} -> {"known": those that run or wait}
DRAIN = "drain"  # refuse new requests and finish the others, since the server stops
RETIRE = "retire"  # the same for a few seconds, before the model is unloaded; repeated until then; returns the status

COMMANDS = (ABOUT, CANCEL, FIND, KNOWN, PING, STATUS, DRAIN, RETIRE)
MAX_IDS = 1024


@dataclass(frozen=True)
class Command:
    name: str
    request_id: str = ""
    request_ids: tuple[str, ...] = ()

    def to_json(self) -> str:
        fields: dict[str, object] = {"command": self.name}
        if self.request_id:
            fields["id"] = self.request_id
        if self.request_ids:
            fields["ids"] = self.request_ids
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Command:
        try:
            fields = json.loads(text)
            name, request_id, request_ids = fields["command"], fields.get("id", ""), fields.get("ids", [])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidRequest('control must be a JSON object such as {"command": "ping"}', "control") from error
        if name not in COMMANDS:
            raise InvalidRequest(f"unknown command {str(name)[:60]!r}; known are {', '.join(COMMANDS)}", "control")
        if not isinstance(request_id, str) or (name in (CANCEL, FIND) and not request_id):
            raise InvalidRequest(f'{name} needs the request\'s id: {{"command": "{name}", "id": "…"}}', "control")
        if (
            not isinstance(request_ids, list)
            or len(request_ids) > MAX_IDS
            or not all(isinstance(i, str) for i in request_ids)
        ):
            raise InvalidRequest(f"ids must be a list of at most {MAX_IDS} request ids", "control")
        return cls(name, request_id, tuple(request_ids))
