"""The loops of the templates other than products, as far as they decide a kernel's speed. Looks at the IR only."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

from graphopt.autotune.space import Level, LoopNest, Schedule
from graphopt.backends.forms.convform import ConvForm, conv_of, even_tile, tiles_a_task
from graphopt.backends.forms.prepare import expand_rows
from graphopt.backends.forms.shapes import row_shape
from graphopt.backends.forms.support import REDUCTIONS, is_materialized
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Value
from graphopt.ir.ops import Trait
from graphopt.ir.work import flops
from graphopt.target import Target

Loops = Callable[[Schedule], LoopNest]


def typical(d: Dim, graph: Graph) -> int:
    """What a size may be like: a symbolic one is taken for 16, or for the most it can be."""
    if isinstance(d, int):
        return d
    most = dims.bounds(d, graph.symbols)[1]
    return 16 if most is None else max(1, min(16, most))


def elements(v: Value, graph: Graph) -> int:
    return math.prod(typical(d, graph) for d in v.shape)


def bytes_of(v: Value, graph: Graph) -> float:
    return float(elements(v, graph) * v.dtype.itemsize)


def conv_loops(graph: Graph, t: Target) -> Loops:
    """A convolution by register tiles: image, weight, outputs with what is read beside them, totals."""
    form = conv_of(graph)
    assert isinstance(form, ConvForm)
    pixels, filters, groups = typical(form.pixels, graph), form.filters, form.groups
    size, ends = form.x.dtype.itemsize, _ends(graph, form.node.result)
    image = bytes_of(form.x, graph) / groups
    fresh = image / pixels  # bytes of the image that a pixel adds, all taps
    around = math.prod(form.kernel) / math.prod(form.stride)  # how often an element of the image is used
    tiles_of = cache(partial(form.tiles, pixels=pixels))

    def loops(s: Schedule) -> LoopNest:
        mr, nr, lanes, unroll = s["rows"], s["columns"], s["lanes"], s["unroll"]
        vectors = -(-nr // lanes)
        panels, count = groups * -(-filters // nr), tiles_of(mr, vectors)
        tiles = tiles_a_task(count, panels, s["tiles"], s["tasks"])
        pieces = -(-count // tiles)
        tasks, depth = panels * pieces, form.depth
        block = depth if depth <= s["block"] * 3 // 2 else min(depth, s["block"])
        cores = min(t.cores, tasks) if s["parallel"] else 1

        def touched(rows: float, part: float, columns: float) -> tuple[float, ...]:
            seen = min(image, rows * part * size, rows * fresh * min(1.0, part * around / depth) + _edge(rows, fresh, around))
            return (seen, part * columns * size, rows * columns * ends, 4.0 * rows * columns if block < depth else 0.0)

        by_pixels = s["split"] == "pixels"
        down, across = (min(cores, pieces), 1) if by_pixels else (1, min(cores, panels))
        levels = (
            Level(cores, touched(max(tiles * mr, pixels / down), depth, max(nr, filters * groups / across)), "parallel"),
            Level(tasks / cores, touched(tiles * mr, depth, nr)),
            Level(depth / block, touched(tiles * mr, block, nr)),
            Level(tiles, touched(mr, block, nr)),
            Level(block / unroll, touched(mr, unroll, nr), "unrolled"),
            Level(unroll * mr * -(-nr // lanes), (float(size), float(lanes * size), 0.0, 0.0), "vector"),
        )
        waste = count * mr * panels * nr / (pixels * filters * groups)
        moved = 0.0 if form.plain else 2.0 * bytes_of(form.x, graph)
        if form.packed is None:
            moved += bytes_of(form.w, graph)
        return LoopNest(("image", "weight", "ends", "totals"), levels, 2.0 * lanes, waste, mr * vectors + vectors + 1, moved)

    return loops


def depthwise_loops(graph: Graph, t: Target) -> Loops:
    """A depthwise convolution, or one of narrow groups: image, weight, outputs."""
    form = conv_of(graph)
    assert isinstance(form, ConvForm)
    lead, width = [typical(d, graph) for d in form.node.result.shape[:-2]], typical(form.node.result.shape[-2], graph)
    size, ends = form.x.dtype.itemsize, _ends(graph, form.node.result)
    taps, step = math.prod(form.kernel), math.prod(form.stride)
    filters, inner = form.groups * form.filters, form.inner
    lines = lead[-1] if len(lead) > 1 else 1
    outer = math.prod(lead) // lines

    def loops(s: Schedule) -> LoopNest:
        lanes, pixels = s["lanes"], even_tile(width, s["pixels"])
        most, wanted = (s["lines"], s["tasks"]) if s.sketch == "pieces" else (8, 32)
        each = -(-lines // -(-lines // most))
        pieces, blocks = -(-lines // each), -(-filters // lanes)
        chunks = min(blocks, -(-wanted // pieces))
        chunk = -(-blocks // chunks)
        tasks = outer * pieces * -(-blocks // chunk)
        cores = min(t.cores, tasks) if s["parallel"] else 1

        def touched(rows: float, columns: float, channels: float) -> tuple[float, ...]:
            tall = rows * form.stride[0] + form.kernel[0] - 1 if len(form.kernel) > 1 else 1.0
            wide = columns * form.stride[-1] + form.kernel[-1] - 1
            return (tall * wide * channels * inner / form.filters * size, taps * inner * channels * size, rows * columns * channels * ends)

        levels = (
            Level(cores, tuple(x * tasks / cores for x in touched(each, width, chunk * lanes)), "parallel"),
            Level(tasks / cores, touched(each, width, chunk * lanes)),
            Level(each, touched(1, width, chunk * lanes)),
            Level(-(-width // pixels), touched(1, pixels, chunk * lanes)),
            Level(chunk, touched(1, pixels, lanes), "unrolled"),
            Level(pixels * taps * inner, (float(lanes * size), float(lanes * size), 0.0), "vector"),
        )
        waste = -(-width // pixels) * pixels / width * blocks * lanes / filters
        return LoopNest(("image", "weight", "ends"), levels, 2.0 * lanes, waste, pixels + form.kernel[-1] + pixels * step, 0.0)

    return loops


def row_loops(graph: Graph, t: Target) -> Loops:
    """A region over rows: several passes over each, the first from memory."""
    flat = expand_rows(graph)
    shape = row_shape(flat)
    assert not isinstance(shape, str)
    rows, columns = (typical(d, flat) for d in shape)
    passes, work = 1 + sum(n.name in REDUCTIONS for n in flat.nodes()), operations(flat)
    values = (*flat.inputs, *flat.outputs)

    def loops(s: Schedule) -> LoopNest:
        step, lanes = s["rows"], s["lanes"]
        tasks = -(-rows // step)
        cores = min(t.cores, tasks) if s["parallel"] else 1
        share = rows / cores

        def touched(part: float) -> tuple[float, ...]:
            """Bytes for a share of all rows: what has no rows is read whole."""
            return tuple(bytes_of(v, flat) * (part if elements(v, flat) >= rows else 1.0) for v in values)

        row = touched(1.0 / rows)
        levels = (
            Level(cores, touched(share / rows), "parallel"),
            Level(tasks / cores, touched(min(1.0, step / rows))),
            Level(step * rows / (tasks * step), row),
            Level(passes, row),
            Level(max(1.0, columns / (lanes * s["unroll"])), tuple(x * min(1.0, lanes * s["unroll"] / columns) for x in row), "unrolled"),
            Level(s["unroll"], tuple(x * min(1.0, lanes / columns) for x in row), "vector"),
        )
        return LoopNest(tuple(f"{i}" for i in range(len(values))), levels, work * lanes / passes, tasks * step / rows, s["unroll"] + 4)

    return loops


def element_loops(graph: Graph, t: Target) -> Loops:
    """A region element by element: pieces of the innermost axis."""
    values = (*graph.inputs, *graph.outputs)
    largest = max(values, key=lambda v: elements(v, graph))
    total = max(1, elements(largest, graph))
    work = max(operations(graph), sum(_known(flops(n)) for n in graph.nodes()) / total)
    computed = sum(is_materialized(n) for n in graph.nodes())
    results = max(1, *(elements(v, graph) for v in graph.outputs))

    def loops(s: Schedule) -> LoopNest:
        lanes, chunk, unroll = s["lanes"], min(s["chunk"], total), s["unroll"] if computed else 1
        if s.sketch == "factored":
            chunk = max(1, total // (s["pieces"] * results))
        tasks = -(-total // chunk)
        cores = min(t.cores, tasks) if s["parallel"] else 1

        def touched(n: float) -> tuple[float, ...]:
            return tuple(bytes_of(v, graph) * min(1.0, n / total) for v in values)

        levels = (
            Level(cores, touched(total / cores), "parallel"),
            Level(tasks / cores, touched(chunk)),
            Level(max(1.0, chunk / (lanes * unroll)), touched(lanes * unroll), "unrolled"),
            Level(unroll, touched(lanes), "vector"),
        )
        return LoopNest(tuple(f"{i}" for i in range(len(values))), levels, work * lanes, tasks * chunk / total, unroll + 4)

    return loops


def operations(graph: Graph) -> float:
    """Operations of an element, a function such as an exponential counted as ten."""
    return float(sum(10 if n.op.has(Trait.FLOAT_ONLY) else 1 for n in graph.nodes() if not n.op.has(Trait.VIEW)) or 1)


def _known(d: Dim) -> float:
    """A count of operations; one that depends on unknown sizes is not counted."""
    return float(d) if isinstance(d, int) else 0.0


def _ends(graph: Graph, result: Value) -> int:
    """Bytes written, and read beside, for an element of a result."""
    beside = (v for v in graph.inputs if dims.same_shape(v.shape, result.shape))
    return sum(v.dtype.itemsize for v in (*graph.outputs, *beside))


def _edge(rows: float, fresh: float, around: float) -> float:
    """Bytes of the image that only the edge of a piece of pixels needs: about a line of taps."""
    return fresh * math.sqrt(rows * max(0.0, around - 1))
