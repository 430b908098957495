"""matmul(x, w)  =>  dequantize(matmul(quantize(x, s), quantize(w, t)) {acc = i32}, s * t),  s = max |x| / 127 a row, t a column

Why: processors multiply 8-bit integers four times as fast as f32 where they have dot instructions for them, and far faster on tiles;
the weight is a quarter of the bytes. Sums of integers are exact, so nothing is lost between the two roundings, of the factors. A scale
for each row of ``x`` (a token) is computed at each call: no calibration, and a row of large elements costs the others nothing.

With ``storage`` both factors become floats of 8 bits (``fp8-e4m3-dynamic``, ``fp8-e5m2-dynamic``) by scales of the same kind, whose
largest number takes the place of 127. bf16 holds them as they are, and products of them are exact in f32::

    matmul(x, w)  =>  dequantize(matmul(cast(quantize(x, s), bf16), cast(quantize(w, t), bf16)) {acc = f32}, s * t)

When: only where a scheme is asked for (``options={"quantize": "int8-dynamic"}``), for each matmul of f32 whose right operand is a
staged (weight-only) matrix. Products of one ``x`` share its rounding; fusion takes it into the kernel of each. Declined with a
remark: batches of matrices, other dtypes, weights of fewer than ``least`` elements or with a side below 16, and sums of more than 2^17
terms, which an i32 may not hold; floats of 8 bits on a target that multiplies no bf16.

Numerics: lossy. An element of either factor moves by half a step of its scale at most; of e4m3 by 2^-4 of itself, of e5m2 by 2^-3.
Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877; scales a token as in Yao et al., "ZeroQuant", arXiv:2206.01861.
"""

from __future__ import annotations

from graphopt.errors import UsageError
from graphopt.ir import DType, dims, types
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph, Value
from graphopt.ir.opset.quantize import LARGEST
from graphopt.ir.stage import Staged, staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.layout import fours
from graphopt.passes.quantization.quantize_weights import FLOATS, scales
from graphopt.rewrite import Numerics, PassContext, Reject, Rewriter, erase_dead
from graphopt.target import Target

MOST_TERMS = (1 << 17) - 1  # of a sum: each is at most 2^14


class QuantizeProducts(Pass):
    """Multiply 8-bit integers in the place of floats. See the module's header.

    Args:
        least: elements of the smallest weight that is quantized.
        storage: ``f8e4m3`` or ``f8e5m2``: floats of 8 bits in the place of integers; empty for integers.
    """

    name = "quantize-products"
    numerics = Numerics.LOSSY
    least: int = 1 << 14
    storage: str = ""

    def requires(self, g: Graph) -> None:
        if self.storage and self.storage not in FLOATS:
            raise UsageError(f"{self}: storage must be one of {', '.join(FLOATS)}")

    def run(self, g: Graph, ctx: PassContext) -> bool:
        staged, changed = staged_values(g), False
        lefts, rights = dict[Value, tuple[Value, Value]](), dict[Value, tuple[Value, Value]]()
        for node in g.nodes():
            if node.op.name != "matmul" or node.attrs["acc"] is not None:
                continue
            x, w = node.operands
            if reject := self._reject(x, w, staged, ctx.target):
                if reject.reason:
                    ctx.missed(self.name, f"the product stays in floats: {reject.reason}", node)
                continue
            number = ctx.fuel.take()
            if number is None:
                continue
            rw = Rewriter(g, node)
            dtype = FLOATS.get(self.storage, types.i8)
            if x not in lefts:
                lefts[x] = rounded_rows(rw, x, dtype)
            if w not in rights:
                scale, _ = scales(rw, w, 0, 8, False, LARGEST.get(dtype))
                rights[w] = rw.create("quantize", [w, scale], {"dtype": dtype, "bits": 8}), scale
            (q, s), (p, t) = lefts[x], rights[w]
            what = f"in {dtype}" if self.storage else "as integers"
            ctx.passed(self.name, f"rows of {x.type} and weight {w!r} are multiplied {what}", node, number)
            g.replace(node.result, integer_product(rw, q, s, p, t))
            erase_dead(g, node)
            changed = True
        return changed

    def _reject(self, x: Value, w: Value, staged: Staged, t: Target | None) -> Reject | None:
        if w not in staged or not dims.is_static(w.shape) or x in staged:
            return Reject("")
        if w.type.rank != 2:
            return Reject(f"its weight is a batch of matrices, {w.type}", w)
        if w.dtype != types.f32:
            return Reject(f"it is of {w.dtype}, only f32 is quantized", w)
        k, n = (int(d) for d in w.shape)
        if k * n < self.least or min(k, n) < fours.LEAST:
            return Reject(f"its weight is {k} by {n}, too few elements", w)
        if self.storage:
            able = t is None or t.is_gpu or t.bf16_products
            return None if able else Reject(f"no kernel of this target multiplies {self.storage}")
        return Reject(f"sums of {k} terms may exceed 32 bits", w) if k > MOST_TERMS else None


def rounded_rows(b: Builder, x: Value, dtype: DType = types.i8) -> tuple[Value, Value]:
    """``[..., K]`` of f32 in 8 bits, and its scales ``[..., 1]``: each row's largest magnitude becomes the dtype's largest number."""
    scale, _ = scales(b, x, x.type.rank - 1, 8, False, LARGEST.get(dtype))
    return b.create("quantize", [x, scale], {"dtype": dtype, "bits": 8}), scale


def largest_of_rows(b: Builder, x: Value) -> Value:
    """The largest magnitude of each row of ``[..., K]``, ``[..., 1]``; nan where there is one."""
    return b.create("max", [b.abs(x)], {"axes": (x.type.rank - 1,), "keepdims": True})  # type: ignore[no-any-return]


def integer_product(b: Builder, q: Value, s: Value, p: Value, t: Value) -> Value:
    """The product of 8 bits ``[..., K]`` and ``[K, N]`` in f32, given their scales ``[..., 1]`` (or one) and ``[1, N]``."""
    if q.dtype.is_float:  # bf16 holds floats of 8 bits as they are
        total = b.create("matmul", [b.cast(q, types.bf16), b.cast(p, types.bf16)], {"acc": types.f32})
    else:
        total = b.create("matmul", [q, p], {"acc": types.i32})
    return b.dequantize(total, b.mul(s, t))  # type: ignore[no-any-return]
