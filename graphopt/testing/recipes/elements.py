"""Recipes of what computes elements: pointwise ops, creation, reductions and scans."""

from __future__ import annotations

from graphopt.ir import OPS, TensorType, Value, dims, types
from graphopt.ir.ops import Trait
from graphopt.ir.ops import op as op_named
from graphopt.testing.pool import DTYPES, FLOATS, INTEGERS, Pool, supported_dtypes
from graphopt.testing.recipes.registry import RECIPES, random_axis, recipe

_ATTRS: dict[str, dict[str, list[float | str]]] = {
    "gelu": {"approximate": ["none", "tanh"]},
    "softplus": {"beta": [1.0, 2.0], "threshold": [20.0, 1.0]},
    "elu": {"alpha": [1.0, 1.5], "scale": [1.0, 1.05], "input_scale": [1.0, 0.5]},
    "leaky_relu": {"negative_slope": [0.01, 0.3]},
}


# --- pointwise ---------------------------------------------------------------------------------------------------------

_DIVISIONS = ("floor_div", "trunc_div", "remainder", "fmod", "pow")


def _pointwise(pool: Pool, name: str) -> Value:
    x = pool.operand(supported_dtypes(name))
    if op_named(name).arity[0] == 1:
        return pool.add(name, [x], **{k: pool.pick(choices) for k, choices in _ATTRS.get(name, {}).items()})
    if name in _DIVISIONS and x.dtype.is_integer:  # a divisor of zero has no value, nor has a negative exponent
        return pool.add(name, [x, pool.builder.constant(pool.pick([1, 2, 3]), x.dtype)])
    y = pool.partner(x)
    return pool.add(name, [y, x] if pool.flag(4) and name not in _DIVISIONS else [x, y])


for _name, _op in OPS.items():
    if _op.has(Trait.POINTWISE) and _name not in ("where", "cast", "quantize", "dequantize"):
        RECIPES[_name] = _pointwise


@recipe("where")
def _where(pool: Pool, name: str) -> Value:
    x = pool.operand(DTYPES)
    y = pool.partner(x)
    condition = pool.value(
        lambda v: v.dtype.is_bool and v.shape == x.shape,
        lambda: TensorType(types.b1, x.shape),
    )
    return pool.add(name, [condition, x, y])


@recipe("cast")
def _cast(pool: Pool, name: str) -> Value:
    x = pool.operand([d for d in DTYPES if not d.is_complex])
    narrow = x.dtype.is_float and x.producer is not None  # a float of unknown size has no integer value
    return pool.add(name, [x], dtype=pool.pick(FLOATS if narrow else [*FLOATS, *INTEGERS[:3], types.b1]))


@recipe("wrap_index")
def _wrap_index(pool: Pool, name: str) -> Value:
    return pool.add(name, [pool.operand([types.i64, types.i32])], size=pool.pick([3, 9]))


# --- creation ----------------------------------------------------------------------------------------------------------


@recipe("constant")
def _constant(pool: Pool, name: str) -> Value:
    dtype = pool.pick([types.f32, types.i64, types.f64])
    if pool.symbolic and dtype == types.i64 and pool.flag(3):
        size = pool.pick([dims.symbol("B"), dims.symbol("B") * 2 + 1])
        return pool.add(name, [], value=size, dtype=dtype)
    value = pool.scalar(dtype)
    pool.values.append(value)
    return value


@recipe("iota")
def _iota(pool: Pool, name: str) -> Value:
    return pool.add(name, [], size=pool.size(), start=pool.pick([0, 1]), step=pool.pick([1, 2]), dtype=pool.pick([types.i64, types.f32]))


# --- reductions --------------------------------------------------------------------------------------------------------


@recipe("sum", "prod", "max", "min", "any", "all", "mean", "var")
def _reduction(pool: Pool, name: str) -> Value:
    x = pool.operand(supported_dtypes(name))
    axes = tuple(i for i in range(x.type.rank) if not pool.flag(2))
    attrs = {"correction": pool.pick([1, 0])} if name == "var" else {}
    return pool.add(name, [x], axes=axes, keepdims=pool.flag(), **attrs)


@recipe("argmax", "argmin")
def _alongrandom_axis(pool: Pool, name: str) -> Value:
    x = pool.operand(supported_dtypes(name), least=1)
    return pool.add(name, [x], axis=random_axis(pool, x), keepdims=pool.flag())


@recipe("cumsum", "cumprod", "cummax", "cummin", "argcummax", "argcummin", "logcumsumexp")
def _scan(pool: Pool, name: str) -> Value:
    x = pool.operand(supported_dtypes(name), least=1)
    return pool.add(name, [x], axis=random_axis(pool, x))
