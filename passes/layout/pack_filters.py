"""conv(x, w[*K, C, O])  =>  conv(x, unpack(pack(w))),  pack(w)[j, k, i] = w[k, j * nr + i],  k over taps and channels

Why: a convolution kernel reads ``nr`` output channels for one tap and one input channel at a time. Packed, that is one
straight stream. ``pack`` depends on the weight alone: it is computed once, at the first call, and again when the weight
changes.

When: after ``fuse``, for a region of kind ``conv`` or ``conv-depthwise`` whose weight is a staged (weight-only) f32 value behind views. The
groups of a grouped convolution are packed one after the other. A depthwise convolution, and one whose vectors hold the filters of
several groups (``Target.conv_by_groups``), reads its weight as it is, with the channels last: only the views in front of it move out of the
region. ``nr`` is 32, two AMX tiles, where the target sums this
convolution from thirds (``Target.conv_in_thirds``). Few filters are not put into panels, of which they would fill a small part: where
the kernel reads them with vectors along the channels (``Target.conv_along_channels``), they are laid out one after the other, ``wp[o, k] =
w[k, o]``, by a transpose. Weights of integers are packed in fours
(:mod:`~graphopt.passes.layout.filter_fours`). An operand that is no weight is left in silence; declined with a remark are
other dtypes.

The packing stands outside of the region; the region's body unpacks, so that its meaning stays in the IR::

    wp = reshape(transpose(reshape(pad(reshape(w, [K, g, O / g])), [K, g, J, nr]), (1, 2, 0, 3)), [g * J, K, nr])
    w  = reshape(slice(reshape(transpose(reshape(wp, [g, J, K, nr]), (2, 0, 1, 3)), [K, g, J * nr]), axis=2, stop=O / g), ..)

Numerics: bitwise.
Reference: Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures", SC 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

from graphopt.errors import UsageError
from graphopt.ir import Builder, Graph, dims, types
from graphopt.ir.graph import Node, Value, copy_nodes, is_view
from graphopt.ir.stage import Staged, staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.layout import filter_fours
from graphopt.passes.layout.pack_weights import COLUMNS
from graphopt.passes.shared import reread
from graphopt.rewrite import PassContext, Reject, Rewriter
from graphopt.target import Target

_PACKED = ["reshape", "slice", "reshape", "transpose", "reshape"]  # how unpacking ends and begins
_PACKED_FOURS = ["reshape", "slice", "reshape", "slice", "slice", "reshape", "transpose"]


class PackFilters(Pass):
    """Pack the weights of convolution regions. See the module's header.

    Args:
        width: output channels of a panel; None asks the target.
    """

    name = "pack-filters"
    width: int | None = None

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if self.width is not None and self.width < 1:
            raise UsageError(f"pack-filters: width must be positive, got {self.width}")
        sites = [n for n in g.nodes() if n.op.name == "fusion" and n.attrs["kind"] in ("conv", "conv-depthwise")]
        if not sites or (self.width is None and (ctx.target is None or ctx.target.kind != "cpu")):
            return False
        staged, packed = staged_values(g), dict[tuple[object, ...], Value]()
        changed = False
        for fusion in sites:
            changed |= self._pack(g, fusion, staged, packed, ctx)
        return changed

    def _pack(self, g: Graph, fusion: Node, staged: Staged, packed: dict[tuple[object, ...], Value], ctx: PassContext) -> bool:
        """Pack the weights of a region's convolutions, one after the other."""
        assert fusion.body is not None
        changed = False
        for place in range(sum(n.op.name == "conv" for n in fusion.body.nodes())):
            found = weight_of(fusion, staged, place)
            if isinstance(found, Reject):
                if found.reason:
                    ctx.missed(self.name, f"the weight is not packed: {found.reason}", fusion)
                continue
            conv, chain = found
            few = self.width is None and along_channels(fusion, conv, ctx.target)
            as_it_is = _depthwise(conv) or (self.width is None and by_groups(fusion, conv, ctx.target))
            if as_it_is and not chain:
                continue
            if few and [(n.op.name, n.attrs.get("perm")) for n in chain] == [("transpose", (*range(1, len(conv.operands[1].shape)), 0))]:
                continue  # it lies filter by filter
            if (number := ctx.fuel.take()) is None:
                continue
            groups, w = int(conv.attrs["groups"]), conv.operands[1]
            source = fusion.operands[origin(w).index]
            filters = int(w.shape[-1]) // groups
            form: tuple[int | str, ...]
            if conv.attrs["acc"] == types.i32:
                form = filter_fours.runs_of(conv)
                packing = partial(filter_fours.pack, lines=form[0], run=form[1])
                unpacked = partial(filter_fours.unpack, lines=form[0], run=form[1], shape=w.shape)  # type: ignore[arg-type]
            elif as_it_is:
                form, packing, unpacked = (), (lambda b, w: w), (lambda b, w: w)  # type: ignore[assignment]
            elif few:
                form, packing, unpacked = ("by filter",), by_filter, by_channel  # type: ignore[assignment]
            else:
                form = (groups, self.width or _width(fusion, conv, filters, ctx.target))
                packing = partial(pack, groups=groups, nr=form[1])
                unpacked = partial(unpack, groups=groups, shape=w.shape)  # type: ignore[arg-type]
            key = (source, *form, *((n.op.name, *n.attrs.values()) for n in chain))
            if key not in packed:
                rw = Rewriter(g, fusion)
                mapping = {origin(w): source}
                copy_nodes(chain, mapping, g, fusion)
                packed[key] = packing(rw, mapping[w])
            ctx.passed(self.name, f"weight {source!r} becomes {packed[key].type}", fusion, number)
            fusion = reread(g, fusion, w, [packed[key]], partial(_from_one, unpacked), by=conv)
            changed = True
        return changed


def _width(fusion: Node, conv: Node, filters: int, t: Target) -> int:
    return COLUMNS if fusion.attrs["kind"] == "conv" and in_thirds(conv, t) else t.panel_width(filters, types.f32.itemsize)


def in_thirds(conv: Node, t: Target) -> bool:
    """Whether a convolution with its channels last is one for AMX tiles."""
    x, w = conv.operands
    static = dims.is_static(x.shape) and dims.is_static(conv.results[0].shape)
    if conv.attrs["groups"] != 1 or w.dtype != types.f32 or x.dtype != types.f32 or not static:
        return False
    *kernel, channels, filters = (int(d) for d in w.shape)
    return t.conv_in_thirds(prod(kernel), channels, filters, prod(int(d) for d in conv.results[0].shape[:-1]))


def along_channels(fusion: Node, conv: Node, t: Target) -> bool:
    """Whether a convolution with its channels last has few filters, and its kernel reads the weight filter by filter."""
    if fusion.attrs["kind"] != "conv" or conv.attrs["groups"] != 1 or conv.operands[1].dtype != types.f32 or in_thirds(conv, t):
        return False
    *kernel, channels, filters = (int(d) for d in conv.operands[1].shape)
    return t.conv_along_channels(prod(kernel), channels, filters)


def by_groups(fusion: Node, conv: Node, t: Target) -> bool:
    """Whether vectors of a convolution hold the filters of several groups, so that its kernel reads the weight as it is."""
    if fusion.attrs["kind"] != "conv" or conv.operands[1].dtype != types.f32:
        return False
    channels, filters = (int(d) for d in conv.operands[1].shape[-2:])
    return t.conv_by_groups(conv.attrs["groups"], channels, filters // conv.attrs["groups"])


def _depthwise(conv: Node) -> bool:
    w, groups = conv.operands[1], conv.attrs["groups"]
    return bool(groups > 1 and w.shape[-2] == 1 and w.shape[-1] == groups)


def pack(b: Builder, w: Value, groups: int, nr: int) -> Value:
    """``[*K, C, O]`` to ``[groups * ceil(O / groups / nr), K * C, nr]``, zeros behind the last channel of a group."""
    depth, filters = prod(int(d) for d in w.shape[:-1]), int(w.shape[-1]) // groups
    panels = -(-filters // nr)
    w = b.reshape(w, shape=(depth, groups, filters))
    if panels * nr != filters:
        w = b.pad(w, low=(0, 0, 0), high=(0, 0, panels * nr - filters), value=0.0)
    w = b.transpose(b.reshape(w, shape=(depth, groups, panels, nr)), perm=(1, 2, 0, 3))
    return b.reshape(w, shape=(groups * panels, depth, nr))


def unpack(b: Builder, wp: Value, groups: int, shape: tuple[int, ...]) -> Value:
    """The inverse of :func:`pack`; always the same five nodes."""
    blocks, depth, nr = (int(d) for d in wp.shape)
    panels = blocks // groups
    v = b.create("reshape", [wp], {"shape": (groups, panels, depth, nr)})
    v = b.create("transpose", [v], {"perm": (2, 0, 1, 3)})
    v = b.create("reshape", [v], {"shape": (depth, groups, panels * nr)})
    v = b.create("slice", [v], {"axis": 2, "stop": shape[-1] // groups})
    return b.create("reshape", [v], {"shape": shape})  # type: ignore[no-any-return]


def by_filter(b: Builder, w: Value) -> Value:
    """``[*K, C, O]`` to ``[O, *K, C]``."""
    rank = w.type.rank
    return b.transpose(w, perm=(rank - 1, *range(rank - 1)))


def by_channel(b: Builder, w: Value) -> Value:
    """The inverse of :func:`by_filter`; always one node."""
    return b.create("transpose", [w], {"perm": (*range(1, w.type.rank), 0)})  # type: ignore[no-any-return]


def _from_one(unpacked: Callable[[Builder, Value], Value], b: Builder, given: Sequence[Value]) -> Value:
    return unpacked(b, given[0])


def origin(v: Value) -> Value:
    """The input of the body that a value is a view of, or the value that is no view."""
    while v.producer is not None and is_view(v.producer):
        v = v.producer.operands[0]
    return v


def weight_of(fusion: Node, staged: Staged, place: int = 0) -> tuple[Node, list[Node]] | Reject:
    """A convolution of a region, the ``place``-th, and the views between the body's input and its weight, the input's first."""
    assert fusion.body is not None
    conv = [n for n in fusion.body.nodes() if n.op.name == "conv"][place]
    w = conv.operands[1]
    start = origin(w)
    if not start.is_input or fusion.operands[start.index] not in staged:
        return Reject("")
    chain: list[Node] = []
    v = w
    while v.producer is not None:
        chain.append(v.producer)
        v = v.producer.operands[0]
    names = [n.op.name for n in chain]
    if names in (_PACKED, _PACKED_FOURS):
        return Reject("")
    if conv.attrs["acc"] == types.i32:
        return (conv, chain[::-1]) if conv.attrs["groups"] == 1 else Reject(f"integers in {conv.attrs['groups']} groups", fusion)
    if w.dtype != types.f32:
        return Reject(f"weights of dtype {w.dtype} are not packed, only f32", fusion)
    return conv, chain[::-1]
