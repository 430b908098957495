"""Recipes of quantization: scales are positive, and what is packed fills its words."""

from __future__ import annotations

from graphopt.ir import TensorType, Value, types
from graphopt.testing.pool import Pool
from graphopt.testing.recipes.registry import recipe


def _scale(pool: Pool, x: Value) -> Value:
    return pool.builder.constant(pool.pick([0.5, 0.03, 2.0]), x.dtype if x.dtype.is_float else types.f32)


@recipe("quantize")
def _quantize(pool: Pool, name: str) -> Value:
    x = pool.input(types.f32, pool.shape(), keep=False)  # a value of unknown size may be no number
    dtype = pool.pick([types.i8, types.u8])
    zero = [pool.builder.constant(pool.pick([3, 0]), dtype)] if pool.flag() else []
    return pool.add(name, [x, _scale(pool, x), *zero], dtype=dtype, bits=pool.pick([8, 4, 2]))


@recipe("dequantize")
def _dequantize(pool: Pool, name: str) -> Value:
    q = pool.operand([types.i8, types.u8, types.i32])
    zero = [pool.builder.constant(pool.pick([3, 0]), q.dtype)] if pool.flag() else []
    return pool.add(name, [q, _scale(pool, q), *zero])


@recipe("pack_bits")
def _pack_bits(pool: Pool, name: str) -> Value:
    word, bits = pool.pick([types.i32, types.u8]), pool.pick([4, 2, 8])
    shape = [pool.size(), pool.size()]
    axis = pool.chooser.integer(0, 1)
    shape[axis] = word.bits // bits * pool.static_size()
    x = pool.value(lambda v: False, lambda: TensorType(pool.pick([types.i8, types.u8]), tuple(shape)))
    return pool.add(name, [x], axis=axis, bits=bits, dtype=word)


@recipe("unpack_bits")
def _unpack_bits(pool: Pool, name: str) -> Value:
    x = pool.operand([types.i32, types.u8], least=1)
    axis = pool.chooser.integer(0, x.type.rank - 1)
    return pool.add(name, [x], axis=axis, bits=pool.pick([4, 2, 8]), dtype=pool.pick([types.i8, types.u8]))
