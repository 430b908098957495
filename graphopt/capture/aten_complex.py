"""Complex numbers between two views: view_as_real of products of view_as_complex, the way rotary embeddings are written.

What starts from pairs of real numbers and ends as pairs is computed on its real and imaginary parts. The IR has no kernels of
complex numbers, so anything else stays with the library.
"""

from __future__ import annotations

import torch

from graphopt.capture import opaque
from graphopt.capture.aten import Context, Decline, lowers
from graphopt.capture.aten_shape import cut
from graphopt.ir import types
from graphopt.ir.graph import Value
from graphopt.ir.types import DType, TensorType

_REAL = {"c64": types.f32, "c128": types.f64}
_MOVES = ("reshape", "transpose", "broadcast_to", "slice")
Parts = tuple[Value, Value]


@lowers("view_as_real", "view_as_real_copy")
def view_as_real(c: Context, z: Value) -> Value:
    """[..., 2] of z[...]: real part, imaginary part. Declines where z itself is complex from the start."""
    found = _split(c, z)
    if found is None:
        raise Decline("a complex number that is not made of real ones")
    return c.b.concat(*(c.b.reshape(v, (*z.shape, 1)) for v in found), axis=z.type.rank)


def _split(c: Context, z: Value) -> Parts | None:
    """Real and imaginary part by what z is made of; None where that is not known."""
    real = _REAL.get(z.dtype.name)
    node = z.producer
    if real is None or node is None:
        return None
    if node.op.name == "aten":
        return _of_operator(c, str(node.attrs["target"]), node.operands)
    if node.op.name == "cast" and node.operands[0].dtype == real:
        return node.operands[0], c.b.broadcast_to(c.constant(0.0, real), z.shape)
    if node.op.name == "constant":
        value = complex(node.attrs["value"])
        return c.constant(value.real, real), c.constant(value.imag, real)
    if node.op.name in _MOVES:
        parts = _split(c, node.operands[0])
        return None if parts is None else tuple(c.b.create(node.op.name, [v], dict(node.attrs)) for v in parts)  # type: ignore[return-value]
    if node.op.name == "mul":  # sums are the library's: it multiplies by a complex alpha of one, which makes nan of infinities
        return _product(c, node.operands[0], node.operands[1], real)
    return None


def _of_operator(c: Context, target: str, operands: tuple[Value, ...]) -> Parts | None:
    if target == "aten.view_as_complex_copy.default":
        pairs = operands[0]
        axis = pairs.type.rank - 1
        return tuple(c.b.reshape(cut(c, pairs, axis, i, i + 1), pairs.shape[:-1]) for i in (0, 1))  # type: ignore[return-value]
    if target == "aten.complex.default":
        return operands[0], operands[1]
    if target == "aten.polar.default":
        length, angle = operands
        return c.b.mul(length, c.b.cos(angle)), c.b.mul(length, c.b.sin(angle))
    return None


def _product(c: Context, x: Value, y: Value, real: DType) -> Parts | None:
    """x * y = (a + bi)(p + qi) = (ap - bq) + (aq + bp)i, as PyTorch's kernels have it: no second look at nan."""
    left, right = _split(c, x), _split(c, y)
    if left is None and right is None:
        return None
    (a, b), (p, q) = left or _leaf(c, x, real), right or _leaf(c, y, real)
    return c.b.sub(c.b.mul(a, p), c.b.mul(b, q)), c.b.add(c.b.mul(a, q), c.b.mul(b, p))


def _leaf(c: Context, z: Value, real: DType) -> Parts:
    """The parts of a complex tensor that is given as such: a table of rotations. A weight's are made once."""
    kind = TensorType(real, (*z.shape, 2))
    (pairs,) = opaque.build(c.b, torch.ops.aten.view_as_real.default, (z,), {}, [kind], layout=lambda _: None)
    axis = z.type.rank
    return tuple(c.b.reshape(cut(c, pairs, axis, i, i + 1), z.shape) for i in (0, 1))  # type: ignore[return-value]
