"""Where the elements of views lie in memory: strides of known size, and which views would have to move elements."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir import dims
from graphopt.ir.graph import Node, Value, is_view


def strides_of(v: Value) -> tuple[int, ...] | None:
    """The strides of a value in a program, in elements; None where they are not known, or would ask for a copy.

    Results of regions are row-major; what a library call returns may have any strides.
    """
    if not v.type.is_static:
        return None
    node = v.producer
    if node is None or node.op.name == "fusion":
        given = v.type.strides or dims.contiguous_strides(v.shape)
        return tuple(int(s) for s in given) if dims.is_static(given) else None
    return view_strides(node, strides_of(node.operands[0])) if is_view(node) else None


def view_strides(node: Node, given: Sequence[int] | None) -> tuple[int, ...] | None:
    """The strides of a view of an operand that has the given ones; None if it is not known, or must be a copy."""
    x, attrs = node.operands[0], node.attrs
    if given is None or not (x.type.is_static and node.result.type.is_static):
        return None
    old, new = ([int(d) for d in v.shape] for v in (x, node.result))
    match node.op.name:
        case "transpose":
            return tuple(given[p] for p in attrs["perm"])
        case "broadcast_to":
            lead = len(new) - len(old)
            return (*[0] * lead, *(0 if d != n else s for d, n, s in zip(old, new[lead:], given, strict=True)))
        case "slice":
            axis = attrs["axis"] % len(old)
            return tuple(s * int(attrs["step"]) if k == axis else s for k, s in enumerate(given))
        case "reshape":
            return _reshaped(old, given, new)
    return None


def _reshaped(old: Sequence[int], strides: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
    """Runs of axes that lie in memory as one are divided anew, from the innermost on; None if a new axis goes across two of them."""
    if 0 in old or 0 in new:
        return None  # nothing lies anywhere
    runs: list[tuple[int, int]] = []  # (elements, step), innermost first
    for d, s in zip(reversed(old), reversed(strides), strict=True):
        if d == 1:
            continue
        if runs and s == runs[-1][0] * runs[-1][1]:
            runs[-1] = (runs[-1][0] * d, runs[-1][1])
        else:
            runs.append((d, s))
    out: list[int] = []
    left, step = runs.pop(0) if runs else (1, 1)
    for d in reversed(new):
        if d == 1:
            out.append(step)
            continue
        if left == 1:
            if not runs:
                return None
            left, step = runs.pop(0)
        if left % d:
            return None
        out.append(step)
        left, step = left // d, step * d
    return tuple(reversed(out)) if left == 1 and not runs else None


def same_places(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two strides of a shape say the same: axes of size 1 may have any."""
    return all(d == 1 or s == t for d, s, t in zip(shape, a, b, strict=True))
