"""What the backend can compile, and in words what it cannot. Looks at the IR only: tvm is not needed."""

from __future__ import annotations

from graphopt.ir import dims, types
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import Trait
from graphopt.ir.opset.quantize import LARGEST
from graphopt.ir.opset.window import WINDOWS
from graphopt.target import Target

MAX_RANK = 8
DTYPES = (types.f64, types.f32, types.f16, types.bf16, types.i64, types.i32, types.i16, types.i8, types.u8, types.b1)
VIEWS = ("reshape", "transpose", "broadcast_to", "slice", "flip")
MOVES = (*VIEWS, "concat", "pad", "take", "gather", "constant", "iota", "unpack_bits")
REDUCTIONS = ("sum", "prod", "max", "min", "any", "all", "mean", "argmax", "argmin")
SCANS = ("cumsum", "cumprod", "cummax", "cummin", "argcummax", "argcummin", "logcumsumexp")
SCATTERS = ("put", "scatter")
PRODUCTS = ("matmul", "conv", *WINDOWS)
ROW_OPS = ("softmax", "log_softmax", "layer_norm", "rms_norm", "var")
ACTIVATIONS = ("gelu", "silu", "softplus", "elu", "leaky_relu", "hardsigmoid", "hardswish", "mish")
ATTENTIONS = ("attention", "attention_forward", "attention_backward")
_INTEGER_DIVISIONS = ("floor_div", "trunc_div", "remainder", "fmod")


def refusal(graph: Graph, target: Target) -> str | None:
    """Why a region cannot be compiled, or None."""
    if target.kind != "cpu":
        return f"the tvm backend compiles for CPUs, not for {target.kind}"
    for v in graph.inputs:
        if (why := _value(v, target)) is not None:
            return why
    for strides, v in zip(graph.output_strides, graph.outputs, strict=True):
        if strides is not None and len(strides) != v.type.rank:
            return f"output {v.type} with strides {strides}"
    for node in graph.nodes():
        if (why := _node(node, target)) is not None:
            return why
    return None if graph.outputs else "the region has no outputs"


def _value(v: Value, target: Target) -> str | None:
    if v.dtype not in (*DTYPES, *LARGEST):
        return f"dtype {v.dtype} ({v.type})"
    if v.type.rank > MAX_RANK:
        return f"rank {v.type.rank} of {v.type} is above {MAX_RANK}"
    if v.dtype in (types.f16, *LARGEST) and target.arch == "x86_64" and not (target.has("f16c") or target.has("avx512f")):
        return f"{v.dtype} on a target without F16C"
    return None


def _node(node: Node, target: Target) -> str | None:
    name = node.name
    for r in node.results:
        if (why := _value(r, target)) is not None:
            return f"{name}: {why}"
    if node.op.has(Trait.POINTWISE):
        return _pointwise(node)
    if name in (*MOVES, *REDUCTIONS, *ROW_OPS, *PRODUCTS, *SCANS, *SCATTERS, *ATTENTIONS):
        if name == "constant" and isinstance(node.attrs["value"], complex):
            return "a complex constant"
        return None
    return f"{name} has no template"


def _pointwise(node: Node) -> str | None:
    name, operand = node.name, node.operands[0]
    f8 = [v for v in (*node.operands, *node.results) if v.dtype in LARGEST]
    if f8 and name not in ("dequantize", "cast") and f8 != ([node.result] if name == "quantize" else []):
        return f"{name} on {f8[0].dtype}"
    if name in _INTEGER_DIVISIONS and not operand.dtype.is_float:
        divisor = constant_of(node.operands[1])
        if divisor is None or divisor == 0:
            return f"{name} on {operand.dtype} by a divisor that is not a nonzero constant (eager raises on zero)"
        if operand.dtype.is_bool:
            return f"{name} on b1"
    if name == "pow" and not operand.dtype.is_float:
        exponent = constant_of(node.operands[1])
        if exponent is None or not 0 <= exponent <= 64 or operand.dtype.is_bool:
            return f"pow on {operand.dtype} with an exponent that is not a constant from 0 to 64"
    if name in ("sub", "neg") and operand.dtype.is_bool:
        return f"{name} on b1"
    return None


def behind_views(v: Value) -> Value:
    """What a value is a view of, through any number of views; itself if it is none."""
    while v.producer is not None and v.producer.name in VIEWS:
        v = v.producer.operands[0]
    return v


def constant_of(v: Value) -> float | int | bool | None:
    """The number that a value is everywhere, if it is a scalar constant behind views; else None."""
    node = v.producer
    while node is not None and node.name in VIEWS:
        node = node.operands[0].producer
    if node is None or node.name != "constant":
        return None
    value = node.attrs["value"]
    return value if isinstance(value, bool | int | float) else None


def is_materialized(node: Node) -> bool:
    """Whether a node's result must be computed by loops of its own: a reduction, a scan, a product or a window, or updates by index."""
    return node.name in REDUCTIONS or node.name in PRODUCTS or node.name in SCANS or node.name in SCATTERS


def materialized(graph: Graph) -> list[Node]:
    """The nodes of a region that are more than a formula of their elements, in order: its products, reductions, convolutions ..."""
    return [n for n in graph.nodes() if is_materialized(n)]


def is_softmax_exp(node: Node) -> bool:
    """Whether a node is the exponential of a softmax, ``exp(x - max x)``, read alone by its sum and by its quotient with that sum.

    Maximum and sum are over the same axes, so the sum is at least one, and what is tiny beside one does not count. Products
    with denormal numbers take a hundred cycles each on many CPUs; a mask of -100 would fill a row with them. Where a logarithm
    of the quotient is taken (an entropy), what is tiny does count.
    """
    shifted = node.operands[0].producer if node.name == "exp" else None
    if shifted is None or shifted.name != "sub":
        return False
    x, largest = shifted.operands
    top = largest.producer
    if top is None or top.name != "max" or top.operands[0] is not x or not top.attrs["keepdims"]:
        return False

    def totals(v: Value) -> bool:
        n = v.producer
        same = n is not None and n.name == "sum" and n.operands[0] is node.result
        return same and n is not None and set(_axes(n)) == set(_axes(top))

    for user in node.result.users:
        quotient = user.name == "div" and user.operands[0] is node.result and totals(user.operands[1]) and not _feeds_log(user)
        if not quotient and not (user.name == "sum" and totals(user.result)):
            return False
    return True


def _feeds_log(node: Node) -> bool:
    return any(u.name in ("log", "log2", "log10") or (u.name == "cast" and _feeds_log(u)) for u in node.result.users)


def _axes(reduction: Node) -> list[int]:
    """The reduced axes, counted from the front."""
    rank = reduction.operands[0].type.rank
    return [a % rank for a in reduction.attrs["axes"]] if rank else []


def work(graph: Graph) -> dims.Dim:
    """Elements of the largest value: a measure of the work."""
    sizes = [v.type.numel for v in [*graph.inputs, *(r for n in graph.nodes() for r in n.results)]]
    static = [s for s in sizes if isinstance(s, int)]
    return sizes[0] if len(static) < len(sizes) else max(static, default=0)
