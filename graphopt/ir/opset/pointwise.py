"""Pointwise ops: each output element depends on the matching, broadcast, input elements.

Operands must agree in dtype (capture inserts casts after PyTorch's promotion rules); shapes broadcast as in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import types
from graphopt.ir.ops import REQUIRED, Attrs, EvalContext, Infer, Trait, broadcast_shapes, define, same_dtype
from graphopt.ir.types import TensorType

_REAL = {types.c32: types.f16, types.c64: types.f32, types.c128: types.f64}

P, C, A = Trait.POINTWISE, Trait.COMMUTATIVE, Trait.ASSOCIATIVE
FLOAT, BOOLEAN = Trait.FLOAT_ONLY, Trait.BOOLEAN


def _infer(name: str, float_only: bool, boolean: bool) -> Infer:
    def infer(operands: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
        dtype = same_dtype(operands, name)
        if float_only and not (dtype.is_float or dtype.is_complex):
            raise TypeInferenceError(f"{name}: needs a float operand, got {dtype}")
        return [TensorType(types.b1 if boolean else dtype, broadcast_shapes([t.shape for t in operands]))]

    return infer


def _pointwise(name: str, arity: int, fn: Callable[..., torch.Tensor], *traits: Trait, doc: str = "") -> None:
    def evaluate(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
        return fn(*xs)

    infer = _infer(name, FLOAT in traits, BOOLEAN in traits)
    define(name, arity, traits=(P, *traits), infer=infer, evaluate=evaluate, doc=doc or f"{name}(x), elementwise")


# unary, on any number
_pointwise("neg", 1, torch.neg, Trait.INVOLUTION)
define(
    "abs", 1, traits=(P, Trait.IDEMPOTENT), infer=lambda ts, attrs: [ts[0].with_dtype(_REAL.get(ts[0].dtype, ts[0].dtype))],
    evaluate=lambda xs, attrs, ctx: torch.abs(xs[0]), doc="the absolute value; of a complex number, its modulus, a float",
)  # fmt: skip
_pointwise("sign", 1, torch.sign, Trait.IDEMPOTENT, doc="-1, 0 or 1; nan stays")
_pointwise("floor", 1, torch.floor, Trait.IDEMPOTENT)
_pointwise("ceil", 1, torch.ceil, Trait.IDEMPOTENT)
_pointwise("trunc", 1, torch.trunc, Trait.IDEMPOTENT)
_pointwise("round", 1, torch.round, Trait.IDEMPOTENT, doc="to the nearest integer, halves to even")
_pointwise("relu", 1, torch.relu, Trait.IDEMPOTENT, doc="max(x, 0); nan stays")
_pointwise("logical_not", 1, torch.logical_not, BOOLEAN)
_pointwise("bitwise_not", 1, torch.bitwise_not, Trait.INVOLUTION)
_pointwise("isnan", 1, torch.isnan, BOOLEAN)
_pointwise("isinf", 1, torch.isinf, BOOLEAN)

# unary, on floats
for _fn in (
    torch.exp, torch.exp2, torch.expm1, torch.log, torch.log2, torch.log10, torch.log1p, torch.sqrt, torch.rsqrt,
    torch.reciprocal, torch.sin, torch.cos, torch.tan, torch.asin, torch.acos, torch.atan, torch.sinh, torch.cosh,
    torch.tanh, torch.asinh, torch.acosh, torch.atanh, torch.erf, torch.erfc, torch.sigmoid,
):  # fmt: skip
    _pointwise(_fn.__name__, 1, _fn, FLOAT)

# binary
_pointwise("add", 2, torch.add, C, A, doc="x + y (bool: or)")
_pointwise("sub", 2, torch.sub, doc="x - y")
_pointwise("mul", 2, torch.mul, C, A, doc="x * y (bool: and)")
_pointwise("div", 2, torch.true_divide, FLOAT, doc="x / y")
_pointwise("floor_div", 2, torch.floor_divide, doc="floor(x / y)")
_pointwise("trunc_div", 2, lambda x, y: torch.div(x, y, rounding_mode="trunc"), doc="trunc(x / y)")
_pointwise("remainder", 2, torch.remainder, doc="x - y * floor(x / y); the sign of y")
_pointwise("fmod", 2, torch.fmod, doc="x - y * trunc(x / y); the sign of x")
_pointwise("pow", 2, torch.pow, doc="x ** y")
_pointwise("maximum", 2, torch.maximum, C, A, doc="the larger; nan if either is")
_pointwise("minimum", 2, torch.minimum, C, A, doc="the smaller; nan if either is")
_pointwise("atan2", 2, torch.atan2, FLOAT)
_pointwise("eq", 2, torch.eq, C, BOOLEAN)
_pointwise("ne", 2, torch.ne, C, BOOLEAN)
_pointwise("lt", 2, torch.lt, BOOLEAN)
_pointwise("le", 2, torch.le, BOOLEAN)
_pointwise("gt", 2, torch.gt, BOOLEAN)
_pointwise("ge", 2, torch.ge, BOOLEAN)
_pointwise("logical_and", 2, torch.logical_and, C, A, BOOLEAN)
_pointwise("logical_or", 2, torch.logical_or, C, A, BOOLEAN)
_pointwise("logical_xor", 2, torch.logical_xor, C, A, BOOLEAN)
_pointwise("bitwise_and", 2, torch.bitwise_and, C, A)
_pointwise("bitwise_or", 2, torch.bitwise_or, C, A)
_pointwise("bitwise_xor", 2, torch.bitwise_xor, C, A)


def _infer_where(operands: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    condition, *rest = operands
    if not condition.dtype.is_bool:
        raise TypeInferenceError(f"where: the condition must be b1, got {condition.dtype}")
    return [TensorType(same_dtype(rest, "where"), broadcast_shapes([t.shape for t in operands]))]


define(
    "where", 3, traits=(P,), infer=_infer_where,
    evaluate=lambda xs, attrs, ctx: torch.where(*xs), doc="x where the condition holds, else y",
)  # fmt: skip


def _evaluate_cast(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> Any:
    return xs[0].to(ctx.dtype(attrs["dtype"]))


define(
    "cast", 1, traits=(P,), attrs={"dtype": REQUIRED}, infer=lambda ts, attrs: [ts[0].with_dtype(attrs["dtype"])],
    evaluate=_evaluate_cast, doc="convert to dtype (floats to nearest even, floats to integers toward zero)",
)  # fmt: skip
