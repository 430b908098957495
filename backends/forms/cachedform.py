"""Which caches of small integers are multiplied as integers, on AMX tiles, and the schedules of that. Looks at the IR only."""

from __future__ import annotations

from graphopt.autotune.space import Param
from graphopt.backends.forms.flashform import Form, decode_params, decode_refusal
from graphopt.backends.forms.support import VIEWS, constant_of
from graphopt.ir import types
from graphopt.ir.graph import Node, Value
from graphopt.target import Target

BYTES = 64  # of a row of a tile
_LEAST = 2  # queries that share keys, from which on tiles are faster than vectors of floats


def refusal(form: Form, t: Target) -> str | None:
    """Why an attention of few queries is not for the kernel of integers, or None."""
    if t.int8_products != "amx":
        return "the target has no AMX tiles of integers"
    if why := decode_refusal(form, t):
        return why
    if int(form.queries) * form.share < _LEAST:  # type: ignore[call-overload]
        return "one query for each head of keys"
    if form.depth % BYTES or form.width % BYTES:
        return f"heads that are no multiples of {BYTES}"
    return next((why for v in (form.parts.k, form.parts.v) if (why := _no_bytes(v))), None)


def _no_bytes(v: Value) -> str | None:
    """Why keys or values, ``[..., N, D]``, are not integers of 8 bits with a scale a row, less a zero point or not, or None."""
    node = v.producer
    while node is not None and node.name in VIEWS and _keeps_rows(node):
        node = node.operands[0].producer
    if node is None or node.name != "dequantize":
        return "keys or values that are not small integers"
    whole, scale, *zeros = node.operands
    if scale.dtype != types.f32 or scale.type.rank == 0 or scale.shape[-1] != 1:
        return "a scale that is not one number a row"
    bits = _bits(whole)
    if bits > 8 or not whole.dtype.is_integer:
        return f"integers of {bits} bits"
    numbers = [constant_of(z) for z in zeros]
    if any(n is None or n != int(n) for n in numbers):
        return "a zero point that is not a constant integer"
    low = -(1 << (bits - 1)) if whole.dtype.kind == "i" else 0
    zero = int(sum(n or 0 for n in numbers))
    return None if low - zero >= -128 and low + (1 << bits) - 1 - zero <= 127 else "integers that leave 8 bits with a sign"


def _keeps_rows(view: Node) -> bool:
    """Whether the rows of a view are rows of what is viewed."""
    x, y = view.operands[0], view.result
    if x.type.rank < 2 or y.type.rank < 2 or x.shape[-1] != y.shape[-1]:
        return False
    if view.name == "transpose":
        return bool(view.attrs["perm"][-1] == x.type.rank - 1)
    return view.name in ("reshape", "broadcast_to", "slice")


def _bits(v: Value) -> int:
    """Bits of the integers that a value holds: fewer than its dtype's, if they were unpacked."""
    node = v.producer
    while node is not None and node.name in VIEWS:
        node = node.operands[0].producer
    return int(node.attrs["bits"]) if node is not None and node.name == "unpack_bits" else v.dtype.bits


def params(form: Form, t: Target) -> tuple[Param, ...]:
    """The knobs: keys of a block, multiples of what is summed at once, and those of :func:`decode_params` that count here, too."""
    kept = [p for p in decode_params(form, t) if p.name in ("splits", "parallel", "abreast")]
    return (Param("block", (64, 128, 256), "tile"), Param("ahead", (True, False)), *kept)
