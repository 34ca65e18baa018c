"""The program `tritonlm`: the command line (`cli`), imported without garbage collections. It knows no command.

Its processes inherit how idle threads wait.
"""

from __future__ import annotations

import os
import sys

from tritonlm.contract.idle_threads import sleep_when_idle
from tritonlm.contract.imports import without_collections


def _open_closed_streams() -> None:
    """Standard streams that the caller has closed (`<&-`, some service managers) are those of /dev/null.

    Otherwise a socket gets the number of one, and a process that is started with it loses it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest free number is the stream's own.
            number = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def main() -> None:
    _open_closed_streams()
    sleep_when_idle()
    with without_collections():
        from tritonlm.cli import app  # noqa: PLC0415 (inside the context)
    app()


if __name__ == "__main__":
    main()
