"""The sums of products: their type, how what follows reads them, and sums of pieces of the depth (split-K).

    partial[p] = sum over steps p, p + PIECES, p + 2 PIECES ... of the depth        a program each
    result     = epilogue(partial[0] + partial[1] + ...)                            a second kernel

Where tiles are fewer than processors and the depth is long, programs share the depth of one tile. Each leaves its sums in scratch memory,
in the type in which they are summed; the second kernel adds them in order, so a result has the same bits each time.
Reference: NVIDIA, "CUTLASS: efficient GEMM in CUDA", parallelized reductions (split-K).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.backends.triton.code import Code, Launch, Scratch, ceildiv, conditions
from graphopt.backends.triton.expr import Expressions, Index, Source, Tile
from graphopt.backends.triton.index import Var, add, scale, shift, variable
from graphopt.backends.triton.pointwise import NAMES
from graphopt.errors import BuildError
from graphopt.ir import dims, types
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Node

PARTIAL = "partial"  # the scratch memory's name
BLOCK, WARPS = 256, 2  # of the second kernel: four elements a thread, which one load reads


def sum_type(dtype: types.DType) -> types.DType:
    """The type in which products of a type are summed."""
    if not dtype.is_float:
        return types.i32
    return types.f64 if dtype == types.f64 else types.f32


def in_turn(pieces: int) -> str:
    """The loop in which pieces are joined: several are on their way at once; all of many would take the compiler long."""
    return f"tl.range({pieces}, loop_unroll_factor={min(16, pieces)})"


def total_of(dtype: types.DType) -> str:
    """The same, as Triton calls it."""
    return NAMES[sum_type(dtype)]


def computed(acc: str, node: Node, own: Index, axes: frozenset[int] = frozenset([0, 1]), depth: int = 0) -> Source:
    """The result of a product (or a window, or a scan), read from its accumulator, at its own index alone."""
    tile = Tile(acc, node.result.dtype, axes, depth)

    def source(index: Index) -> Tile:
        if any(i != j for i, j in zip(index, own, strict=True)):
            raise BuildError(f"a {node.name} is read at another place than it is computed at")
        return tile

    return source


@dataclass(frozen=True)
class Pieces:
    """The depth of a region's products, of one shape and type, in pieces.

    Attributes:
        nodes: the products.
        count: of pieces; one where nothing is split.
    """

    nodes: tuple[Node, ...]
    count: int

    @property
    def grid(self) -> tuple[int, ...]:
        """Programs along the last axis of the grid."""
        return (self.count,) if self.count > 1 else ()

    @property
    def scratch(self) -> dict[str, Scratch]:
        node = self.nodes[0]
        numel = dims.numel([self.count, len(self.nodes), *node.result.shape])
        return {PARTIAL: Scratch(sum_type(node.operands[0].dtype), numel)} if self.count > 1 else {}

    def own(self, code: Code, axis: int) -> Var:
        """This program's piece; ``axis`` is that of the grid along which the pieces lie."""
        return Var(code.program(axis, "piece") if self.count > 1 else "0", self.count)

    def ends(self, code: Code, piece: Var, depth: Dim) -> tuple[str, str, str]:
        """The blocks of a piece of the depth: the first, what they are below, and the step."""
        if self.count == 1:
            return "0", code.size(depth), "BLOCK_K"
        return f"{piece.name} * BLOCK_K", code.size(depth), f"{self.count} * BLOCK_K"

    def steps(self, code: Code, piece: Var, depth: Dim) -> str:
        """The loop over them."""
        return f"range({', '.join(self.ends(code, piece, depth))})"

    def finish(self, e: Expressions, piece: Var, index: Index, sums: Sequence[str], lanes: Sequence[Var], shape: str) -> None:
        """Write the region's outputs, computed from the sums of a tile; or the sums of a piece, and the kernel that joins them."""
        code = e.code
        if self.count == 1:
            axes = frozenset(a for lane in lanes for a in lane.axes)
            for node, total in zip(self.nodes, sums, strict=True):
                e.sources[node.result] = computed(total, node, index, axes, code.depth)
            for k in range(len(code.graph.outputs)):
                e.store(k, index, lanes, shape)
            return
        result = self.nodes[0].result
        at = add(e.places.flatten(index, result.shape), scale(variable(piece), result.type.numel))
        for k, total in enumerate(sums):
            e.write(PARTIAL, shift(at, dims.mul(k * self.count, result.type.numel)), lanes, shape, total)
        code.then.append(self._joined(code))

    def _joined(self, of: Code) -> tuple[Code, Launch]:
        """The kernel that adds the pieces and computes what follows."""
        code, shape = Code(of.graph, of.scratch), self.nodes[0].result.shape
        e, size = Expressions(code), dims.numel(shape)
        at = code.block("at", f"{code.program(0)} * BLOCK", "BLOCK", BLOCK, size, 0, 1)
        index = e.places.unflatten(variable(at), shape)
        mask = f", mask={conditions(at.inside)}, other=0" if at.inside else ""
        place = code.let("place", at.name)
        for node in self.nodes:
            total = code.let("sum", f"tl.zeros([BLOCK], {total_of(node.operands[0].dtype)})")
            with code.loop(f"for _ in {in_turn(self.count)}:"):
                code.line(f"{total} += tl.load({PARTIAL} + {place}{mask})")
                code.line(f"{place} += {code.size(size)}")
            e.sources[node.result] = computed(total, node, index, at.axes)
        for k in range(len(code.graph.outputs)):
            e.store(k, index, [at], "[BLOCK]")
        return code, Launch((ceildiv(size, BLOCK),), {"BLOCK": BLOCK}, WARPS, 1)
