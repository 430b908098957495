"""What a region of two convolutions looks like to its kernel: one of all channels, and a depthwise one that reads its result."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from graphopt.backends.forms.convform import ConvForm, packed_weight
from graphopt.backends.forms.support import materialized
from graphopt.ir import dims, types
from graphopt.ir.graph import Graph, Node
from graphopt.target import Target

KIND = "conv-depthwise"  # of the region
MOST_COPIED = 4  # channels of an image that is copied, channel by channel
_TASK = 4000.0  # what a task costs by itself, in cycles


@dataclass(frozen=True)
class ConvPair:
    """``depthwise(f(conv(x)))``: what lies between is of the first convolution's shape, and only the second one reads it."""

    first: ConvForm
    second: ConvForm

    @property
    def reach(self) -> int:
        """Lines of the first result, but one, that a line of the second one reads."""
        return (self.second.kernel[0] - 1) * self.second.dilation[0]

    def columns_of(self, strip: int) -> int:
        """Pixels between the two, zeros around the image included, that so many neighbouring pixels of the result read."""
        return (strip - 1) * self.second.stride[1] + (self.second.kernel[1] - 1) * self.second.dilation[1] + 1

    def least_columns(self, strip: int) -> int:
        """Those of them that are inside of the image, in the strip that has fewest."""
        across, width = int(self.second.node.result.shape[2]), int(self.first.node.result.shape[2])
        found = []
        for start in range(0, across, strip):
            edge = min(start, across - strip) * self.second.stride[1] - self.second.low[1]
            found.append(min(edge + self.columns_of(strip), width) - max(edge, 0))
        return min(found)


def pair_of(graph: Graph) -> ConvPair | str:
    """The two convolutions of a region, or why the region is none that the kernel takes."""
    nodes = materialized(graph)
    if len(nodes) != 2 or any(n.name != "conv" or not n.attrs["channels_last"] for n in nodes):
        return "not two convolutions with their channels last"
    if (reason := unfit(*nodes)) is not None:
        return reason
    pair = ConvPair(ConvForm(nodes[0], packed_weight(nodes[0].operands[1])), ConvForm(nodes[1], None))
    if pair.first.packed is None or pair.first.filters % int(pair.first.packed.shape[-1]):
        return "the weight of the first convolution is not packed in whole panels"
    if any(p > (k - 1) * d for pads in (pair.second.low, pair.second.high)
           for p, k, d in zip(pads, pair.second.kernel, pair.second.dilation, strict=True)):  # fmt: skip
        return "windows of the second convolution lie beside the image"
    for v in graph.outputs:
        if not dims.same_shape(v.shape, nodes[1].result.shape):
            return f"the output {v.type} has not the convolution's shape"
    return pair


def unfit(conv: Node, depthwise: Node) -> str | None:
    """Why a convolution and a depthwise one that reads its result, both with their channels last, are not for one kernel."""
    first, second = ConvForm(conv, None), ConvForm(depthwise, None)
    values = [v for n in (conv, depthwise) for v in (*n.operands, n.result)]
    if any(v.dtype != types.f32 or not dims.is_static(v.shape) for v in values):
        return "not f32 of known sizes"
    if not second.depthwise or len(second.kernel) != 2:
        return "the second convolution is not depthwise over two axes"
    if first.groups != 1:
        return "the first convolution has groups"
    if not dims.same_shape(second.x.shape, conv.result.shape):
        return "the second convolution reads something of another shape than the first one's result"
    if any(d == 0 for v in values for d in v.shape):
        return "a convolution without elements"
    if not first.plain and first.inner > MOST_COPIED:
        return "the image of the first convolution would be copied"
    return None


def strips(pair: ConvPair, columns: int, t: Target) -> tuple[int, ...]:
    """Pixels of a strip, the best choice first: the ring for a panel of ``columns`` channels takes half of the first-level cache."""
    across = int(pair.second.node.result.shape[2])
    room = t.cache[0] // 2 // (4 * columns * (pair.reach + 1))
    counts = [n for n in range(1, across + 1) if pair.least_columns(-(-across // n)) > 0 and (n == 1 or across // n >= 4)]
    best = next((n for n in counts if pair.columns_of(-(-across // n)) <= room), counts[-1])
    return tuple(dict.fromkeys(-(-across // n) for n in (best, *counts)))


def line_pixels(strip: int, t: Target) -> tuple[int, ...]:
    """Pixels of a tile of the depthwise convolution, the best number first: a sum each, beside a line of its window's weights."""
    most = min(strip, 14 if t.vector_registers == 32 else 6)
    return tuple(sorted(range(1, most + 1), key=lambda p: (-(-strip // p) * (p + 1), -p)))


def line_rows(width: int, vectors: int, t: Target) -> tuple[int, ...]:
    """Numbers of pixels of a line that a tile can have beside so many vectors of channels, the best one first."""
    most = max(1, min(16, width, (t.vector_registers - 2 - vectors) // vectors))
    return tuple(sorted(range(1, most + 1), key=lambda r: (-(-width // r) * (r * vectors + 2), -r)))


def shares(pair: ConvPair, columns: int, t: Target) -> tuple[tuple[int, int], ...]:
    """(lines of the result, panels of channels) of a task, the best ones first.

    The lines between the two that two tasks need are computed by both: few long tasks compute few of them twice, but must be even.
    """
    n, height, width, filters = (int(d) for d in pair.second.node.result.shape)
    panels, stride = -(-filters // columns), pair.second.stride[0]
    rate = t.lanes(4) * t.pipes
    between = int(pair.first.node.result.shape[2]) * columns * (pair.first.depth + 4) / rate
    after = width * columns * (2 * prod(pair.second.kernel) + 4) / rate

    def cost(share: tuple[int, int]) -> float:
        lines, each = share
        tasks = n * -(-height // lines) * -(-panels // each)
        task = each * (between * ((lines - 1) * stride + pair.reach + 1) + after * lines) + _TASK
        return -(-tasks // t.cores) * task

    counts = dict.fromkeys(-(-height // k) for k in range(1, height + 1))
    found = [(lines, each) for lines in counts for each in dict.fromkeys(-(-panels // k) for k in range(1, panels + 1))]
    return tuple(sorted(found, key=lambda s: (cost(s), s))[:6])
