"""Loop nests over index spaces: which axes can run as one, where to vectorize, what to run in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx

from graphopt.backends.tvm.code import Code, Index, i64

SMALL = 1 << 15  # units of work below which a parallel launch costs more than it saves
CHUNK = 1 << 12  # elements of an innermost loop that one parallel step takes


@dataclass(frozen=True)
class Tuning:
    """What a schedule decides about a plain loop nest.

    Attributes:
        lanes: elements a vector instruction.
        unroll: vectors that a reduction keeps in flight.
        chunk: elements of the innermost loop a parallel step.
        parallel: whether loops may be launched in parallel.
        cores: that there are for them.
        pieces: of a reduced axis, each with partial results of its own; 0 to go by what there is to do.
    """

    lanes: int
    unroll: int = 4
    chunk: int = CHUNK
    parallel: bool = True
    cores: int = 1
    pieces: int = 0


@dataclass
class Axis:
    """Adjacent axes that run as one loop. ``members`` are the positions of the axes merged, outermost first."""

    members: list[int]
    size: Index


def merge_axes(code: Code, shape: Sequence[Index], probe: Callable[[Sequence[Index]], Sequence[Any]], groups: Sequence[int]) -> list[Axis]:
    """Merge adjacent axes wherever every address is linear in both with fitting steps.

    Args:
        shape: sizes of the axes.
        probe: the addresses that are touched at an index.
        groups: a number for each axis; only axes of the same number are merged.

    Returns:
        The loops, outermost first. Axes of size 1 are left out.
    """
    live = [k for k, n in enumerate(shape) if not (isinstance(n, int) and n == 1)]
    variables = {k: tirx.Var(code.fresh("p"), "int64") for k in live}
    for k, var in variables.items():
        code.analyzer.bind(var, tvm.ir.Range.from_min_extent(i64(0), i64(shape[k])))
    addresses = probe([variables.get(k, 0) for k in range(len(shape))])
    steps: list[list[Any] | None] = []
    for e in addresses:
        if isinstance(e, int):
            continue
        found = tvm.sym.detect_linear_equation(e, [variables[k] for k in live])
        steps.append(list(found)[:-1] if len(found) else None)
        if not len(found):  # not linear: the axes that it depends on stay apart
            used = {v.name for v in tirx.analysis.undefined_vars(e)}
            steps[-1] = [None if variables[k].name in used else i64(0) for k in live]
    axes: list[Axis] = []
    for p, k in enumerate(live):
        joins = bool(axes) and groups[axes[-1].members[-1]] == groups[k] and axes[-1].members[-1] == (live[p - 1] if p else -1)
        if joins and all(_fit(code, s[p - 1], s[p], shape[k]) for s in steps if s is not None):
            axes[-1].members.append(k)
            axes[-1].size = code.simplify(axes[-1].size * shape[k])
        else:
            axes.append(Axis([k], shape[k]))
    if len(axes) == len(live) or _goes_on(code, axes, probe, addresses, steps, live, len(shape)):
        return axes
    return [Axis([k], shape[k]) for k in live]


def _goes_on(code: Code, axes: Sequence[Axis], probe: Callable[[Sequence[Index]], Sequence[Any]], addresses: Sequence[Any],
             steps: Sequence[list[Any] | None], live: Sequence[int], rank: int) -> bool:  # fmt: skip
    """Whether each address is still the same linear one when a merged loop's variable goes into its innermost axis.

    An address may be linear within an axis alone: ``j // 2`` is 0 for both of its places, and 1 beyond its end.
    """
    variables = [tirx.Var(code.fresh("p"), "int64") for _ in axes]
    for var, axis in zip(variables, axes, strict=True):
        code.analyzer.bind(var, tvm.ir.Range.from_min_extent(i64(0), i64(axis.size)))
    again, known = probe(linear_index(axes, variables, rank)), iter(steps)
    if len(again) != len(addresses):
        return False
    for before, e in zip(addresses, again, strict=True):
        step = next(known) if not isinstance(before, int) else [i64(0)] * len(live)
        if isinstance(e, int):
            found = [i64(0)] * len(axes)
        else:
            found = list(tvm.sym.detect_linear_equation(e, variables))[:-1]
            used = {v.name for v in tirx.analysis.undefined_vars(e)}
            found = found or [None if v.name in used else i64(0) for v in variables]
        wanted = [step[live.index(axis.members[-1])] for axis in axes] if step is not None else [None] * len(axes)
        for axis, old, new in zip(axes, wanted, found, strict=True):
            if len(axis.members) > 1 and (old is None or new is None or not code.equal(old, new)):
                return False
    return True


def _fit(code: Code, outer: Any, inner: Any, size: Index) -> bool:
    return outer is not None and inner is not None and code.equal(outer, inner * i64(size))


def expand_index(code: Code, axes: Sequence[Axis], at: Sequence[Index], shape: Sequence[Index]) -> list[Index]:
    """Index of the original axes from the merged loops' variables."""
    out: list[Index] = [0] * len(shape)
    for axis, i in zip(axes, at, strict=True):
        for k, value in zip(axis.members, code.unflatten(i, [shape[k] for k in axis.members]), strict=True):
            out[k] = value
    return out


def linear_index(axes: Sequence[Axis], at: Sequence[Index], rank: int) -> list[Index]:
    """As :func:`expand_index`, without divisions, for what touches the addresses that the axes were merged by and no others.

    A merged loop's variable goes into its innermost axis, beyond whose end it runs, and zeros into the others: each address
    is linear in them with steps that fit, so it is the same.
    """
    out: list[Index] = [0] * rank
    for axis, i in zip(axes, at, strict=True):
        out[axis.members[-1]] = i
    return out


def product(code: Code, sizes: Sequence[Index]) -> Index:
    total: Index = 1
    for n in sizes:
        total = total * n
    return code.simplify(total)


def lanewise(code: Code, width: int, lanes: int, body: Callable[[Index], None]) -> None:
    """Run ``body(i)`` for 0 <= i < width, ``lanes`` at a time and without a loop around them: ``width`` is a multiple of ``lanes``."""
    for u in range(width // lanes):
        if lanes == 1:
            body(u)
        else:
            with code.loop(lanes, "vectorized", "v") as v:
                body(code.simplify(u * lanes + v))


def vector_loop(code: Code, start: Index, length: Index, lanes: int, body: Callable[[Index], None], overlap: bool = True) -> None:
    """Run ``body(i)`` for start <= i < start + length, ``lanes`` at a time; see :func:`vector_steps`."""

    def step(base: Index, width: int) -> None:
        if width == 1:
            return body(base)
        with code.loop(width, "vectorized", "v") as v:
            return body(code.simplify(base + v))

    vector_steps(code, start, length, lanes, step, overlap)


def vector_steps(code: Code, start: Index, length: Index, lanes: int, body: Callable[[Index, int], None], overlap: bool = True) -> None:
    """Run ``body(i, width)`` for pieces of start .. start + length - 1: ``lanes`` wide, and single elements.

    What is left over is done by one more vector that overlaps the last one, where ``body`` may run twice for an element
    (``overlap``) and there are enough elements; else one by one.
    """

    def one_by_one(first: Index, count: Index) -> None:
        with code.loop(count, "serial", "r") as r:
            body(code.simplify(first + r), 1)

    if lanes == 1:
        return one_by_one(start, length)
    whole, rest = code.div(length, lanes), code.mod(length, lanes)
    if not (isinstance(whole, int) and whole == 0):
        with code.loop(whole, "serial", "c") as c:
            body(code.simplify(start + c * lanes), lanes)
    if isinstance(rest, int) and rest == 0:
        return None
    if not overlap:
        first = code.simplify(start + whole * lanes)
        return one_by_one(first, rest)
    if isinstance(length, int):
        return body(start + (length - lanes), lanes) if whole else one_by_one(start, rest)
    with code.when(tirx.And(i64(length) >= i64(lanes), i64(rest) > i64(0))):
        body(start + (length - lanes), lanes)
    with code.when(i64(length) < i64(lanes)):
        one_by_one(start, length)
    return None


def run_space(code: Code, axes: Sequence[Axis], tuning: Tuning, weight: int, body: Callable[[list[Index], Index, Index], None]) -> None:
    """Run ``body(outer, start, length)`` over all axes; the innermost axis is handed over as a range.

    Outer axes, and pieces of a long innermost axis, run in parallel when there is work enough.

    Args:
        weight: units of work an element.
    """
    outer, inner = list(axes[:-1]), axes[-1].size if axes else 1
    long = not isinstance(inner, int) or inner > 2 * tuning.chunk
    chunk = tuning.chunk if long else inner
    pieces = code.ceildiv(inner, chunk) if long else 1
    steps = product(code, [*(a.size for a in outer), pieces])
    total = product(code, [a.size for a in axes])

    def nest(kind: str) -> None:
        with code.loop(steps, kind if not (isinstance(steps, int) and steps == 1) else "serial", "task") as task:
            sizes = [*(a.size for a in outer), pieces]
            at = [code.bind_index(i, "o", n) for i, n in zip(code.unflatten(task, sizes), sizes, strict=True)]
            start: Index = code.simplify(at[-1] * chunk)
            length = chunk if not long else code.least(inner - start, chunk)
            if long and isinstance(inner, int) and inner % chunk == 0:
                length = chunk
            body(at[:-1], start, code.bind_index(length, "n"))

    if isinstance(total, int):
        return nest("parallel" if tuning.parallel and total * weight >= SMALL and steps != 1 else "serial")
    if not tuning.parallel:
        return nest("serial")
    enough = i64(total) * i64(weight) >= i64(SMALL)
    with code.when(enough):
        nest("parallel")
    with code.when(tirx.Not(enough)):
        nest("serial")
    return None
