"""What an op is: name, arity, attributes, traits, type inference, reference evaluation, and expansion.

The op table is filled by the pages of :mod:`graphopt.ir.opset`, one page a family. An op's meaning is its ``evaluate``
(one torch call, any precision) or, for a composite, its ``expand`` into simpler ops; the two are tested to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy
import torch

from graphopt.errors import TypeInferenceError, UsageError, nearest
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.types import DType, TensorType

if TYPE_CHECKING:
    from graphopt.ir.builder import Builder
    from graphopt.ir.graph import Node, Value


@dataclass(frozen=True)
class Ref:
    """A place in the argument template of an ``aten`` node that takes the node's ``index``-th operand. Text: ``$0``."""

    index: int


@dataclass(frozen=True)
class TorchConst:
    """A torch enum-like argument of an ``aten`` node: memory format, layout or device. Text: ``@strided``."""

    name: str


Attrs: TypeAlias = Mapping[str, Any]
"""Attribute values are numbers, strings, None, DType, sizes, Ref, TorchConst, and tuples of these."""


class Trait(Enum):
    """What passes may rely on."""

    POINTWISE = auto()  # each output element depends on the matching (broadcast) input elements only
    COMMUTATIVE = auto()  # the first two operands may be exchanged
    ASSOCIATIVE = auto()  # up to rounding for floats
    IDEMPOTENT = auto()  # f(f(x)) == f(x)
    INVOLUTION = auto()  # f(f(x)) == x
    VIEW = auto()  # moves elements, computes nothing
    REDUCTION = auto()  # reduces the attribute ``axes``
    CONTRACTION = auto()  # sums products: matmul, conv
    COMPOSITE = auto()  # has an expansion
    CREATION = auto()  # no operands
    BOOLEAN = auto()  # yields b1
    FLOAT_ONLY = auto()  # operands must be float or complex
    OPAQUE = auto()  # meaning lies outside of the IR (library call)


class EvalContext:
    """What an op's reference evaluation may ask: sizes bound to numbers, and dtypes at the wanted precision.

    Args:
        bindings: value of every symbol.
        wide: evaluate floats as f64 and complex numbers as c128 whatever the graph says.
        device: where created tensors live.
    """

    def __init__(self, bindings: Mapping[str, int], wide: bool = False, device: torch.device | str = "cpu") -> None:
        self.bindings, self.wide, self.device = bindings, wide, device

    def dim(self, d: Dim) -> int:
        return dims.evaluate(d, self.bindings)

    def shape(self, shape: Sequence[Dim]) -> list[int]:
        return [self.dim(d) for d in shape]

    def dtype(self, d: DType) -> torch.dtype:
        if self.wide and d.is_float:
            return torch.float64
        if self.wide and d.is_complex:
            return torch.complex128
        return d.torch


Infer = Callable[[Sequence[TensorType], Attrs], list[TensorType]]
Evaluate = Callable[[Sequence[torch.Tensor], Attrs, EvalContext], Any]
Expand = Callable[["Builder", "Node"], "Value | tuple[Value, ...]"]


@dataclass(frozen=True)
class OpDef:
    """One op of the IR.

    Attributes:
        name: as in the text form.
        arity: least and greatest number of operands (``None``: no limit).
        attrs: attribute name -> default; ``REQUIRED`` for one without default.
        traits: what passes may rely on.
        infer: operand types and attributes -> result types; ``None`` if the types are declared (opaque ops).
        evaluate: reference semantics on torch tensors; ``None`` for a composite without a torch call of its own.
        expand: for composites, the definition by simpler ops.
        doc: the equation, one line.
    """

    name: str
    arity: tuple[int, int | None]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    traits: frozenset[Trait] = frozenset()
    infer: Infer | None = None
    evaluate: Evaluate | None = None
    expand: Expand | None = None
    doc: str = ""

    def has(self, *traits: Trait) -> bool:
        """Whether the op has any of the traits."""
        return any(t in self.traits for t in traits)

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def complete(self, attrs: Attrs) -> dict[str, Any]:
        """The attributes with defaults filled in, in the op's own order. Raises TypeInferenceError on a wrong name."""
        for name in attrs:
            if name not in self.attrs:
                raise TypeInferenceError(f"{self.name} has no attribute {name!r}{nearest(name, self.attrs)}")
        out = {}
        for name, default in self.attrs.items():
            value = attrs.get(name, default)
            if value is REQUIRED:
                raise TypeInferenceError(f"{self.name} needs the attribute {name!r}")
            out[name] = freeze(value)
        return out


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


def freeze(value: Any) -> Any:
    """Lists become tuples, whole sympy numbers ints; everything else stays."""
    if isinstance(value, list | tuple):
        return tuple(freeze(v) for v in value)
    if isinstance(value, sympy.Expr):
        return dims.simplify(value)
    return value


OPS: dict[str, OpDef] = {}


def define(name: str, arity: int | tuple[int, int | None], *, traits: Sequence[Trait] = (), attrs: Attrs | None = None,
           infer: Infer | None = None, evaluate: Evaluate | None = None, expand: Expand | None = None,
           doc: str = "") -> OpDef:  # fmt: skip
    """Add an op to the table. A name may be defined once."""
    if name in OPS:
        raise UsageError(f"op {name!r} is defined twice")
    span = (arity, arity) if isinstance(arity, int) else arity
    all_traits = frozenset(traits) | ({Trait.COMPOSITE} if expand else frozenset())
    OPS[name] = OpDef(name, span, dict(attrs or {}), all_traits, infer, evaluate, expand, doc)
    return OPS[name]


def op(name: str) -> OpDef:
    """Look an op up. Raises UsageError with the nearest name."""
    try:
        return OPS[name]
    except KeyError:
        raise UsageError(f"there is no op {name!r}{nearest(name, OPS)}") from None


# --- inference helpers that the families share -------------------------------------------------------------------------


def broadcast_shapes(shapes: Sequence[dims.Shape]) -> dims.Shape:
    """NumPy broadcasting over symbolic sizes. A size that may or may not be 1 does not broadcast: it must be equal."""
    rank = max((len(s) for s in shapes), default=0)
    out: list[Dim] = []
    for i in range(rank):
        size: Dim = 1
        for s in shapes:
            j = i - rank + len(s)
            if j < 0 or s[j] == 1:
                continue
            if size == 1:
                size = s[j]
            elif not dims.same(size, s[j]):
                text = ", ".join(str(tuple(map(dims.format_dim, s))) for s in shapes)
                raise TypeInferenceError(f"shapes {text} do not broadcast")
        out.append(size)
    return tuple(out)


def same_dtype(types: Sequence[TensorType], name: str) -> DType:
    """The one dtype of all operands."""
    dtype = types[0].dtype
    for t in types[1:]:
        if t.dtype != dtype:
            raise TypeInferenceError(f"{name}: operands of dtype {dtype} and {t.dtype}; insert a cast")
    return dtype


def normalize_axis(axis: int, rank: int, name: str) -> int:
    """A nonnegative axis; raises TypeInferenceError when out of range."""
    if not -max(rank, 1) <= axis < max(rank, 1):
        raise TypeInferenceError(f"{name}: axis {axis} is out of range for rank {rank}")
    return axis % rank if rank else 0
