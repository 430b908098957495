"""Pointwise regions: every lane computes one element of the output.

Axes that every access reads alike are one axis; of a contiguous region one is left, and a place in memory is the lane's number. Two
sketches: ``flat``, all axes as one line of lanes in the order of the output's memory; ``tiled``, lanes along two axes, for a region
that reads along another axis than it writes (a transpose), with the outer axes taken from the number of the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.backends.triton.code import Code, Launch, ceildiv
from graphopt.backends.triton.expr import Expressions
from graphopt.backends.triton.index import Sum, Var, divided, variable, variables
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph


def refusal(graph: Graph) -> str | None:
    """Why a region is not written element by element, or None."""
    first = graph.outputs[0]
    odd = next((v for v in graph.outputs if not dims.same_shape(v.shape, first.shape)), None)
    return f"outputs of shapes {first.type} and {odd.type}" if odd is not None else None


@dataclass(frozen=True)
class Space:
    """The axes of a region after joining, in the order of the output's memory, innermost last.

    Attributes:
        members: the output's axes that each stands for.
        sizes: their extents.
        across: the axis along which an input is read with stride one, if it is not the innermost one; else None.
    """

    members: tuple[tuple[int, ...], ...]
    sizes: tuple[Dim, ...]
    across: int | None


def space_of(graph: Graph) -> Space:
    """Find out how a region reads and writes memory, and which axes are one."""
    shape = graph.outputs[0].shape
    e = Expressions(Code(graph))
    axes = [Var(f"i{k}", n) for k, n in enumerate(shape)]
    index = [variable(v) for v in axes]
    for v in graph.outputs:
        e.at(v, index)
    places = [e.output_place(k, index) for k in range(len(graph.outputs))] + [at for _, at in e.reads]
    kept = {v for i in [*e.conditional, *places] for v in (variables(i) if i in e.conditional else divided(i))}
    strides = graph.output_strides[0] or dims.contiguous_strides(shape)
    order = [k for k in range(len(shape)) if shape[k] != 1]
    if dims.is_static(strides):
        order.sort(key=lambda k: -int(strides[k]))  # stable
    groups: list[list[int]] = []
    for k in order:
        if groups and _are_one(axes[groups[-1][-1]], axes[k], places) and not {axes[groups[-1][-1]], axes[k]} & kept:
            groups[-1].append(k)
        else:
            groups.append([k])
    return Space(tuple(map(tuple, groups)), tuple(dims.numel([shape[k] for k in g]) for g in groups), _across(groups, axes, places))


def _are_one(outer: Var, inner: Var, places: Sequence[Sum]) -> bool:
    """Whether every place is as far along two axes as it would be along one."""
    steps = [dict(at.terms) for at in places]
    return all(dims.same(s.get(outer, 0), dims.mul(s.get(inner, 0), inner.extent)) for s in steps)


def _across(groups: Sequence[Sequence[int]], axes: Sequence[Var], places: Sequence[Sum]) -> int | None:
    if len(groups) < 2:
        return None
    for at in places:
        steps = dict(at.terms)
        if steps.get(axes[groups[-1][-1]], 0) == 1:
            continue
        for g, members in enumerate(groups[:-1]):
            if steps.get(axes[members[-1]], 0) == 1:
                return g
    return None


def emit_flat(graph: Graph, block: int, warps: int) -> tuple[Code, Launch]:
    """One line of lanes over all elements."""
    code, space = Code(graph), space_of(graph)
    numel = dims.numel(space.sizes)
    pid = code.program(0)
    lane = code.block("i", f"{pid} * BLOCK", "BLOCK", block, numel, 0, 1)
    _write(code, space, Expressions(code).places.unflatten(variable(lane), space.sizes), [lane], "[BLOCK]")
    return code, Launch((ceildiv(numel, block),), {"BLOCK": block}, warps, 1)


def emit_tiled(graph: Graph, rows: int, columns: int, warps: int) -> tuple[Code, Launch]:
    """Lanes along the axis that is read in order and the one that is written in order."""
    code, space = Code(graph), space_of(graph)
    assert space.across is not None
    across, last = space.across, len(space.sizes) - 1
    tiles = [ceildiv(n, {across: rows, last: columns}.get(k, 1)) for k, n in enumerate(space.sizes)]
    pid = Var(code.program(0), dims.numel(tiles))
    number = Expressions(code).places.unflatten(variable(pid), tiles)
    index, lanes = list(number), []
    for k, axis, name, size_name, size in ((across, 0, "row", "ROWS", rows), (last, 1, "column", "COLUMNS", columns)):
        start = code.place(number[k]).text
        lane = code.block(name, f"{start} * {size_name}" if start != "0" else "", size_name, size, space.sizes[k], axis, 2)
        index[k] = variable(lane)
        lanes.append(lane)
    _write(code, space, index, lanes, "[ROWS, COLUMNS]")
    return code, Launch((dims.numel(tiles),), {"ROWS": rows, "COLUMNS": columns}, warps, 1)


def _write(code: Code, space: Space, at: Sequence[Sum], lanes: Sequence[Var], shape: str) -> None:
    """Store every output at the joined axes' indices."""
    e = Expressions(code)
    full = code.graph.outputs[0].shape
    index = [Sum()] * len(full)
    for i, members in zip(at, space.members, strict=True):
        for k, part in zip(members, e.places.unflatten(i, [full[k] for k in members]), strict=True):
            index[k] = part
    for k in range(len(code.graph.outputs)):
        e.store(k, index, lanes, shape)
