"""Log setup for this package's processes: text lines or JSON objects, written to stderr."""

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


def configure(log_format: str = AUTO, level: str = "info") -> None:
    """`auto` is text on a terminal and JSON elsewhere. Logging that is already set up stays unchanged."""
    assert log_format in FORMATS, log_format
    handler = logging.StreamHandler(sys.stderr)
    if log_format == JSON or (log_format == AUTO and not sys.stderr.isatty()):
        handler.setFormatter(
            JsonFormatter(_FIELDS, rename_fields={"levelname": "level", "name": "logger"}, timestamp="time")
        )
    else:
        handler.setFormatter(logging.Formatter(_LINE))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # httpx logs every outgoing request; our own log lines already cover them.
    logging.getLogger("httpx").setLevel(logging.WARNING)


def configure_from_environment(environment: Mapping[str, str] = os.environ) -> None:
    """For a process without settings of its own; invalid values fall back to the defaults."""
    log_format, level = environment.get(FORMAT_VARIABLE, AUTO), environment.get(LEVEL_VARIABLE, "info")
    is_valid_level = isinstance(logging.getLevelName(level.upper()), int)
    configure(log_format if log_format in FORMATS else AUTO, level if is_valid_level else "info")
