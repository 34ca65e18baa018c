"""Which tests stay together when several lanes run them: who shares a server or a compiled library.

It knows the rooms' names, not what is tried there.
"""

from __future__ import annotations

import pytest

_LONGEST = "over_triton"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file over Triton goes to one lane, and any other folder as a whole; the quick ones last, to fill up."""
    items.sort(key=lambda item: item.path.parent.name != _LONGEST)
    for item in items:
        group = item.path.stem if item.path.parent.name == _LONGEST else item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(group))
