"""The judgement of a kernel, and the symbols of the tests."""

from __future__ import annotations

from graphopt.ir import dims
from graphopt.testing.kernels import check, sizes, values

__all__ = ["B", "H", "check", "sizes", "values"]

B, H = dims.symbol("B"), dims.symbol("H")
