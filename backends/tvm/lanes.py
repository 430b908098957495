"""Vectors of flat buffers."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.tvm.code import Code, Index, i64


class Lanes:
    """What a kernel reads and writes of buffers at a time: ``lanes`` elements, or one element where that is 1."""

    code: Code
    lanes: int

    def _wide(self, value: Any) -> Any:
        """A number in all lanes."""
        return value if self.lanes == 1 else tirx.Broadcast(value, self.lanes)

    def _vector(self, buffer: Any, at: Index) -> Any:
        """The elements from a place on."""
        return buffer[self._lanes_at(at)]

    def _put(self, buffer: Any, at: Index, value: Any) -> None:
        self.code.emit(tirx.BufferStore(buffer, value, [self._lanes_at(at)]))

    def _lanes_at(self, at: Index) -> Any:
        return i64(at) if self.lanes == 1 else tirx.Ramp(i64(at), i64(1), self.lanes)
