"""matmul(x, w)  =>  matmul(cast(x, d), cast(w, d)) {acc = f32},    attention(q, k, v)  =>  cast(attention(cast(q, d), ...), f32)

Why: processors multiply bf16 several times as fast as f32, and a weight of half the bytes is read in half the time. Sums stay f32: the
instructions sum there anyway, and so does what follows (a bias, an activation, a residual), until a value is an operand of the next
product. So a value is rounded once between two products, where autocast of PyTorch rounds every product's result as well.

When: only where it is asked for (``options={"precision": "bf16"}``), before fusion. What goes low: products of f32 with a frozen
matrix, and attention whose keys and values are computed, not read from a cache. Everything else stays in f32: sums, softmax, norms and
their statistics, losses, pointwise work. A cast stands at the border alone: in front of a product's left operand, or in front of the
views that it is read through, where everything that reads the value is low; a low value that is read as f32 is widened, which loses
nothing. A weight is rounded once, when it is staged. Declined with a remark: what the target has no instructions for, products of two
activations, batches of matrices, weights of fewer than ``least`` elements, attention with a bias (a mask's lowest number is infinite in
bf16), convolutions (no kernel). Products that are low already, as under ``torch.autocast``, are left as they are, in silence.

Numerics: lossy. Factors are rounded to 8 bits (bf16) or 11 (f16): 2^-9 or 2^-12 of themselves at most. f16 holds nothing above 65504.
Reference: Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740; Kalamkar et al., "A Study of BFLOAT16 for Deep Learning
Training", arXiv:1905.12322.
"""

from __future__ import annotations

from graphopt.errors import UsageError
from graphopt.ir import DType, dims, types
from graphopt.ir.graph import Graph, Node, Value, is_view
from graphopt.ir.opset.attention import parts
from graphopt.ir.stage import Staged, staged_values
from graphopt.pass_manager import Pass
from graphopt.rewrite import Numerics, PassContext, Reject, Rewriter, erase_dead
from graphopt.target import Target

PRECISIONS = {"bf16": types.bf16, "f16": types.f16}
_HEADS = 3  # operands of an attention that are multiplied: queries, keys, values


class Autocast(Pass):
    """Multiply in bf16 or f16, sum in f32. See the module's header.

    Args:
        dtype: ``bf16`` or ``f16``.
        least: elements of the smallest weight that goes low.
    """

    name = "autocast"
    numerics = Numerics.LOSSY
    dtype: str = "bf16"
    least: int = 1 << 10

    def requires(self, g: Graph) -> None:
        if self.dtype not in PRECISIONS:
            raise UsageError(f"{self}: dtype must be one of {', '.join(PRECISIONS)}")

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if (why := missing(PRECISIONS[self.dtype], ctx.target)) is not None:
            ctx.analysis(self.name, f"nothing goes low: {why}")
            return False
        staged = staged_values(g)
        chosen: dict[Node, int] = {}
        for node in g.nodes():
            reject = self._reject(node, staged)
            if reject is None:
                number = ctx.fuel.take()
                if number is not None:
                    chosen[node] = number
            elif reject.reason:
                ctx.missed(self.name, f"the {node.op.name} stays in f32: {reject.reason}", node)
        lower = _Lower(g, PRECISIONS[self.dtype], chosen)
        for node, number in chosen.items():
            ctx.passed(self.name, f"{_name(node)} in {self.dtype}, summed in f32", node, number)
            lower.node(node)
        return bool(chosen)

    def _reject(self, node: Node, staged: Staged) -> Reject | None:
        """Why a node stays; without a reason if it is not what this is about."""
        if staged.node(node) or not node.results or node.results[0].dtype != types.f32:
            return Reject("")
        if node.op.name == "attention":
            return _attention_reject(node)
        if node.op.name in ("conv", "conv_transpose"):
            return Reject("there is no kernel for it in fewer bits")
        if node.op.name != "matmul" or node.attrs["acc"] is not None:
            return Reject("")
        w = node.operands[1]
        if w not in staged or not dims.is_static(w.shape):
            return Reject("both factors are computed, and only frozen weights are laid out for it", w)
        if w.type.rank != 2:
            return Reject(f"its weight is a batch of matrices, {w.type}", w)
        if int(w.type.numel) < self.least:
            return Reject(f"its weight has {int(w.type.numel)} elements, fewer than {self.least}", w)
        return None


def missing(dtype: DType, t: Target | None) -> str | None:
    """Why a target gains nothing by a dtype, or None."""
    if t is None or t.is_gpu or (dtype == types.bf16 and t.bf16_products):
        return None
    return f"the target has no instructions that multiply {dtype}"


def _attention_reject(node: Node) -> Reject | None:
    p = parts(node.operands, node.attrs)
    if p.bias is not None or p.slopes is not None or p.sinks is not None:
        return Reject("it has a bias, whose lowest numbers have no finite neighbour in fewer bits")
    for v in (p.k, p.v):
        if (home := _behind_views(v)).is_input or home.defined_by("concat", "take", "put", "dequantize"):
            return Reject("its keys and values are read from a cache, which would be rounded at each call", v)
    return None


def _behind_views(v: Value) -> Value:
    while v.producer is not None and is_view(v.producer):
        v = v.producer.operands[0]
    return v


def _name(node: Node) -> str:
    return f"{node.op.name} by {node.operands[1]!r}" if node.op.name == "matmul" else node.op.name


class _Lower:
    """Rewrites the chosen nodes, in order; knows what was rounded already.

    Args:
        chosen: nodes that multiply low operands.
    """

    def __init__(self, g: Graph, dtype: DType, chosen: dict[Node, int]) -> None:
        self.g, self.dtype = g, dtype
        self._low: dict[Value, Value] = {}
        self._reads = {(n, i): None for n in chosen for i in range(1 if n.op.name == "matmul" else _HEADS)}

    def node(self, node: Node) -> None:
        rw = Rewriter(self.g, node)
        count = 2 if node.op.name == "matmul" else _HEADS
        operands = [*(self.low(rw, v) for v in node.operands[:count]), *node.operands[count:]]
        attrs = dict(node.attrs)
        if node.op.name == "matmul":
            result = rw.create("matmul", operands, attrs | {"acc": types.f32})
        else:
            result = rw.cast(rw.create(node.op.name, operands, attrs), types.f32)
        self.g.replace(node.result, result)
        erase_dead(self.g, node)

    def low(self, rw: Rewriter, v: Value) -> Value:
        """The value in the low dtype, rounded where most is saved."""
        if v.dtype == self.dtype:
            return v
        if v in self._low:
            return self._low[v]
        node = v.producer
        if node is not None and node.op.name == "cast" and node.operands[0].dtype == self.dtype:
            made = node.operands[0]
        elif node is not None and is_view(node) and (self._is_wide(node.operands[0]) or self._read_low(node.operands[0])):
            made = rw.create(node.op.name, [self.low(rw, node.operands[0])], dict(node.attrs))
        else:
            made = rw.cast(v, self.dtype)
        self._low[v] = made
        return made

    def _is_wide(self, v: Value) -> bool:
        """Whether a value is a low one that was widened, through views."""
        node = _behind_views(v).defined_by("cast")
        return node is not None and node.operands[0].dtype == self.dtype

    def _read_low(self, v: Value) -> bool:
        """Whether all that reads a value, through views, is a low operand."""
        return v in self._low or all((u, i) in self._reads or (is_view(u) and self._read_low(u.result)) for u, i in v.uses)
