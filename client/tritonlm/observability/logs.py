"""How this package's processes write their logs: a line for a person, or a JSON object for a machine. To stderr."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping

from pythonjsonlogger.json import JsonFormatter

AUTO, TEXT, JSON = FORMATS = ("auto", "text", "json")
FORMAT_VARIABLE, LEVEL_VARIABLE = "TRITONLM_LOG_FORMAT", "TRITONLM_LOG_LEVEL"
_LINE = "%(asctime)s %(levelname)s %(message)s"
_FIELDS = "%(levelname)s %(name)s %(message)s"


def configure(form: str = AUTO, level: str = "info") -> None:
    """`auto` is text on a terminal and JSON elsewhere. Where somebody has set up logging already, it stays as it is."""
    assert form in FORMATS, form
    handler = logging.StreamHandler(sys.stderr)
    if form == JSON or (form == AUTO and not sys.stderr.isatty()):
        handler.setFormatter(
            JsonFormatter(_FIELDS, rename_fields={"levelname": "level", "name": "logger"}, timestamp="time")
        )
    else:
        handler.setFormatter(logging.Formatter(_LINE))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # One line for each request that leaves the process is theirs, and ours says the same.
    logging.getLogger("httpx").setLevel(logging.WARNING)


def configure_from(environment: Mapping[str, str] = os.environ) -> None:
    """For a process that has no settings of its own; what it cannot read is as if it were not there."""
    form, level = environment.get(FORMAT_VARIABLE, AUTO), environment.get(LEVEL_VARIABLE, "info")
    known = isinstance(logging.getLevelName(level.upper()), int)
    configure(form if form in FORMATS else AUTO, level if known else "info")
