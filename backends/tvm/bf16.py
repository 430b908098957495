"""Products with a weight of bf16 on AMX tiles, summed in f32: of a first factor of bf16, or of f32, or of floats of 8 bits.

An f32 is the exact sum of three bf16 (:mod:`~graphopt.backends.tvm.thirds`), so its product with a bf16 is three products of bf16, each of
them exact in f32: half of the six that thirds of both factors take, and nothing is left out. Floats of 8 bits are bf16 as they are. How
rows and tasks go is :mod:`~graphopt.backends.tvm.panelproduct`'s.

Numbers below 2**-126 count as zero, thirds, too.

Reference: Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations",
IEEE ARITH 2019.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.tvm import amx, scalar
from graphopt.backends.tvm.bf16form import parts
from graphopt.backends.tvm.code import Index
from graphopt.backends.tvm.pairform import packed_pairs
from graphopt.backends.tvm.panelform import products_of, statistic_of
from graphopt.backends.tvm.panelproduct import PanelProduct
from graphopt.backends.tvm.thirds import thirds
from graphopt.errors import BuildError
from graphopt.ir import types
from graphopt.ir.graph import Graph

_SPECIAL, _QUIET = 0x7F800000, 0x00400000


class Bf16Kernel(PanelProduct):
    """Emits a region with one product, or two of one first factor, and a pointwise epilogue of the product's shape.

    Args: see :func:`graphopt.backends.tvm.bf16form.params`.
    """

    word, total, held = 2, "float32", "uint16"

    def __init__(self, graph: Graph, **knobs: Any) -> None:
        nodes = products_of(graph)
        packed = [p for n in nodes if (p := packed_pairs(n.operands[1])) is not None]
        if len(packed) != len(nodes):
            raise BuildError("the second factor is not packed in pairs")
        self.parts = parts(nodes[0].operands[0].dtype)
        super().__init__(graph, nodes, packed, statistic_of(graph), "amx", **knobs)

    def _put(self, left: Any, at: Index, value: Any) -> None:
        code = self.code
        if self.parts == 1:
            dtype = self.left.dtype
            wide = value if dtype == types.bf16 else scalar.cast(value, dtype, types.f32)
            code.store(left, at, scalar.store(wide, types.bf16))
            return
        for part, word in enumerate(reversed(finite_thirds(value))):  # the smallest products are summed first
            code.store(left, code.simplify(at + part * self.whole), tirx.shift_right(word, tirx.const(16, "uint32")).astype("uint16"))

    def _multiply(self, total: int, a: int, b: int) -> None:
        amx.multiply(self.code, total, a, b)


def finite_thirds(x: Any) -> tuple[Any, Any, Any]:
    """The thirds of an f32; of one that is infinite or nan, itself and zeros: so the product with a finite number is what f32 gives."""

    def word(n: int) -> Any:
        return tirx.const(n, "uint32")

    high, middle, low = thirds(x, 1)
    bits = tirx.bitwise_and(tirx.reinterpret("uint32", x), word(0x7FFFFFFF))
    quiet = tirx.Select(bits > word(_SPECIAL), word(_QUIET), word(0))  # a nan may be one by its lower bits alone
    special = bits >= word(_SPECIAL)
    return tirx.bitwise_or(high, quiet), *(tirx.Select(special, word(0), third) for third in (middle, low))
