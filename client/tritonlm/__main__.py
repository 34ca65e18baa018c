"""The program `tritonlm`: the command line (`cli`), imported without garbage collections. It knows no command.

Its processes inherit how idle threads wait.
"""

from __future__ import annotations

from tritonlm.contract.idle_threads import sleep_when_idle
from tritonlm.contract.imports import without_collections


def main() -> None:
    sleep_when_idle()
    with without_collections():
        from tritonlm.cli import app  # noqa: PLC0415 (inside the context)
    app()


if __name__ == "__main__":
    main()
