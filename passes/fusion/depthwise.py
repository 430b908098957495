"""g(depthwise(pad(f(conv(x, w)))))  =>  one region of kind ``conv-depthwise``

Why: an expansion makes an image of many channels from one of few, and the depthwise convolution behind it reads that once: written
and read again it is the largest traffic of a mobile network. One kernel computes some lines of it, in the nearest cache, and uses them
at once.

When: after ``fuse`` and before the weights are packed, on a CPU: two regions of kind ``conv``, the first of one group, the second a
depthwise convolution over two axes, whose image is the result of the first, possibly with zeros around it, and nothing else reads
that result. Both are f32 with their channels last and of known size. The first kernel reads its image in place; an image of at most
four channels (a photograph) may have any order, and zeros around it. Declined, with a remark: channels that do not fill vectors; an
image between the two that is no more than a quarter of the second-level caches, where it stays; sums of more than 64 products where
the target has AMX tiles for them, which this kernel does not use. The bounds are measured; on two cores of a Granite Rapids, both
kernels and the one, us: 112x112x16 to 96 channels, strides of 2: 334 and 201; 56x56x24 to 144: 171 and 121, with strides of 2 118 and
101; 28x28x32 to 192, which is declined: 49 and 55.

Numerics: bitwise in the IR.
Reference: Alwani et al., "Fused-layer CNN accelerators", MICRO 2016.
"""

from __future__ import annotations

from math import prod

from graphopt.ir import Graph, dims, types
from graphopt.ir.graph import Node, Value, copy_nodes, is_view
from graphopt.ir.ops import op
from graphopt.ir.stage import Staged, staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.fusion.cost import ANY
from graphopt.rewrite import PassContext, erase_dead
from graphopt.target import Target

_COPIED = 4  # channels of an image that the kernel copies line by line
_LONG = 64  # products of a sum that AMX tiles take faster by more than the traffic costs


class FuseDepthwise(Pass):
    """Depthwise convolutions join the convolution before them. See the module's header.

    Args:
        always: also where the cost model declines.
    """

    name = "fuse-depthwise"
    always: bool = False

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if ctx.target is not None and ctx.target.kind != "cpu":
            return False
        staged, changed, epoch = staged_values(g), False, 0
        epochs: dict[Node, int] = {}  # calls that mutate before a node
        for second in g.nodes():
            epoch += second.attrs.get("effect") == "mutates"
            epochs[second] = epoch
            pair = _before(second)
            if pair is None:
                continue
            first, place = pair
            reason = "a call that mutates stands between" if epochs.get(first) != epoch else None
            reason = reason or _unfit(first, second, staged) or (None if self.always else _declined(first, ctx.target or ANY))
            if reason is not None:
                ctx.missed(self.name, f"the depthwise convolution stays apart from the one before it: {reason}", second)
                continue
            if (number := ctx.fuel.take()) is None:
                continue
            ctx.passed(self.name, f"one kernel with the convolution before it; {first.result.type} is not written", second, number)
            _merge(g, first, second, place)
            changed = True
        return changed


def _conv(region: Node) -> Node | None:
    """The convolution of a region of kind ``conv`` with its channels last."""
    if region.op.name != "fusion" or region.attrs["kind"] != "conv" or region.body is None:
        return None
    conv = next(n for n in region.body.nodes() if n.op.name == "conv")
    return conv if conv.attrs["channels_last"] else None


def _image(conv: Node) -> Value:
    """What a convolution reads, without zeros around it."""
    pad = conv.operands[0].defined_by("pad")
    if pad is None or pad.attrs["value"] != 0.0:
        return conv.operands[0]
    sides = [pad.attrs[side] for side in ("low", "high")]
    plain = all(isinstance(n, int) for side in sides for n in side) and not any(n for side in sides for n in (side[0], side[-1]))
    return pad.operands[0] if plain else conv.operands[0]


def _zeros(conv: Node) -> list[tuple[int, ...]]:
    """Zeros in front of each spatial axis, and behind."""
    own = conv.attrs["padding"]
    if _image(conv) is conv.operands[0]:
        return [own, own]
    pad = conv.operands[0].producer
    assert pad is not None
    return [tuple(p + q for p, q in zip(own, pad.attrs[side][1:-1], strict=True)) for side in ("low", "high")]


def _before(second: Node) -> tuple[Node, Value] | None:
    """The region of a convolution that only a depthwise convolution reads, and the input of the latter's body that it is."""
    conv = _conv(second)
    if conv is None or conv.operands[1].shape[-2] != 1 or conv.operands[1].shape[-1] != conv.attrs["groups"] or conv.attrs["groups"] == 1:
        return None
    place = _image(conv)
    if not place.is_input or len(place.uses) != 1 or (conv.operands[0] is not place and len(conv.operands[0].uses) != 1):
        return None
    first = second.operands[place.index].producer
    return (first, place) if first is not None and _conv(first) is not None and first.result.has_one_use else None


def _unfit(first: Node, second: Node, staged: Staged) -> str | None:
    """Why the kernel does not take two regions."""
    before, after = _conv(first), _conv(second)
    assert before is not None and after is not None and first.body is not None
    values = [v for n in (before, after) for v in (*n.operands, n.result)]
    if any(v.dtype != types.f32 or not dims.is_static(v.shape) for v in values) or any(v.type.numel == 0 for v in values):
        return "not f32 of known sizes"
    if before.attrs["groups"] != 1 or after.operands[1].type.rank != 4:
        return "not a convolution of one group and one over two axes"
    if not dims.same_shape(first.result.shape, before.result.shape):
        return "what lies between has another shape than the convolution's result"
    window = [(k - 1) * d for k, d in zip(after.operands[1].shape[:2], after.attrs["dilation"], strict=True)]  # type: ignore[operator]
    if any(p > reach for pads in _zeros(after) for p, reach in zip(pads, window, strict=True)):
        return "windows of the second one lie beside the image"
    weight = _origin(before.operands[1])
    if not weight.is_input or first.operands[weight.index] not in staged:
        return "the weight of the first one is computed at each call"
    x = _image(before)
    whole = x is before.operands[0] and x.is_input and x.type.strides is None and not any(before.attrs["padding"])
    if not whole and int(x.shape[-1]) > _COPIED:
        return "the image of the first one would have to be copied"
    return None


def _origin(v: Value) -> Value:
    while v.producer is not None and is_view(v.producer):
        v = v.producer.operands[0]
    return v


def _declined(first: Node, t: Target) -> str | None:
    """Why one kernel would not be faster."""
    conv = _conv(first)
    assert conv is not None
    *kernel, channels, filters = (int(d) for d in conv.operands[1].shape)
    pixels = prod(int(d) for d in conv.result.shape[:-1])
    if filters % t.lanes(4):
        return f"{filters} channels do not fill vectors"
    if 4 * pixels * filters <= t.cache[1] * t.cores // 4:
        return "what lies between stays in the cache"
    if prod(kernel) * channels > _LONG and t.conv_in_thirds(prod(kernel), channels, filters, pixels):
        return "its sums are long, and AMX tiles take them"
    return None


def _merge(g: Graph, first: Node, second: Node, place: Value) -> None:
    """Put one region in the place of the second one; the first one, which nothing reads then, goes."""
    body, operands = Graph("body"), dict[Value, Value]()
    mapping: dict[Value, Value] = {}
    assert first.body is not None and second.body is not None
    for region in (first, second):
        assert region.body is not None
        for v, operand in zip(region.body.inputs, region.operands, strict=True):
            if v is place:
                mapping[v] = mapping[first.body.outputs[0]]
                continue
            if operand not in operands:
                operands[operand] = body.add_input(v.type, v.hint)
            mapping[v] = operands[operand]
        copy_nodes(region.body.nodes(), mapping, body)
    body.set_outputs([mapping[second.body.outputs[0]]])
    new = g.create(op("fusion"), list(operands), {"kind": "conv-depthwise"}, before=second, loc=second.loc, body=body)
    g.replace(second.result, new.result)
    erase_dead(g, second)
