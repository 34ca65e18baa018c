"""Which tests stay together when several lanes run them: who shares a server or a compiled library.

It knows the rooms' names, not what is tried there.
"""

from __future__ import annotations

import pytest

_OVER_TRITON = "over_triton"
# Each takes minutes.
_LONG = (_OVER_TRITON, "real_models")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file over Triton goes to one lane, and any other folder as a whole; the quick ones last, to fill up."""
    items.sort(key=lambda item: item.path.parent.name not in _LONG)
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(item.path.stem if folder == _OVER_TRITON else folder))
