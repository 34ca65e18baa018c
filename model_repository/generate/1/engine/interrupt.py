"""A flag by which other threads end a multi-step call of the kernels early. It does not know why."""

from __future__ import annotations

import ctypes


class Interrupt:
    def __init__(self) -> None:
        # The kernels read it through its address.
        self._flag = ctypes.c_int32()

    @property
    def address(self) -> int:
        return ctypes.addressof(self._flag)

    def set(self) -> None:
        self._flag.value = 1

    def clear(self) -> None:
        self._flag.value = 0
