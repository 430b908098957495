"""Pointwise ops as Triton expressions, with PyTorch's semantics.

Operands are names and numbers, so nothing needs brackets. Narrow floats are computed in f32 and rounded where they are stored or
cast; what Triton's language lacks comes from :mod:`~graphopt.backends.triton.library`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphopt.ir import types
from graphopt.ir.opset.quantize import LARGEST
from graphopt.ir.types import DType

NARROW = (types.f16, types.bf16)
NAMES = {
    types.f64: "tl.float64", types.f32: "tl.float32", types.f16: "tl.float16", types.bf16: "tl.bfloat16", types.i64: "tl.int64",
    types.i32: "tl.int32", types.i16: "tl.int16", types.i8: "tl.int8", types.u8: "tl.uint8", types.b1: "tl.int1",
}  # fmt: skip


def held(dtype: DType) -> str:
    """Triton's name of the type in which elements are computed."""
    return NAMES[types.f32 if dtype in NARROW or dtype in LARGEST else dtype]


def number(value: Any, dtype: DType) -> str:
    """A constant as a Python literal, rounded to the dtype."""
    if dtype.is_bool:
        return repr(bool(value))
    if not dtype.is_float:
        wrapped = int(value) % (1 << dtype.bits)
        return str(wrapped - (1 << dtype.bits) if dtype.kind == "i" and wrapped >> (dtype.bits - 1) else wrapped)
    rounded = float(torch.tensor(float(value), dtype=torch.float64).to(dtype.torch))
    return repr(rounded) if math.isfinite(rounded) else f'float("{rounded}")'


def typed(value: Any, dtype: DType) -> str:
    """A constant of a type of its own, not of that of its neighbour."""
    return f"tl.full((), {number(value, dtype)}, {held(dtype)})"


def cast(x: str, source: DType, to: DType) -> str:
    """Floats to integers toward zero, integers with wrap-around; narrow floats are rounded and stay f32."""
    if to.is_bool:
        return f"{x} != 0" if not source.is_bool else x
    if source.is_float and to.bits < 32 and not to.is_float:
        return f"{x}.to(tl.int32).to({NAMES[to]})"
    if to in NARROW:
        wide = f"{x}.to(tl.float32)" if held(source) != "tl.float32" else x
        return f"{wide}.to({NAMES[to]}).to(tl.float32)"
    return x if held(source) == held(to) else f"{x}.to({held(to)})"


def unsupported(name: str, dtype: DType) -> str | None:
    """Why there is no expression, or None."""
    if name in ("cast", "where", *_FORMS, *_CALLS, *_ATTRIBUTED) or name in _LIBRARY:
        return None
    return f"{name} has no Triton expression yet ({dtype})"


class Ops:
    """Pointwise ops.

    Args:
        helper: told of a library function that is used; gives its name.
    """

    def __init__(self, helper: Callable[[str], str]) -> None:
        self.helper = helper

    def apply(self, name: str, a: Sequence[str], dtype: DType, result: DType, attrs: Mapping[str, Any], raw: Sequence[Any]) -> str:
        """The op's expression.

        Args:
            a: operands, as held.
            dtype, result: element types of the (last) operand and of the result.
            raw: constant value of each operand, or None.
        """
        if name == "cast":
            return cast(a[0], dtype, result)
        if name == "where":
            return f"tl.where({a[0]}, {a[1]}, {a[2]})"
        if name == "pow":
            return self._pow(a, dtype, raw[1])
        if (special := self._special(name, a, dtype)) is not None:
            return special
        if name in _ATTRIBUTED:
            return _ATTRIBUTED[name](self, a[0], dtype, **attrs)
        if name in _CALLS:
            return f"{_CALLS[name]}({', '.join(a)})"
        if name in _LIBRARY:
            return f"{self.helper(_LIBRARY[name])}({', '.join(a)})"
        form = _FORMS[name]
        return form.format(*a)

    def _special(self, name: str, a: Sequence[str], d: DType) -> str | None:
        """What an op is on some types."""
        if d.is_bool and (sign := _BOOLEAN.get(name)) is not None:
            return sign.format(*a)
        if not d.is_float and name in ("floor", "ceil", "trunc", "round"):
            return a[0]
        if d.kind in "ub" and name in ("abs", "relu", "sign"):
            return f"tl.where({a[0]} > 0, {typed(1, d)}, {typed(0, d)})" if (name, d.kind) == ("sign", "u") else a[0]
        if name == "bitwise_not" and d.kind == "u":
            return f"{a[0]} ^ {typed((1 << d.bits) - 1, d)}"  # the interpreter's ~ has a -1, which newer NumPy takes for no unsigned number
        if name == "neg" and d.is_float:
            return f"{a[0]} * -1.0"  # Triton may take -x for 0 - x, which has no -0.0
        if name == "sign":
            return f"tl.where({a[0]} > 0, {typed(1, d)}, tl.where({a[0]} < 0, {typed(-1, d)}, {typed(0, d)}))"
        if name in ("maximum", "minimum") and d.is_float:
            return f"tl.{name}({a[0]}, {a[1]}, propagate_nan=tl.PropagateNan.ALL)"
        if name in ("isnan", "isinf") and not d.is_float:
            return f"{a[0]} != {a[0]}"
        if name in ("floor_div", "remainder", "trunc_div", "fmod"):
            if d.is_float:
                function = {"floor_div": "float_floor_div", "remainder": "float_remainder"}.get(name)
                if function:
                    return f"{self.helper(function)}({a[0]}, {a[1]})"
                return f"{a[0]} % {a[1]}" if name == "fmod" else f"{self.helper('trunc')}({a[0]} / {a[1]})"
            function = {"floor_div": "int_floor_div", "remainder": "int_remainder"}.get(name)
            if function:
                return f"{self.helper(function)}({a[0]}, {a[1]})"
            return f"{a[0]} {'//' if name == 'trunc_div' else '%'} {a[1]}"
        if name == "sqrt" and d == types.f64:
            return f"tl.sqrt({a[0]})"
        if name.startswith("logical_") and not d.is_bool:
            b = [f"({x} != 0)" for x in a]
            return f"{a[0]} == 0" if name == "logical_not" else _BOOLEAN[name].format(*b)
        return None

    def _pow(self, a: Sequence[str], d: DType, exponent: Any) -> str:
        x = a[0]
        if not d.is_float:
            return " * ".join([x] * int(exponent)) if exponent else f"{x} * 0 + 1"
        match exponent:
            case 2.0:
                return f"{x} * {x}"
            case 3.0:
                return f"{x} * {x} * {x}"
            case 0.5:
                return self._root(x, d)
            case -0.5:
                return f"1.0 / {self._root(x, d)}"
            case -1.0:
                return f"1.0 / {x}"
            case -2.0:
                return f"1.0 / ({x} * {x})"
        return f"{self.helper('power')}({x}, {a[1]})" if exponent is None else f"{self.helper('power')}({x}, {typed(exponent, d)})"

    def _root(self, x: str, d: DType) -> str:
        return f"tl.sqrt({x})" if d == types.f64 else f"tl.sqrt_rn({x})"

    # activations with attributes; each takes its operand's name
    def _gelu(self, x: str, d: DType, approximate: str) -> str:
        if approximate == "tanh":
            return f"0.5 * {x} * (1.0 + {self.helper('tanh')}({math.sqrt(2 / math.pi)!r} * ({x} + 0.044715 * {x} * {x} * {x})))"
        return f"0.5 * {x} * (1.0 + tl.erf({x} * {math.sqrt(0.5)!r}))"

    def _softplus(self, x: str, d: DType, beta: float, threshold: float) -> str:
        return f"tl.where({x} * {beta!r} > {threshold!r}, {x}, {self.helper('log1p')}(tl.exp({x} * {beta!r})) / {beta!r})"

    def _elu(self, x: str, d: DType, alpha: float, scale: float, input_scale: float) -> str:
        return f"tl.where({x} > 0, {x} * {scale!r}, {self.helper('expm1')}({x} * {input_scale!r}) * {alpha * scale!r})"

    def _leaky_relu(self, x: str, d: DType, negative_slope: float) -> str:
        return f"tl.where({x} > 0, {x}, {x} * {number(negative_slope, d)})"

    def _gate(self, x: str) -> str:
        """clamp(x + 3, 0, 6) / 6; nan stays."""
        nan = "propagate_nan=tl.PropagateNan.ALL"
        return f"tl.minimum(tl.maximum({x} + 3.0, 0.0, {nan}), 6.0, {nan}) / 6.0"

    def _hardsigmoid(self, x: str, d: DType) -> str:
        return self._gate(x)

    def _hardswish(self, x: str, d: DType) -> str:
        return f"{x} * ({self._gate(x)})"

    def _mish(self, x: str, d: DType) -> str:
        return f"{x} * {self.helper('tanh')}({self._softplus(x, d, 1.0, 20.0)})"


_ATTRIBUTED: dict[str, Callable[..., str]] = {
    "gelu": Ops._gelu, "softplus": Ops._softplus, "elu": Ops._elu, "leaky_relu": Ops._leaky_relu, "hardsigmoid": Ops._hardsigmoid,
    "hardswish": Ops._hardswish, "mish": Ops._mish,
}  # fmt: skip
_BOOLEAN = {
    "add": "{0} | {1}", "mul": "{0} & {1}", "maximum": "{0} | {1}", "minimum": "{0} & {1}", "logical_and": "{0} & {1}",
    "logical_or": "{0} | {1}", "logical_xor": "{0} ^ {1}", "logical_not": "{0} == 0", "bitwise_not": "{0} == 0",
    "lt": "{0}.to(tl.int32) < {1}.to(tl.int32)", "le": "{0}.to(tl.int32) <= {1}.to(tl.int32)",
    "gt": "{0}.to(tl.int32) > {1}.to(tl.int32)", "ge": "{0}.to(tl.int32) >= {1}.to(tl.int32)",
    "eq": "{0}.to(tl.int32) == {1}.to(tl.int32)", "ne": "{0}.to(tl.int32) != {1}.to(tl.int32)",
}  # fmt: skip
_FORMS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "neg": "-{0}", "reciprocal": "1.0 / {0}",
    "relu": "tl.where({0} < 0, 0, {0})", "silu": "{0} / (1.0 + tl.exp(-{0}))",
    "tan": "tl.sin({0}) / tl.cos({0})",
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}",
    "bitwise_and": "{0} & {1}", "bitwise_or": "{0} | {1}", "bitwise_xor": "{0} ^ {1}", "bitwise_not": "~{0}",
    "isnan": "{0} != {0}", "isinf": 'tl.abs({0}) == float("inf")', "sign": "", "maximum": "tl.maximum({0}, {1})",
    "minimum": "tl.minimum({0}, {1})", "logical_and": "", "logical_or": "", "logical_xor": "", "logical_not": "", "floor_div": "",
    "trunc_div": "", "remainder": "", "fmod": "", "pow": "",
}  # fmt: skip
_CALLS = {
    "abs": "tl.abs", "floor": "tl.floor", "ceil": "tl.ceil", "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "log2": "tl.log2",
    "sqrt": "tl.sqrt_rn", "rsqrt": "tl.rsqrt", "sin": "tl.sin", "cos": "tl.cos", "erf": "tl.erf",
}  # fmt: skip
_LIBRARY = {
    "tanh": "tanh", "sinh": "sinh", "cosh": "cosh", "sigmoid": "sigmoid", "log1p": "log1p", "expm1": "expm1", "log10": "log10",
    "trunc": "trunc", "round": "round_even", **{n: n for n in ("asin", "acos", "atan", "asinh", "acosh", "atanh", "erfc", "atan2")},
}  # fmt: skip
