"""The reference: one torch call an op, in the graph's own precision or in f64.

With ``wide`` every float is f64 and every complex number c128: the oracle that passes and kernels are judged against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import torch

from graphopt.errors import GraphoptError
from graphopt.ir import dims
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import EvalContext, Ref, TorchConst
from graphopt.ir.types import DType

EvaluateNode: TypeAlias = Callable[[Node, Sequence[torch.Tensor], EvalContext], list[torch.Tensor]]
"""Results of one node without a body, from its operands."""


def bind_symbols(graph: Graph, shapes: Sequence[Sequence[int]], known: Mapping[str, int] | None = None) -> dict[str, int]:
    """Values of the symbols from the inputs' sizes.

    Args:
        shapes: the sizes of each input.
        known: values given from outside, for symbols that no input has bare.

    Raises:
        GraphoptError: a size disagrees, or a symbol stays unbound.
    """
    bindings = dict(known or {})
    later: list[tuple[int, dims.Dim, int]] = []
    for i, (v, shape) in enumerate(zip(graph.inputs, shapes, strict=True)):
        if len(shape) != v.type.rank:
            raise GraphoptError(f"input {i} of @{graph.name} has rank {len(shape)}, expected {v.type}")
        for d, n in zip(v.shape, shape, strict=True):
            if isinstance(d, sympy.Symbol):
                bindings.setdefault(d.name, int(n))
            later.append((i, d, int(n)))
    for i, d, n in later:
        unbound = [s for s in dims.free_symbols([d]) if s not in bindings]
        if len(unbound) == 1:  # a linear size such as 2*s: solve it
            s = dims.symbol(unbound[0])
            solution = sympy.solve(sympy.sympify(d).subs({dims.symbol(k): x for k, x in bindings.items()}) - n, s)
            if len(solution) == 1 and solution[0].is_Integer:
                bindings[unbound[0]] = int(solution[0])
        if dims.evaluate(d, bindings) != n:
            raise GraphoptError(f"input {i} of @{graph.name}: size {n} where {dims.format_dim(d)} = {dims.evaluate(d, bindings)}")
    return bindings


def evaluate(graph: Graph, inputs: Sequence[torch.Tensor], *, bindings: Mapping[str, int] | None = None, wide: bool = False,
             device: torch.device | str = "cpu", each: EvaluateNode | None = None) -> list[torch.Tensor]:  # fmt: skip
    """Run a graph.

    Args:
        inputs: one tensor an input.
        bindings: values of symbols that no input determines.
        wide: compute in f64 / c128, inputs included.
        each: evaluates a node without a body, in the place of :func:`evaluate_node`.

    Returns:
        One tensor an output.
    """
    known = bind_symbols(graph, [x.shape for x in inputs], bindings)
    return _run(graph, inputs, EvalContext(known, wide, device), each or evaluate_node)


def _run(graph: Graph, inputs: Sequence[torch.Tensor], ctx: EvalContext, each: EvaluateNode) -> list[torch.Tensor]:
    env: dict[Value, torch.Tensor] = {v: _widen(x, ctx) for v, x in zip(graph.inputs, inputs, strict=True)}
    for node in graph.nodes():
        operands = [env[v] for v in node.operands]
        results = each(node, operands, ctx) if node.body is None else _run(node.body, operands, ctx, each)
        env.update(zip(node.results, results, strict=True))
    return [env[v] for v in graph.outputs]


def evaluate_node(node: Node, operands: Sequence[torch.Tensor], ctx: EvalContext) -> list[torch.Tensor]:
    """Results of one node."""
    if node.body is not None:
        return _run(node.body, operands, ctx, evaluate_node)
    if node.op.name == "aten":
        return call_aten(node, operands, ctx)
    if node.op.evaluate is None:
        raise GraphoptError(f"{node.op.name} has no reference evaluation")
    result = node.op.evaluate(operands, node.attrs, ctx)
    return list(result) if isinstance(result, list | tuple) else [result]


def _widen(x: torch.Tensor, ctx: EvalContext) -> torch.Tensor:
    if ctx.wide and x.is_floating_point():
        return x.to(torch.float64)
    return x.to(torch.complex128) if ctx.wide and x.is_complex() else x


# --- library calls -----------------------------------------------------------------------------------------------------


def resolve_aten(target: str) -> Any:
    """The operator overload of a name such as ``aten.sort.stable``."""
    found: Any = torch.ops
    for part in target.split("."):
        found = getattr(found, part)
    return found


def fill_template(template: Any, operands: Sequence[torch.Tensor], ctx: EvalContext) -> Any:
    """An argument template with operands, sizes and torch constants put in."""
    match template:
        case Ref(index=i):
            return operands[i]
        case TorchConst(name=name):
            return torch_constant(name)
        case DType():
            return ctx.dtype(template)
        case sympy.Expr():
            return ctx.dim(template)
        case tuple():
            return [fill_template(t, operands, ctx) for t in template]
    return template


def torch_constant(name: str) -> Any:
    """``strided``, ``contiguous_format``, ``cpu``, ``cuda.0``: a memory format, layout or device."""
    value = getattr(torch, name, None)
    return value if isinstance(value, torch.memory_format | torch.layout) else torch.device(name.replace(".", ":"))


def call_aten(node: Node, operands: Sequence[torch.Tensor], ctx: EvalContext) -> list[torch.Tensor]:
    """Call the operator of an ``aten`` node. In wide mode an operator that refuses f64 is called in its own dtypes."""
    try:
        return _call(node, operands, ctx)
    except (RuntimeError, NotImplementedError):
        if not ctx.wide:
            raise
        narrow = [x.to(v.dtype.torch) for x, v in zip(operands, node.operands, strict=True)]
        own = EvalContext(ctx.bindings, wide=False, device=ctx.device)
        return [_widen(y, ctx) for y in _call(node, narrow, own)]


def _call(node: Node, operands: Sequence[torch.Tensor], ctx: EvalContext) -> list[torch.Tensor]:
    layouts = node.attrs["layouts"] or (None,) * len(operands)
    placed = [x.contiguous() if s is None else restride(x, ctx.shape(s)) for x, s in zip(operands, layouts, strict=True)]
    if node.attrs["target"].startswith("aten.as_strided"):  # its offset counts from where the storage begins
        placed = [restride(x, x.stride(), copy=True) if x.storage_offset() else x for x in placed]
    args = fill_template(node.attrs["args"], placed, ctx)
    kwargs = {k: fill_template(v, placed, ctx) for k, v in node.attrs["kwargs"]}
    target = resolve_aten(node.attrs["target"])
    return flatten_results(target(*args, **kwargs, **made_at(node, target, ctx.device)))


def made_at(node: Node, target: Any, device: torch.device | str) -> dict[str, Any]:
    """The argument by which an operator without operands makes its tensor where all others are, if it does not say where."""
    asks = any(a.name == "device" for a in target._schema.arguments)
    return {"device": device} if asks and not node.operands and "device" not in dict(node.attrs["kwargs"]) else {}


def restride(x: torch.Tensor, strides: Sequence[int], copy: bool = False, apart: torch.Tensor | None = None) -> torch.Tensor:
    """The same elements in a tensor of the given strides; no copy if it has them, unless asked for.

    Args:
        apart: a tensor whose memory the result must not be in.
    """
    if not copy and (apart is None or x.untyped_storage().data_ptr() != apart.untyped_storage().data_ptr()):
        if x.stride() == tuple(strides):
            return x
        if all(size <= 1 or a == b for size, a, b in zip(x.shape, x.stride(), strides, strict=True)):
            return x.as_strided(x.shape, strides)  # axes of size 1 may have any stride
    out = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
    return out.copy_(x)


def flatten_results(result: Any) -> list[torch.Tensor]:
    """The tensors of an operator's result: one, several, or lists of them; None is left out."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, list | tuple):
        return [t for r in result for t in flatten_results(r)]
    return [] if result is None else [torch.tensor(result)]
