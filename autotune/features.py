"""What a cost model sees of a candidate: numbers of one length for every workload, schedule and target.

Three parts: the workload (arithmetic, bytes, sizes, types, ops), the schedule (template, sketch, knobs), and the loops that the
schedule makes (:class:`~graphopt.autotune.space.LoopNest`). The last part is what carries over between templates: how much each
loop level touches, what must come from each level of the cache for it, the arithmetic intensity along the levels, registers
against those there are, wasted operations, tasks a thread; and the time of each of these at the target's nominal speed. Sizes are
logarithms of base 2.

Reference: Zheng et al., "Ansor: Generating High-Performance Tensor Programs for Deep Learning", OSDI 2020, appendix B.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from graphopt.autotune.space import LoopNest, Schedule, Workload
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Value
from graphopt.ir.ops import Trait
from graphopt.ir.work import flops
from graphopt.target import Target

_KINDS = ("pointwise", "reduction", "rowwise", "matmul", "conv", "scan", "scatter", "update")
_TRAITS = (Trait.POINTWISE, Trait.FLOAT_ONLY, Trait.VIEW, Trait.REDUCTION, Trait.CONTRACTION, Trait.COMPOSITE)
_TEMPLATES, _SKETCHES, _KNOBS = 8, 32, 32  # places for a template, a sketch and the knobs' values, by hashes of the names
_OPERANDS, _OUTER, _INNER, _CURVE = 4, 2, 4, 10
_SYMBOL = 16  # what an unknown size is taken for
_NOMINAL = (64.0, 32.0, 10.0)  # bytes a cycle and core from the first-level cache, from the second, from beyond


def _names() -> tuple[str, ...]:
    """A name for every feature, in order."""
    workload = ["flops", "bytes read", "bytes written", "intensity", "elements", "last axis", "axis before", "inputs", "outputs",
                "bits", "float", *(f"kind {k}" for k in _KINDS), *(f"ops {t.name.lower()}" for t in _TRAITS)]  # fmt: skip
    target = ["lanes", "registers", "cores", "cache 1", "cache 2", "cache 3"]
    places = (("template", _TEMPLATES), ("sketch", _SKETCHES), ("knob", _KNOBS))
    schedule = [f"{what} {i}" for what, n in places for i in range(n)]
    levels = [f"{side} {i} {what}" for side, n in (("outer", _OUTER), ("inner", _INNER)) for i in range(n)
              for what in ("trips", "touched", "flops")]  # fmt: skip
    traffic = [f"{what} from {c}" for c in (1, 2, 3) for what in (*(f"operand {i}" for i in range(_OPERANDS)), "all")]
    fit = [f"{what} against cache {c}" for c in (1, 2, 3) for what in ("task", "inner level")]
    other = ["known", "tasks", "tasks a core", "imbalance", "cores used", "waste", "registers needed", "registers over", "moved",
             "unrolled"]  # fmt: skip
    cycles = ["cycles flops", "cycles 1", "cycles 2", "cycles 3", "cycles launch", "cycles most", "cycles sum"]
    return tuple(workload + target + schedule + levels + traffic + fit + [f"intensity {i}" for i in range(_CURVE)] + other + cycles)


NAMES = _names()
Vector = npt.NDArray[np.float32]


def features(w: Workload, s: Schedule, target: Target, nest: Callable[[Schedule], LoopNest] | None = None) -> Vector:
    """The features of a candidate, in the order of ``NAMES``. Without a nest its features are zero."""
    loops = nest(s) if nest is not None else None
    values = [*_of_workload(w), *_of_target(target), *_of_schedule(s), *_of_loops(loops, target)]
    assert len(values) == len(NAMES), f"{len(values)} features for {len(NAMES)} names"
    return np.asarray(values, dtype=np.float32)


# --- the workload ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _of_workload(w: Workload) -> tuple[float, ...]:
    graph = w.graph
    work = sum(_number(flops(n), graph) for n in graph.nodes())
    read, written = (sum(_elements(v, graph) * v.dtype.itemsize for v in values) for values in (graph.inputs, graph.outputs))
    largest = max((*graph.outputs, *graph.inputs), key=lambda v: _elements(v, graph))
    axes = [_number(d, graph) for d in graph.outputs[0].shape]
    counts = [sum(n.op.has(t) for n in graph.nodes()) for t in _TRAITS]
    return (
        _log(work), _log(read), _log(written), _log(work / max(1.0, read + written)), _log(_elements(largest, graph)),
        _log(axes[-1]) if axes else 0.0, _log(axes[-2]) if len(axes) > 1 else 0.0, float(len(graph.inputs)), float(len(graph.outputs)),
        float(largest.dtype.bits), float(largest.dtype.is_float), *(float(w.kind == k) for k in _KINDS), *map(float, counts),
    )  # fmt: skip


def _number(d: Dim, graph: Graph) -> float:
    """A size; an unknown one is taken for 16, or the most it can be."""
    if isinstance(d, int):
        return float(d)
    most = {name: dims.bounds(dims.symbol(name), graph.symbols)[1] for name in graph.symbols}
    return float(dims.evaluate(d, {name: _SYMBOL if n is None else max(1, min(n, _SYMBOL)) for name, n in most.items()}))


def _elements(v: Value, graph: Graph) -> float:
    return math.prod(_number(d, graph) for d in v.shape)


def _of_target(t: Target) -> tuple[float, ...]:
    return (float(t.lanes(4)), float(t.vector_registers), float(t.cores), *(_log(c) for c in t.cache))


# --- the schedule ----------------------------------------------------------------------------------------------------------


def _of_schedule(s: Schedule) -> list[float]:
    template, sketch = _place(s.template, _TEMPLATES), _place(f"{s.template}/{s.sketch}", _SKETCHES)
    knobs: dict[int, float] = {}  # a knob has the same place in every sketch; the next one where another of the sketch has that
    for name, value in s.knobs:
        for i, x in enumerate(value if isinstance(value, tuple) else (value,)):
            at = _place(f"{name}{i or ''}", _KNOBS)
            while at in knobs and len(knobs) < _KNOBS:
                at = (at + 1) % _KNOBS
            knobs[at] = zlib.crc32(x.encode()) % 97 if isinstance(x, str) else float(x) if isinstance(x, bool) else _log(x)
    return [*(float(i == template) for i in range(_TEMPLATES)), *(float(i == sketch) for i in range(_SKETCHES)),
            *(knobs.get(i, -1.0) for i in range(_KNOBS))]  # fmt: skip


def _place(name: str, places: int) -> int:
    return zlib.crc32(name.encode()) % places


# --- the loops -------------------------------------------------------------------------------------------------------------


def _of_loops(nest: LoopNest | None, t: Target) -> list[float]:
    if nest is None:
        return [0.0] * (3 * (_OUTER + _INNER) + 3 * (_OPERANDS + 1) + 6 + _CURVE + 10 + 7)
    levels = nest.levels
    runs = _products([level.trips for level in levels])  # how often an iteration of each level runs
    inside = [nest.flops * math.prod(level.trips for level in levels[i + 1 :]) for i in range(len(levels))]  # flops of an iteration
    touched = [sum(level.touched) for level in levels]
    total = inside[0] * levels[0].trips

    rows = list(zip((level.trips for level in levels), touched, inside, strict=True))
    outer, inner = (rows + [(1.0, 0.0, 0.0)] * _OUTER)[:_OUTER], ([(1.0, 0.0, 0.0)] * _INNER + rows)[-_INNER:]
    out = [_log(x) for row in (*outer, *inner) for x in row]

    traffic = [_traffic(nest, runs, size / (1 if c < 2 else t.cores)) for c, size in enumerate(t.cache)]
    for by_operand in traffic:
        out += [*(_log(x) for x in [*by_operand, *[0.0] * _OPERANDS][:_OPERANDS]), _log(sum(by_operand))]
    task, last = touched[min(1, len(touched) - 1)], touched[-2 if len(touched) > 1 else -1]
    out += [_log(x) - _log(size) for size in t.cache for x in (task, last)]

    order = sorted(zip(map(_log, inside), (_log(f) - _log(b) for f, b in zip(inside, touched, strict=True)), strict=True))
    out += [float(x) for x in np.interp(np.linspace(0, 36, _CURVE), [x for x, _ in order], [y for _, y in order])]

    cores = levels[0].trips if levels[0].kind == "parallel" else 1.0
    tasks = cores * (levels[1].trips if len(levels) > 1 else 1.0)
    each = tasks / cores
    over = max(0, nest.registers - t.vector_registers)
    unrolled = math.prod(level.trips for level in levels if level.kind in ("unrolled", "vector"))
    out += [1.0, _log(tasks), _log(each), math.ceil(each) / each, cores, nest.waste, float(nest.registers), float(over), _log(nest.moved),
            _log(unrolled)]  # fmt: skip
    slack = math.ceil(each - 1e-9) / each / cores
    cycles = [total / (4.0 * t.lanes(4)) * slack, *(sum(by) / speed * slack for by, speed in zip(traffic, _NOMINAL, strict=True))]
    cycles.append(nest.moved / _NOMINAL[1] / cores + 100.0 * each)
    return [*out, *(_log(c) for c in (*cycles, max(cycles), sum(cycles)))]


def _traffic(nest: LoopNest, runs: Sequence[float], cache: float) -> list[float]:
    """Bytes of each operand that come from beyond a cache.

    An operand stays in the cache during the outermost level's iteration in which all that it touches fits, beside what one
    iteration of the next level touches of the others.
    """
    levels, out = nest.levels, []
    for o in range(len(nest.operands)):
        at = len(levels) - 1
        for i, level in enumerate(levels):
            below = levels[min(i + 1, len(levels) - 1)].touched
            if level.touched[o] + sum(below) - below[o] <= cache:
                at = i
                break
        out.append(levels[at].touched[o] * runs[at])
    return out


def _products(trips: Sequence[float]) -> list[float]:
    out, total = [], 1.0
    for n in trips:
        total *= n
        out.append(total)
    return out


def _log(x: float) -> float:
    return math.log2(1.0 + max(0.0, float(x)))
