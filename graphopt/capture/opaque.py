"""Operators without an IR op of their own: ``aten`` nodes that call the operator as it is.

What they may rely on: results never share memory with operands (view operators are called in their ``_copy`` form), and
operands whose layout matters to the operator are given in the traced layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from graphopt.capture.captured import Uncapturable
from graphopt.ir.builder import Builder
from graphopt.ir.dims import Shape
from graphopt.ir.graph import Value
from graphopt.ir.ops import Ref, TorchConst
from graphopt.ir.types import DType, TensorType

_MEANING_DEPENDS_ON_LAYOUT = (
    "aten.as_strided_copy.default", "aten.as_strided_scatter.default", "aten.view_copy.dtype", "aten.view_as_complex_copy.default",
)  # fmt: skip
_LAYOUT_TAGS = ("needs_exact_strides", "needs_fixed_stride_order", "needs_contiguous_strides")


def build(b: Builder, op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any], types: Sequence[TensorType],
          layout: Callable[[Value], Shape | None], effect: str | None = None) -> tuple[Value, ...]:  # fmt: skip
    """An ``aten`` node.

    Args:
        args, kwargs: converted: tensors are Values, sizes Dims.
        types: the types of the tensor results, in the order of :func:`graphopt.ir.interpreter.flatten_results`.
        layout: traced strides of a value; None where they need not or cannot be reproduced.
        effect: overrides what the operator's schema says.

    Raises:
        Uncapturable: an operator that writes its operands, or an argument that has no text.
    """
    if op._schema.is_mutable:
        raise Uncapturable(f"{op} writes to its operands", target=str(op))
    target = _without_aliasing(op)
    operands: list[Value] = []
    template = _template(list(args), operands)
    keywords = tuple((k, _template(v, operands)) for k, v in kwargs.items())
    effect = effect or _effect(target)
    depends = str(target) in _MEANING_DEPENDS_ON_LAYOUT or effect == "random" or target.namespace not in ("aten", "prims")
    depends = depends or any(getattr(t, "name", "") in _LAYOUT_TAGS for t in target.tags)
    layouts = tuple(layout(v) for v in operands) if depends else ()
    return b.aten(str(target), operands, types, template, keywords, effect, layouts if any(s is not None for s in layouts) else ())


def _effect(op: torch._ops.OpOverload) -> str:
    if torch.Tag.nondeterministic_seeded in op.tags:
        return "random"
    return "mutates" if not op._schema.returns else "none"


def _without_aliasing(op: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The operator itself, or the form of it that copies instead of returning a view."""
    if not any(r.alias_info is not None for r in op._schema.returns):
        return op
    packet = getattr(getattr(torch.ops, op.namespace), f"{op._schema.name.split('::')[1]}_copy", None)
    copying = getattr(packet, op._overloadname, None)
    if copying is None:
        raise Uncapturable(f"{op} returns a view and has no copying form", target=str(op))
    assert isinstance(copying, torch._ops.OpOverload)
    return copying


def _template(arg: Any, operands: list[Value]) -> Any:
    match arg:
        case Value():
            operands.append(arg)
            return Ref(len(operands) - 1)
        case list() | tuple():
            return tuple(_template(a, operands) for a in arg)
        case torch.dtype():
            try:
                return DType.of(arg)
            except KeyError:
                raise Uncapturable(f"the dtype {arg}") from None
        case torch.memory_format() | torch.layout():
            return TorchConst(str(arg).removeprefix("torch."))
        case torch.device():
            return TorchConst(str(arg).replace(":", "."))
        case None | bool() | int() | float() | complex() | str():
            return arg
    if type(arg).__module__.startswith("sympy") or hasattr(arg, "free_symbols"):
        return arg
    raise Uncapturable(f"an argument of type {type(arg).__name__}")


def structure(traced: Any, values: Iterator[Value]) -> Any:
    """The operator's result as nested lists of Values, as traced: what is no tensor stays itself."""
    if isinstance(traced, list | tuple):
        return [structure(t, values) for t in traced]
    if traced is None:
        return None
    value = next(values)
    return value if isinstance(traced, torch.Tensor) else NotATensor(value)


class NotATensor:
    """A number among an operator's results; nothing may read it."""

    def __init__(self, value: Value) -> None:
        self.value = value


def tensors(traced: Any) -> list[Any]:
    """The results that :func:`structure` takes a Value for, in order."""
    if isinstance(traced, list | tuple):
        return [x for t in traced for x in tensors(t)]
    return [] if traced is None else [traced]
