"""Which convolutions are summed from thirds on AMX tiles, where their images lie for that, and their schedules. Looks at the IR only."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

from graphopt.autotune.space import Constraint, Param, SearchSpace
from graphopt.backends.forms.convform import ConvForm
from graphopt.backends.tvm.thirdform import COLUMNS, STEP, TILE
from graphopt.ir import dims, types
from graphopt.target import Target

# steps of the summed axis whose sums are then added to the totals, the best first: for many pairs of row tiles, the split weight of
# two blocks stays in the first-level cache; for few, the sums are added less often
_BLOCKS, _FEW_BLOCKS = (4, 3, 5, 6, 2, 7, 8, 1), (8, 6, 7, 5, 4, 3, 2, 1)
_FEW = 8  # pairs


@dataclass(frozen=True)
class Planes:
    """An image as flat planes, in which the pixels under a tap are those of the results, moved by one distance.

    Lines, and whole images, follow each other with zeros between them, so that a tap outside of a line reads those. With strides,
    there is a plane for each phase: the pixels at ``stride * i + phase``. A result at ``[n, *o]`` has the place of that index among
    ``[images, *pitch]``; places with an index beyond ``out`` have no result.

    Attributes:
        phases: of each plane, an axis each.
        moves: of each tap, (its plane, the distance).
        reach: the largest distance.
        flats: places up to the last result's.
    """

    images: int
    size: tuple[int, ...]
    out: tuple[int, ...]
    stride: tuple[int, ...]
    low: tuple[int, ...]
    pitch: tuple[int, ...]
    phases: tuple[tuple[int, ...], ...]
    moves: tuple[tuple[int, int], ...]

    @property
    def reach(self) -> int:
        return max(distance for _, distance in self.moves)

    @property
    def flats(self) -> int:
        last = self.images - 1
        for n, pitch in zip(self.out, self.pitch, strict=True):
            last = last * pitch + n - 1
        return last + 1


def planes_of(form: ConvForm) -> Planes:
    """How the image of a convolution of known sizes is laid out."""
    size, out = ([int(d) for d in v.shape[1:-1]] for v in (form.x, form.node.result))
    pitch = []
    for axis, (n, o) in enumerate(zip(size, out, strict=True)):
        span = (form.kernel[axis] - 1) * form.dilation[axis] // form.stride[axis]
        # the zeros behind a line are those in front of the next one
        pitch.append(max(o, n + max(form.low[axis], form.high[axis])) if form.stride[axis] == 1 else o + span)
    taps = []
    for tap in product(*(range(k) for k in form.kernel)):
        at = [t * d for t, d in zip(tap, form.dilation, strict=True)]
        distance = 0
        for a, s, p in zip(at, form.stride, pitch, strict=True):
            distance = distance * p + a // s
        taps.append((tuple(a % s for a, s in zip(at, form.stride, strict=True)), distance))
    phases = tuple(dict.fromkeys(phase for phase, _ in taps))
    return Planes(int(form.x.shape[0]), tuple(size), tuple(out), form.stride, form.low, tuple(pitch), phases,
                  tuple((phases.index(phase), distance) for phase, distance in taps))  # fmt: skip


def refusal(form: ConvForm, t: Target) -> str | None:
    """Why a convolution is not for thirds, or None."""
    if not t.f32_thirds:
        return "the target has no AMX tiles"
    if form.node.result.dtype != types.f32 or form.x.dtype != types.f32:
        return "not a convolution of f32"
    if form.packed is None or form.packed.shape[-1] != COLUMNS or form.groups != 1:
        return f"the weight is not packed in panels of {COLUMNS} channels"
    if not dims.is_static(form.x.shape) or not dims.is_static(form.node.result.shape):
        return "the image is of unknown size"
    if t.conv_in_thirds(prod(form.kernel), form.inner, form.filters, int(form.pixels)):
        return None
    return f"{form.inner} channels, {form.filters} filters and {form.pixels} pixels are better summed as they are"


def chunks_of(form: ConvForm) -> int:
    """Steps of the summed axis for each tap."""
    return -(-form.inner // STEP)


def params(form: ConvForm, t: Target) -> tuple[Param, ...]:
    """The knobs.

    ``block``: steps of the summed axis whose sums are then added to the totals. ``rows``: of a tile. ``group``: pairs of row tiles of a
    task. ``panels``: of a task. ``fetch``: whether what the epilogue reads and writes is asked for before. ``ahead``: so with the weight.
    """
    planes, panels = planes_of(form), -(-form.filters // COLUMNS)
    steps = prod(form.kernel) * chunks_of(form)
    place = len(planes.phases) * chunks_of(form) * 3 * STEP * 2  # bytes of the planes for each place
    deep = form.filters > int(form.pixels)  # reading the weight by each core takes longer than splitting the image by each
    shares = min(panels, t.cores) if deep else 1
    room = max(2 * TILE, t.cache[1] // 2 // place - planes.reach)
    written = 4 * int(form.pixels) * form.filters
    far = written > t.cache[1]
    if far:  # what a task reads and writes in its epilogue stays near, though not all channels of a pixel are written at once
        room = min(room, max(2 * TILE, t.cache[1] // 4 // (8 * form.filters)))
    groups = -(-planes.flats // room)
    if not deep:
        groups = -(-groups // t.cores) * t.cores
    each = -(-planes.flats // groups)
    group = -(-each // (2 * TILE))
    tile = min(TILE, -(-each // (2 * group)))
    blocks = [b for b in (_FEW_BLOCKS if group <= _FEW else _BLOCKS) if steps % b == 0]
    return (
        Param("block", tuple(blocks), "tasks"),
        Param("rows", tuple(dict.fromkeys((tile, TILE))), "tile"),
        Param("group", tuple(dict.fromkeys((group, max(1, group // 2), 2, 4, 8, 16))), "tasks"),
        Param("panels", tuple(dict.fromkeys((-(-panels // shares), panels, -(-panels // 2), -(-panels // 4)))), "tasks"),
        Param("fetch", (far, not far)),
        Param("ahead", (True, False)),
        Param("parallel", (True, False), "tasks"),
    )


def space(form: ConvForm, t: Target) -> SearchSpace:
    """All schedules."""
    place = len(planes_of(form).phases) * chunks_of(form) * 3 * STEP * 2
    fits = Constraint("planes beyond twice the cache", lambda k: int(str(k["group"])) * 2 * TILE * place <= 2 * t.cache[1])
    return SearchSpace("conv-thirds", params=params(form, t), constraints=(fits,))
