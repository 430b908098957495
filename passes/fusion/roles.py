"""What each op may be within a fusion region."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from graphopt.ir import dims
from graphopt.ir.dims import Shape
from graphopt.ir.graph import Node, Value
from graphopt.ir.ops import Trait
from graphopt.ir.opset.quantize import LARGEST
from graphopt.ir.opset.window import WINDOWS
from graphopt.ir.types import DType


class Role(Enum):
    """The part that an op can play."""

    POINTWISE = "pointwise"
    VIEW = "view"  # moves elements by an index map that costs nothing
    MOVER = "mover"  # moves elements and has work to do: concat, pad, take, gather, unpack_bits
    CREATION = "creation"  # constant, iota
    ANCHOR = "anchor"  # a reduction, scan, row op, matmul, convolution or update by index: decides the kind of its region
    OTHER = "other"  # never in a region


MOVERS = ("concat", "pad", "take", "gather", "unpack_bits")
PRODUCTS = ("matmul", "conv", *WINDOWS)  # read an element for many results; each has a kind of region of its name
ROW_OPS = ("softmax", "log_softmax", "layer_norm", "rms_norm")
ROW_REDUCTIONS = ("sum", "mean", "max", "min", "var")
ARG_REDUCTIONS = ("argmax", "argmin")
SCANS = ("cumsum", "cumprod", "cummax", "cummin", "argcummax", "argcummin", "logcumsumexp")
SCATTERS = ("put", "scatter")

TRAINING = ("attention_forward", "attention_backward")  # several results: a region of their own, with views of what they read

_ANCHORS = ("attention", *TRAINING, *ARG_REDUCTIONS, *SCANS, *SCATTERS)

def fusable_dtype(dtype: DType) -> bool:
    """Complex numbers, 8-bit floats (unless they are cast or dequantized) and packed sub-byte types stay outside of regions."""
    return not dtype.is_complex and dtype.bits >= 8 and not (dtype.is_float and dtype.bits == 8)


def role(node: Node) -> Role:
    """The part that a node can play; nodes of unfusable dtypes are OTHER."""
    op = node.op
    if op.has(Trait.POINTWISE):
        found = Role.POINTWISE
    elif op.has(Trait.VIEW):
        found = Role.VIEW
    elif op.has(Trait.CREATION):
        found = Role.CREATION
    elif op.name in MOVERS:
        found = Role.MOVER
    elif _is_product(node) or op.has(Trait.REDUCTION) or op.name in _ANCHORS or (op.name in ROW_OPS and rows_of(node)):
        found = Role.ANCHOR
    else:
        return Role.OTHER
    if op.name == "var" and rows_of(node) is None:
        return Role.OTHER
    f8: tuple[Value, ...] = (*node.operands, *node.results) if found is Role.VIEW or op.name == "cast" else ()
    if op.name == "dequantize":
        f8 = node.operands[:1]
    elif op.name == "quantize":
        f8 = node.results
    fits = all(fusable_dtype(v.dtype) or (v in f8 and v.dtype in LARGEST) for v in (*node.operands, *node.results))
    return found if fits else Role.OTHER


def _is_product(node: Node) -> bool:
    """A matmul, a window over an image, or a convolution of known size in the layout that kernels take."""
    if node.op.name == "conv":
        x, w = node.operands
        return bool(node.attrs["channels_last"]) and dims.is_static(w.shape) and isinstance(x.shape[-1], int)
    return node.op.name in PRODUCTS


def is_scalar(shape: Shape) -> bool:
    """Whether a value of this shape is one number."""
    return all(d == 1 for d in shape)


@dataclass(frozen=True)
class Rows:
    """The iteration space of a rowwise region: ``shape`` is rows and columns, the last ``columns`` axes are one row.

    With ``behind``, so many axes stand behind those: a softmax over the channels of an image.
    """

    shape: Shape
    columns: int
    behind: int = 0

    @property
    def reduced(self) -> Shape:
        """One element a row."""
        end = len(self.shape) - self.behind
        return (*self.shape[: end - self.columns], *self.shape[end:])

    @property
    def kept(self) -> Shape:
        """One element a row, with axes of size 1 in place of the columns."""
        end = len(self.shape) - self.behind
        return (*self.shape[: end - self.columns], *[1] * self.columns, *self.shape[end:])

    def form(self, shape: Shape) -> str | None:
        """``full``, ``kept``, ``reduced``, or ``scalar`` (one element in all); None for a shape that is none of them."""
        for name, wanted in (("full", self.shape), ("kept", self.kept), ("reduced", self.reduced)):
            if dims.same_shape(shape, wanted):
                return name
        return "scalar" if is_scalar(shape) else None

    def same(self, other: Rows) -> bool:
        return (self.columns, self.behind) == (other.columns, other.behind) and dims.same_shape(self.shape, other.shape)


_SIDE_BY_SIDE = 16  # neighbouring columns that fill the widest vector of f32
_LONG, _FEW = 1 << 14, 1 << 10  # columns of which a strip fills a cache, and that are not strips enough for many cores


def _softmax_rows(shape: Shape, axis: int) -> Rows | None:
    """Rows along any axis: those that are not trailing must lie side by side, and not be few and long."""
    axis %= len(shape)
    behind = len(shape) - 1 - axis
    if not behind:
        return Rows(shape, 1)
    length, beside, count = shape[axis], dims.numel(shape[len(shape) - behind :]), dims.numel([*shape[:axis], *shape[axis + 1 :]])
    narrow = isinstance(beside, int) and beside < _SIDE_BY_SIDE
    long = isinstance(length, int) and length >= _LONG and isinstance(count, int) and count < _FEW
    return None if narrow or long else Rows(shape, 1, behind)


def rows_of(node: Node) -> Rows | None:
    """The rows that a node works on: row ops and reductions over trailing axes, softmax over any; None for anything else."""
    if not node.operands:
        return None
    shape, name = node.operands[0].shape, node.op.name
    if name in ("softmax", "log_softmax"):
        return _softmax_rows(shape, node.attrs["axis"]) if shape else None
    if name in ("layer_norm", "rms_norm"):
        return Rows(shape, node.attrs["axes"])
    if name in ROW_REDUCTIONS and shape:
        axes = sorted(a % len(shape) for a in node.attrs["axes"])
        if axes and axes == list(range(len(shape) - len(axes), len(shape))):
            return Rows(shape, len(axes))
    return None
