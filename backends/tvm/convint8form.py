"""Which convolutions of 8-bit integers have the kernel of integer instructions, where their images lie for that, and their schedules.

Looks at the IR only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

from graphopt.autotune.space import Param
from graphopt.backends.forms.convform import ConvForm, conv_of
from graphopt.backends.tvm.int8form import STEP, packed_fours
from graphopt.backends.tvm.panelform import COLUMNS, TILE
from graphopt.ir import dims, types
from graphopt.ir.graph import Graph, Value
from graphopt.ir.ops import Trait
from graphopt.target import Target

_BLOCK = 18  # steps, whose part of a panel stays in the first-level cache beside the tiles of the image
_GROUP = 8  # row tiles (``amx``: pairs of them) of a task


@dataclass(frozen=True)
class Planes:
    """One image as flat planes of bytes, in which the pixels under a tap are those of the results, moved by one distance.

    Lines follow each other with zeros between them, so that a tap outside of a line reads those. A result at ``[*o]`` has the place of
    that index among ``pitch``; places with an index beyond ``out`` have no result. Where the channels fill whole steps (``blocked``)
    there is a plane for each phase of the strides, ``[phase, chunk, place, 64]``. Else all pixels of a line follow each other and
    a place is as many of them as the stride: what lies under the taps of a line is one run of bytes.

    Attributes:
        phases: of each plane, an axis each.
        moves: of each line of the weight, (its plane, the distance in places, bytes beyond that).
        row: bytes from place to place.
        chunks: steps of a line of the weight.
        reach: places that are read behind a result's own.
    """

    size: tuple[int, ...]
    out: tuple[int, ...]
    stride: tuple[int, ...]
    low: tuple[int, ...]
    pitch: tuple[int, ...]
    phases: tuple[tuple[int, ...], ...]
    moves: tuple[tuple[int, int, int], ...]
    blocked: bool
    row: int
    chunks: int
    reach: int

    @property
    def flats(self) -> int:
        """Places up to the last result's."""
        last = 0
        for n, pitch in zip(self.out, self.pitch, strict=True):
            last = last * pitch + n - 1
        return last + 1

    @property
    def whole(self) -> bool:
        """Whether each place has a result."""
        return self.pitch[1:] == self.out[1:]


def planes_of(form: ConvForm) -> Planes:
    """How the images of a convolution of known sizes are laid out."""
    size, out = ([int(d) for d in v.shape[1:-1]] for v in (form.x, form.node.result))
    spans = [(k - 1) * d for k, d in zip(form.kernel, form.dilation, strict=True)]
    pitch = []
    for n, o, s, span, low, high in zip(size, out, form.stride, spans, form.low, form.high, strict=True):
        # the zeros behind a line are those in front of the next one
        pitch.append(max(o, n + max(low, high)) if s == 1 else o + span // s)
    blocked = form.inner % STEP == 0
    joined = not blocked and form.dilation[-1] == 1  # the taps of a line are one run
    moves = []
    for tap in product(*(range(k) for k in (form.kernel[:-1] if joined else form.kernel))):
        at = [t * d for t, d in zip((*tap, 0) if joined else tap, form.dilation, strict=True)]
        beyond = 0 if blocked else at[-1] * form.inner
        at[-1] = at[-1] if blocked else 0
        distance = 0
        for a, s, p in zip(at, form.stride, pitch, strict=True):
            distance = distance * p + a // s
        moves.append((tuple(a % s for a, s in zip(at, form.stride, strict=True)), distance, beyond))
    phases = tuple(dict.fromkeys(phase for phase, _, _ in moves))
    run = form.inner * (form.kernel[-1] if joined else 1)
    reach = max(distance for _, distance, _ in moves) + (0 if blocked else spans[-1] // form.stride[-1])
    return Planes(tuple(size), tuple(out), form.stride, form.low, tuple(pitch), phases,
                  tuple((phases.index(phase), distance, beyond) for phase, distance, beyond in moves), blocked,
                  STEP if blocked else form.stride[-1] * form.inner, -(-run // STEP), reach)  # fmt: skip


def fours_of(form: ConvForm) -> Value | None:
    """The packed weight ``[panels, depth / 4, 32, 4]`` behind the views that the packing pass writes."""
    v = form.w
    for name in ("reshape", "slice", "reshape"):
        node = v.producer
        if node is None or node.name != name:
            return None
        v = node.operands[0]
    return packed_fours(v)


def in_place(form: ConvForm, planes: Planes, rows: int) -> bool:
    """Whether tiles of so many pixels are loaded from where the image lies."""
    x, ones = form.x, {1}
    plain = x.is_input and x.type.strides is None and not any((*form.low, *form.high))
    return plain and {*form.kernel, *form.stride} == ones and planes.blocked and planes.flats % rows == 0


def refusal(graph: Graph) -> str | None:
    """Why a region is not one convolution of integers with an epilogue of its shape, or None."""
    form = conv_of(graph, integers=True)
    if isinstance(form, str):
        return form
    if form.node.attrs["acc"] != types.i32 or form.x.dtype != types.i8:
        return "not a convolution of i8 in i32"
    if form.groups != 1 or fours_of(form) is None:
        return "the weight is not packed in fours"
    if not dims.is_static(form.x.shape[1:]) or not dims.is_static(form.node.result.shape[1:]):
        return "the image is of unknown size"
    below = {form.node.result: None}
    for node in graph.nodes():
        if any(v in below for v in node.operands):
            if not node.op.has(Trait.POINTWISE):
                return f"{node.name} after the convolution"
            below.update(dict.fromkeys(node.results))
    return None


def params(graph: Graph, t: Target) -> tuple[Param, ...]:
    """The knobs; the default engine is the target's best.

    ``lanes``: sums of a vector. ``rows``: of a tile. ``group``: row tiles (``amx``: pairs of them) of a task. ``panels``: of a task.
    ``block``: steps of the summed axis, after which sums are put aside (``amx``). ``ahead``: whether the next block is asked for.
    """
    form = conv_of(graph, integers=True)
    assert isinstance(form, ConvForm)
    engine, planes, panels = t.int8_products, planes_of(form), -(-form.filters // COLUMNS)
    engines = tuple(dict.fromkeys((engine, *(e for e in ("vnni",) if t.has("avx512_vnni") and t.has("avx512f")), "mul")))
    side = 2 if engine == "amx" else 1
    most = TILE if engine == "amx" else 10 if t.vector_registers == 32 else 4
    tile = _rows(planes.flats, most, side)
    tiles = -(-planes.flats // (side * tile))
    weight, image = form.depth * form.filters, prod(planes.size) * form.inner + planes.flats * form.filters
    deep = weight > image  # cores share the weight, which is the most that is read
    group = tiles if deep else min(tiles, _GROUP if engine == "amx" else 4 * _GROUP)
    count = -(-tiles // group)
    if not deep:
        count = -(-count // t.cores) * t.cores
    group = -(-tiles // count)
    shares = min(panels, t.cores if count % t.cores else 1)
    steps = len(planes.moves) * planes.chunks
    block = -(-steps // -(-steps // _BLOCK))
    share = -(-panels // shares)
    return (
        Param("engine", engines),
        Param("lanes", (t.lanes(4),)),
        Param("rows", tuple(dict.fromkeys((tile, most, *(r for r in (8, 4, 2, 1) if r < tile)))), "tile"),
        Param("group", tuple(dict.fromkeys((group, 1, 2, 4, 8, 16))), "tasks"),
        Param("panels", tuple(dict.fromkeys((share, panels, -(-panels // 2), -(-panels // 4)))), "tasks"),
        Param("block", tuple(dict.fromkeys((block, 8, 12, 16, 24, 1 << 20))), "tasks"),
        Param("ahead", (True, False)),
        Param("parallel", (True, False), "tasks"),
    )


def _rows(pixels: int, most: int, side: int) -> int:
    """Rows of a tile: as many as divide the pixels, if those are nearly as many as a tile has."""
    for rows in range(most, most * 3 // 4, -1):
        if pixels % (rows * side) == 0:
            return rows
    each = -(-pixels // (side * most))
    return max(1, -(-pixels // (each * side)))
