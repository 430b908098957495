"""matmul(x, w)  =>  matmul(x, dequantize(quantize(w, s), s)),  s = max |w| / (2^(bits - 1) - 1), a scale a column or a group of rows

Why: a product of few rows waits for its weight to come from memory. Integers of 8, 4 or 2 bits are a quarter, an eighth or a
sixteenth of the bytes; the kernel makes floats of them in registers. Both ``quantize`` and the scale depend on the weight alone: they
are computed once, at the first call, and again when the weight changes. ``dequantize`` is not: fusion puts it into the kernel.

When: only where a scheme is asked for (``options={"quantize": "int8-weight"}``), for each matmul whose right operand is a staged
(weight-only) f32 matrix. ``group`` rows share a scale, a column at a time; 0 stands for all rows. A last group that is not full is
filled with zeros. With ``zero_points`` a group spans from its least to its greatest element (zero included), and integers are
unsigned. Declined with a remark: batches of matrices, other dtypes, and weights of fewer than ``least`` elements, where nothing
is to be gained.

Numerics: lossy. An element moves by half a step of its scale at most.
Reference: Dettmers et al., "LLM.int8()", arXiv:2208.07339, section 2; groups as in Frantar et al., "GPTQ", arXiv:2210.17323.
"""

from __future__ import annotations

from graphopt.errors import UsageError
from graphopt.ir import Builder, dims, types
from graphopt.ir.graph import Graph, Node, Value, is_view
from graphopt.ir.ops import op
from graphopt.ir.opset.quantize import LARGEST, integer_range
from graphopt.ir.stage import Staged, staged_values
from graphopt.pass_manager import Pass
from graphopt.rewrite import Numerics, PassContext, Reject, Rewriter

BITS = (8, 4, 2)
GROUPS = (0, 32, 64, 128, 256)
FLOATS = {d.name: d for d in LARGEST}
TINY = 1.2e-38  # least scale, that of a group of zeros: a normal f32 whose reciprocal is finite


class QuantizeWeights(Pass):
    """Store the weights of matmuls as small integers. See the module's header.

    Args:
        bits: of an integer: 8, 4 or 2.
        group: rows that share a scale; 0 for all of them.
        zero_points: whether a group's range need not be symmetric.
        storage: ``f8e4m3`` or ``f8e5m2``: floats of 8 bits instead of integers; empty for integers.
        least: elements of the smallest weight that is quantized.
    """

    name = "quantize-weights"
    numerics = Numerics.LOSSY
    bits: int = 8
    group: int = 0
    zero_points: bool = False
    storage: str = ""
    least: int = 1 << 14

    def requires(self, g: Graph) -> None:
        if self.bits not in BITS or self.group not in GROUPS:
            raise UsageError(f"{self}: bits must be one of {BITS}, group one of {GROUPS}")
        if self.storage and (self.storage not in FLOATS or self.bits != 8 or self.zero_points):
            raise UsageError(f"{self}: storage must be one of {', '.join(FLOATS)}, of 8 bits and without zero points")

    def run(self, g: Graph, ctx: PassContext) -> bool:
        staged, made, changed = staged_values(g), dict[Value, Value](), False
        for node in g.nodes():
            if node.op.name != "matmul":
                continue
            w = node.operands[1]
            if reject := self._reject(w, staged):
                if reject.reason:
                    ctx.missed(self.name, f"the weight is not quantized: {reject.reason}", node)
                continue
            number = ctx.fuel.take()
            if number is None:
                continue
            if w not in made:
                made[w] = quantized(Rewriter(g, node), w, self.bits, self.group, self.zero_points, self.storage)
            else:  # a dequantize of its own for each reader, as a kernel reads the integers
                made[w] = _again(g, made[w], node)
            ctx.passed(self.name, f"weight {w!r} is stored in {self.bits} bits an element", node, number)
            g.set_operand(node, 1, made[w])
            changed = True
        return changed

    def _reject(self, w: Value, staged: Staged) -> Reject | None:
        if w not in staged or not dims.is_static(w.shape):
            return Reject("")
        if w.type.rank != 2:
            return Reject(f"it is a batch of matrices, {w.type}", w)
        if w.dtype != types.f32:
            return Reject(f"it is {w.dtype}, only f32 is", w)
        if int(w.type.numel) < self.least:
            return Reject(f"it has {int(w.type.numel)} elements, fewer than {self.least}", w)
        return None


def quantized(rw: Rewriter, w: Value, bits: int, group: int, zero_points: bool, storage: str = "") -> Value:
    """``[K, N]`` as ``dequantize(quantize(w))``, in groups of the first axis."""
    k, n = (int(d) for d in w.shape)
    groups = -(-k // group) if group else 1
    x, axis = w, 0
    if groups > 1 or (group and group != k):
        padded = groups * group
        x = rw.pad(w, low=(0, 0), high=(padded - k, 0), value=0.0) if padded != k else w
        x, axis = rw.reshape(x, shape=(groups, group, n)), 1
    dtype = FLOATS.get(storage, types.u8 if zero_points else types.i8)
    scale, zero = scales(rw, x, axis, bits, zero_points, LARGEST.get(dtype))
    points = [] if zero is None else [zero]
    q = rw.create("quantize", [x, scale, *points], {"dtype": dtype, "bits": bits})
    y: Value = rw.create("dequantize", [q, scale, *points])
    if axis:
        y = rw.reshape(y, shape=(groups * group, n))
        y = rw.create("slice", [y], {"axis": 0, "stop": k}) if groups * group != k else y
    return y


def scales(rw: Builder, x: Value, axis: int | tuple[int, ...], bits: int, zero_points: bool,
           most: float | None = None) -> tuple[Value, Value | None]:  # fmt: skip
    """A scale for all elements along an axis, or several, and the integer that stands for zero, if that is not 0; ``most``: what the
    largest becomes, if not the largest integer."""
    over = {"axes": axis if isinstance(axis, tuple) else (axis,), "keepdims": True}
    if not zero_points:
        largest = rw.create("max", [rw.abs(x)], over)
        return rw.maximum(rw.mul(largest, 1.0 / (most or integer_range(types.i8, bits)[1])), TINY), None
    low = rw.minimum(rw.create("min", [x], over), 0.0)
    high = rw.maximum(rw.create("max", [x], over), 0.0)
    scale = rw.maximum(rw.mul(rw.sub(high, low), 1.0 / integer_range(types.u8, bits)[1]), TINY)
    return scale, rw.create("quantize", [rw.neg(low), scale], {"dtype": types.u8, "bits": bits})


def _again(g: Graph, y: Value, before: Node) -> Value:
    """The same value, by a ``dequantize`` of its own."""
    node = y.producer
    assert node is not None
    operands = [_again(g, node.operands[0], before)] if is_view(node) else node.operands
    return g.create(op(node.op.name), operands, node.attrs, before=before, loc=node.loc).result
