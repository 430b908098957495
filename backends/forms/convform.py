"""What a convolution region looks like to its kernels: sizes, packed weights, register tiles. Looks at the IR only."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import cast

from graphopt.backends.forms.support import materialized
from graphopt.ir import dims, types
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Node, Value
from graphopt.target import Target

USUAL_TILES = 12  # of a task
_POINTER = 40  # multiply-adds in whose time a pixel's place is computed, for reading and for writing
_PIXELS = 1 << 16  # where their number is not known: rounding to whole tiles does not count
_TASK = 0.25  # what a task costs by itself, in tiles
_MANY = 256  # tasks a thread that are as good as equally shared
_UNPACK = ("reshape", "slice", "reshape", "transpose", "reshape")


@dataclass(frozen=True)
class ConvForm:
    """A channels-last convolution: x [N, *S, C] with w [*K, C / groups, O].

    Attributes:
        packed: the input that holds the weight in panels ``[groups * ceil(O / groups / nr), K * C / groups, nr]``, if it is.
        by_filter: the input that holds the weight filter by filter, ``[O, *K, C / groups]``, if it is.
        transformed: the input that holds the weight by Winograd's transform, ``[O / nr, 16, C, nr]``, if it is.
    """

    node: Node
    packed: Value | None
    transformed: Value | None = None
    by_filter: Value | None = None

    @property
    def x(self) -> Value:
        """The image: what the operand is without zeros around it."""
        pad = self._pad
        return self.node.operands[0] if pad is None else pad.operands[0]

    @property
    def _pad(self) -> Node | None:
        """The pad node in front of the convolution, if it puts zeros around the spatial axes."""
        pad = self.node.operands[0].defined_by("pad")
        if pad is None or pad.attrs["value"] != 0.0:
            return None
        sides = (*pad.attrs["low"], *pad.attrs["high"])
        rank = len(sides) // 2
        return pad if all(isinstance(n, int) for n in sides) and not any(sides[i] for i in (0, rank - 1, rank, 2 * rank - 1)) else None

    @property
    def low(self) -> tuple[int, ...]:
        """Zeros in front of each spatial axis: the convolution's padding, and that of a pad node."""
        pad = self._pad
        more = (0,) * len(self.kernel) if pad is None else pad.attrs["low"][1:-1]
        return tuple(p + q for p, q in zip(self.node.attrs["padding"], more, strict=True))

    @property
    def high(self) -> tuple[int, ...]:
        """Zeros behind each spatial axis."""
        pad = self._pad
        more = (0,) * len(self.kernel) if pad is None else pad.attrs["high"][1:-1]
        return tuple(p + q for p, q in zip(self.node.attrs["padding"], more, strict=True))

    @property
    def w(self) -> Value:
        return self.node.operands[1]

    @property
    def groups(self) -> int:
        return int(self.node.attrs["groups"])

    @property
    def kernel(self) -> tuple[int, ...]:
        return cast("tuple[int, ...]", self.w.shape[:-2])

    @property
    def inner(self) -> int:
        """Channels that one output reads."""
        return cast(int, self.w.shape[-2])

    @property
    def filters(self) -> int:
        """Output channels of a group."""
        return cast(int, self.w.shape[-1]) // self.groups

    @property
    def depth(self) -> int:
        """Products summed for one output."""
        return prod(self.kernel) * self.inner

    @property
    def pixels(self) -> Dim:
        """Outputs of one channel, of all images."""
        return dims.numel(self.node.result.shape[:-1])

    @property
    def stride(self) -> tuple[int, ...]:
        return cast("tuple[int, ...]", self.node.attrs["stride"])

    @property
    def dilation(self) -> tuple[int, ...]:
        return cast("tuple[int, ...]", self.node.attrs["dilation"])

    @property
    def plain(self) -> bool:
        """Whether a kernel can read x in place: row-major, as it computes, and without padding."""
        x = self.x
        return x.is_input and x.type.strides is None and x.dtype in (types.f32, types.f64) and not any((*self.low, *self.high))

    @property
    def pointwise(self) -> bool:
        """Whether it is 1x1 by strides of 1, without padding: pixel i of the result reads pixel i of the image."""
        ones = all(n == 1 for n in (*self.kernel, *self.stride))
        return ones and not any((*self.low, *self.high))

    @property
    def step(self) -> int:
        """Elements of a channels-last image from what a pixel of the result reads to what its neighbour in the line does."""
        return self.stride[-1] * self.groups * self.inner

    @property
    def neighbours_share(self) -> bool:
        """Whether each step of a sum reads, but for one pixel, what the step before it read for the neighbours."""
        return self.step == 1 and self.dilation[-1] == 1 and self.kernel[-1] > 1

    def tiles_across(self, rows: int, vectors: int) -> int:
        """Tiles of ``rows`` pixels by ``vectors`` of channels that each line of the result is divided into; the last may overlap another.

        0: tiles go on from a line to the next one, because its length is not known, or they would overlap too much.
        """
        width = self.node.result.shape[-2]
        if self.pointwise or not isinstance(width, int) or width < rows:
            return 0
        tiles = -(-width // rows)
        return tiles if tiles * rows * self._tile_cost(rows, vectors, True) <= width * self._tile_cost(rows, vectors, False) else 0

    def tiles(self, rows: int, vectors: int, pixels: int) -> int:
        """Tiles of one panel, of so many pixels in all."""
        if across := self.tiles_across(rows, vectors):
            return -(-pixels * across // cast(int, self.node.result.shape[-2]))
        return -(-pixels // rows)

    def cost(self, rows: int, vectors: int) -> float:
        """Multiply-adds of a vector that all tiles of a panel take, or what takes as long."""
        pixels = self.pixels if isinstance(self.pixels, int) else _PIXELS
        known = self.pointwise or self.tiles_across(rows, vectors) > 0
        return self.tiles(rows, vectors, pixels) * self._tile_cost(rows, vectors, known)

    def _tile_cost(self, rows: int, vectors: int, known: bool) -> float:
        """Of one tile; its pixels lie at known steps, or each is found by a pointer that is computed, and loaded at each step."""
        step = rows * vectors if known else max(rows * vectors, 2 * rows + vectors)
        return float(self.depth * (step + max(2, vectors)) + (0 if known else _POINTER * rows))

    @property
    def depthwise(self) -> bool:
        """Whether each output channel reads one input channel, the one of its own number."""
        return self.inner == 1 and self.filters == 1 and self.groups > 1


def conv_of(graph: Graph, integers: bool = False) -> ConvForm | str:
    """The convolution of a region, or why the region is none that the kernels take.

    Args:
        integers: whether one of integers that are summed in 32 bits is wanted, instead of one of floats.
    """
    nodes = materialized(graph)
    if len(nodes) != 1 or nodes[0].name != "conv":
        return "not exactly one conv"
    (node,) = nodes
    if not node.attrs["channels_last"]:
        return "a convolution with its channels before the spatial axes"
    if node.result.dtype.is_float is integers or (node.attrs["acc"] == types.i32) is not integers:
        return f"a convolution of {node.operands[0].dtype}"
    if not dims.is_static(node.operands[1].shape) or not isinstance(node.operands[0].shape[-1], int):
        return "weights of unknown size"
    if any(d == 0 for v in (*node.operands, node.result) for d in v.shape):
        return "a convolution without elements"
    for v in graph.outputs:
        if not dims.same_shape(v.shape, node.result.shape):
            return f"the output {v.type} has not the convolution's shape"
    w = node.operands[1]
    return ConvForm(node, packed_weight(w), _transformed(node), _weight_by_filter(w))


def packed_weight(w: Value) -> Value | None:
    """The packed weight behind the views that the packing pass writes."""
    v = w
    for name in _UNPACK:
        node = v.producer
        if node is None or node.name != name:
            return None
        v = node.operands[0]
    return v if v.is_input and v.type.strides is None and v.type.rank == 3 and v.dtype in (types.f32, types.f64) else None


def _weight_by_filter(w: Value) -> Value | None:
    """The input whose axes are those of the weight with the filters in front."""
    turned, rank = w.defined_by("transpose"), w.type.rank
    if turned is None or turned.attrs["perm"] != (*range(1, rank), 0):
        return None
    v = turned.operands[0]
    return v if v.is_input and v.type.strides is None and v.dtype in (types.f32, types.f64) else None


def _transformed(conv: Node) -> Value | None:
    """The weight by Winograd's transform behind the nodes that the transforming pass writes, of a convolution that it is for."""
    v, a = conv.operands[1], conv.attrs
    if a["groups"] != 1 or set(a["stride"]) | set(a["dilation"]) != {1} or not dims.is_static(conv.result.shape):
        return None
    for axis in (1, 0):
        whole = v.defined_by("concat")
        if whole is None or len(whole.operands) != 3 or whole.attrs["axis"] != axis:
            return None
        middle = whole.operands[1].defined_by("sub")
        parts = [whole.operands[0], *(middle.operands if middle is not None else ()), whole.operands[2]]
        rows = [p.defined_by("slice") for p in parts]
        wanted = [{"axis": axis, "start": i, "stop": i + 1, "step": 1} for i in range(4)]
        if [dict(n.attrs) for n in rows if n is not None] != wanted or len({n.operands[0] for n in rows if n is not None}) != 1:
            return None
        v = parts[0].defined_by("slice").operands[0]  # type: ignore[union-attr]
    split = v.defined_by("reshape")
    moved = split.operands[0].defined_by("transpose") if split is not None else None
    if moved is None or v.shape[:2] != (4, 4) or moved.attrs["perm"] != (1, 2, 0, 3):
        return None
    u = moved.operands[0]
    return u if u.is_input and u.type.strides is None and u.type.rank == 4 and u.shape[1] == 16 and u.dtype == types.f32 else None


def tile_rows(form: ConvForm, vectors: int, t: Target) -> tuple[int, ...]:
    """Numbers of pixels a tile can have beside so many vectors of channels, the best one first.

    A step of a tile takes ``rows * vectors`` multiply-adds, and loads; pixels beyond the last, and those that two tiles
    compute, are wasted. Where neighbouring pixels read the same elements one step later, LLVM keeps those in registers.
    """
    most = max(1, min(16, (t.vector_registers - 2 - vectors) // (vectors + int(form.neighbours_share))))
    return tuple(sorted(range(1, most + 1), key=lambda r: (form.cost(r, vectors), -r)))


def even_tile(width: int, most: int) -> int:
    """Pixels of a tile, by which a line is divided into as many as by ``most``, but evenly."""
    return -(-width // max(1, -(-width // most)))


def tiles_a_task(count: int, panels: int, tiles: int, tasks: int) -> int:
    """Tiles of a task: ``tiles`` of the ``count`` there are at most, and tasks enough, of all ``panels``."""
    pieces = max(1, tasks // panels, -(-count // tiles))
    return max(1, -(-count // pieces))


def busiest(count: int, panels: int, tiles: int, tasks: int, split: str, cores: int) -> float:
    """Tiles of the thread that has most of them, in times of an equal share. Threads get runs of neighbouring tasks.

    What a task costs by itself counts as a quarter of a tile.
    """
    per_task = tiles_a_task(count, panels, tiles, tasks)
    pieces = -(-count // per_task)
    steps = pieces * panels
    each = -(-steps // cores)
    if each >= _MANY:
        return 1.0 + _TASK / per_task
    last, most = count - (pieces - 1) * per_task, 0.0
    for first in range(0, steps, each):
        run = range(first, min(steps, first + each))
        ends = sum((t // panels if split == "pixels" else t % pieces) == pieces - 1 for t in run)
        most = max(most, (len(run) - ends) * per_task + ends * last + _TASK * len(run))
    return most * cores / (count * panels)


def even_tiles(count: int, panels: int, tasks: int, split: str, cores: int) -> int:
    """Tiles of a task by which threads have equal shares; the usual number unless another one is better by 3%."""
    shares = {n: busiest(count, panels, n, tasks, split, cores) for n in (USUAL_TILES, *range(1, 2 * USUAL_TILES + 1))}
    best = min(shares, key=lambda n: (shares[n], -n))
    return best if shares[best] < 0.97 * shares[USUAL_TILES] else USUAL_TILES


def winograd_shares(form: ConvForm, t: Target) -> tuple[tuple[int, int, int], ...]:
    """(squares of a register tile, lines of squares of a task, groups of panels) for Winograd's kernel, the best ones first.

    A task transforms its lines and multiplies them by a group of panels: more groups make more tasks, each of which
    transforms its lines anew. The unit of the costs is one multiply-add of a vector; the other figures are rough.
    """
    u = form.transformed
    assert u is not None
    panels, _, channels, nr = (int(d) for d in u.shape)
    n, height, width, _ = (int(d) for d in form.node.result.shape)
    all_lines, across = n * -(-height // 2), -(-width // 2)
    lanes = max(1, t.lanes(4))
    vectors = max(1, nr // lanes)
    most = max(1, min(16, (t.vector_registers - 2 - vectors) // vectors))

    def cost(share: tuple[int, int, int]) -> float:
        rows, lines, groups = share
        squares, each = lines * across, -(-panels // groups)
        products = 16 * each * channels * -(-squares // rows) * (rows * vectors + 2)
        changes = squares * (50 * -(-channels // lanes) + 50 * each * vectors)
        weights = 64 * each * channels * nr  # bytes
        far = 64 * squares * (channels + nr) + weights > t.cache[1]  # what it reads again and again does not stay in the cache
        turns = -(-(-(-all_lines // lines) * groups) // t.cores)
        return turns * (products + changes + weights / (8 if far else 32))

    shares = [(r, k, g) for r in range(1, most + 1) for k in range(1, all_lines + 1) for g in range(1, panels + 1) if panels % g == 0]
    return tuple(sorted(shares, key=lambda s: (cost(s), s))[:6])
