"""Inputs to check graphs with: sizes for the symbols, and tensors that respect what the graph takes for granted.

A graph is only meaningful on inputs that its guards admit: an index must lie within the axis that it indexes, a
variance is positive, a divisor is not zero. These demands are found by walking back from the ops that make them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from graphopt.bounds import INDEXED, digits, size_of
from graphopt.errors import GraphoptError
from graphopt.ir import dims
from graphopt.ir.dims import Dim, Range
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.types import DType

_POSITIVE = {"sqrt": 0, "rsqrt": 0, "log": 0, "log2": 0, "log10": 0, "log1p": 0, "batch_norm": 2}
_UNIT = ("asin", "acos", "atanh")
_DIVISIONS = ("div", "floor_div", "trunc_div", "remainder", "fmod")
_MOVES = ("reshape", "transpose", "broadcast_to", "slice", "flip", "cast", "concat", "pad")
_MONOTONE = ("cumsum", "cumprod", "cummax", "cummin", "add", "mul", "maximum", "minimum", "div", "sum", "mean", "max", "min", "prod")


_FEW = 64  # elements, of which more have to be special, or there are none of a kind
_SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e30, -1e30, 1e-40)
Draw = Literal["normal", "wide", "special", "ends"]


@dataclass
class Demand:
    """What the users of a value take for granted.

    Attributes:
        facts: any of ``positive``, ``unit`` (between -1 and 1), ``above_one``, ``nonzero``, ``table`` (looked up by index).
        below: index bounds (size, offset): ``0 <= value + offset < size``.
    """

    facts: dict[str, None] = field(default_factory=dict)
    below: list[tuple[Dim, int]] = field(default_factory=list)

    def join(self, other: Demand, without: str = "") -> None:
        self.facts.update({f: None for f in other.facts if f != without})
        self.below += [b for b in other.below if b not in self.below]


def input_demands(graph: Graph) -> list[Demand]:
    """What the graph takes for granted of each input, fusion bodies included."""
    return _demands(graph, [Demand() for _ in graph.outputs])


def _demands(graph: Graph, outputs: Sequence[Demand]) -> list[Demand]:
    wanted: dict[Value, Demand] = {}
    for v, d in zip(graph.outputs, outputs, strict=True):
        wanted.setdefault(v, Demand()).join(d)
    for node in reversed(graph):
        results = [wanted.get(r, Demand()) for r in node.results]
        inner = _demands(node.body, results) if node.body is not None else _of_node(node, results)
        for v, d in zip(node.operands, inner, strict=True):
            wanted.setdefault(v, Demand()).join(d)
    return [wanted.get(v, Demand()) for v in graph.inputs]


def _of_node(node: Node, results: Sequence[Demand]) -> list[Demand]:
    name = node.op.name
    out = [Demand() for _ in node.operands]
    if name in _POSITIVE:
        out[_POSITIVE[name]].facts["positive"] = None
    elif name in _UNIT:
        out[0].facts["unit"] = None
    elif name == "acosh":
        out[0].facts["above_one"] = None
    elif name in ("reciprocal", *_DIVISIONS):
        out[-1].facts["nonzero"] = None
    elif name == "pow":  # a negative base or, for integers, a negative exponent has no value
        for d in out if node.operands[0].dtype.is_integer else out[:1]:
            d.facts["positive"] = None
    elif name in INDEXED:
        x = node.operands[0]
        out[1].below.append((x.shape[node.attrs["axis"]], 0))
        out[0].facts["table"] = None
    elif name == "aten":
        _of_library_call(node, out)
    _pass_on(node, results[0] if results else Demand(), out)
    return out


def _of_library_call(node: Node, out: list[Demand]) -> None:
    """A library call may index by any integer operand, along any axis of the others."""
    for i, v in enumerate(node.operands):
        if v.dtype.is_integer:
            sizes = [d for w in node.operands if w is not v for d in w.shape]
            out[i].below += [(d, 0) for d in dict.fromkeys(sizes)]


def _pass_on(node: Node, result: Demand, out: list[Demand]) -> None:
    """Hand the demands on the result to operands, where having the property there gives it here."""
    name, operands = node.op.name, node.operands
    if name in _MOVES or name == "wrap_index":
        for d in out:
            d.join(result)
    elif name == "where":
        out[1].join(result)
        out[2].join(result)
    elif name in ("take", "gather"):
        out[0].join(result)
    elif name == "mul" and result.below:  # the outer part of an index over two axes
        for i in (0, 1):
            if (inner := size_of(operands[1 - i])) is not None and inner != 0:
                out[i].below += [(dims.floordiv(size, inner), 0) for size, _ in result.below]
    elif name == "add" and result.below and (parts := digits(node.result, result.below[0][0])) is not None:
        for i, v in enumerate(operands):
            out[i].below.append((parts[1][1] if v is parts[1][0] else result.below[0][0], 0))
    elif name == "add" and result.below:
        for i in (0, 1):  # an index that is shifted by a constant
            other = operands[1 - i].producer
            if other is not None and other.op.name == "constant" and isinstance(other.attrs["value"], int):
                out[i].below += [(size, offset + other.attrs["value"]) for size, offset in result.below]
    if name in _MONOTONE and "positive" in result.facts and not (len(operands) == 2 and operands[0] is operands[1]):
        for d in out:
            d.facts["positive"] = None


# --- sizes -------------------------------------------------------------------------------------------------------------

_SIZES = (3, 1, 5, 2, 7, 4, 13, 8, 17, 6, 33)


def sample_bindings(graph: Graph, seed: int = 0, count: int = 3, max_elements: int = 1 << 24) -> list[dict[str, int]]:
    """Values for the graph's symbols: small ones, 1, odd ones, no common multiples; different symbols get different sizes.

    Args:
        count: how many bindings at most; a graph without symbols has just one, the empty one.
        max_elements: bindings under which the graph's values hold more elements in total are left out, unless none is smaller.

    Raises:
        GraphoptError: no binding was found under which all sizes of the graph make sense.
    """
    names = sorted(graph.symbols)
    if not names:
        return [{}]
    rng = random.Random(seed)
    choices = {s: _candidates(graph.symbols[s]) for s in names}
    found: list[tuple[int, dict[str, int]]] = []
    for attempt in range(64 * (count + 1)):
        if attempt < len(_SIZES) and seed == 0:
            trial = {s: choices[s][(attempt + i) % len(choices[s])] for i, s in enumerate(names)}
        elif attempt % 2:
            trial = {s: rng.choice(choices[s]) for s in names}
        else:  # sizes tied to each other, such as reshapes need, are found in a wider field
            trial = {s: _any_size(graph.symbols[s], rng) for s in names}
        if any(trial == b for _, b in found):
            continue
        elements = _elements(graph, trial)
        if elements is not None:
            found.append((elements, trial))
        if sum(n <= max_elements for n, _ in found) >= count:
            break
    small = [b for n, b in found if n <= max_elements]
    if not found:
        raise GraphoptError(f"@{graph.name}: no values of {', '.join(names)} were found for which all its sizes make sense")
    return small[:count] or [min(found, key=lambda item: item[0])[1]]


def _candidates(r: Range) -> list[int]:
    near = [r.lo, r.lo + 1, r.lo + 3, *([r.hi] if r.hi is not None and r.hi <= 64 else [])]
    return [n for n in dict.fromkeys([*(n for n in _SIZES if n in r), *near]) if n in r and n > 0] or [r.lo]


def _any_size(r: Range, rng: random.Random) -> int:
    lo = max(r.lo, 1) if r.hi is None or r.hi >= 1 else r.lo
    return rng.randint(lo, max(lo, min(lo + 40, lo + 40 if r.hi is None else r.hi)))


def _elements(graph: Graph, bindings: Mapping[str, int]) -> int | None:
    """Elements of all values together, or None if some size makes no sense under these bindings."""
    total = 0
    for v in (*graph.inputs, *(r for node in graph.nodes() for r in node.results)):
        sizes = [dims.evaluate(d, bindings) for d in v.shape]
        if any(n < 0 for n in sizes) or (v.producer is not None and not _sensible(v.producer, bindings)):
            return None
        total += math.prod(sizes)
    return total


def _sensible(node: Node, bindings: Mapping[str, int]) -> bool:
    """Whether what inference could not prove of a node holds."""
    shapes = [[dims.evaluate(d, bindings) for d in v.shape] for v in node.operands]
    match node.op.name:
        case "reshape":
            return math.prod(shapes[0]) == math.prod(dims.evaluate(d, bindings) for d in node.attrs["shape"])
        case "slice":
            start, stop = (dims.evaluate(node.attrs[k], bindings) for k in ("start", "stop"))
            return 0 <= start <= stop <= shapes[0][node.attrs["axis"]]
        case "matmul":
            return shapes[0][-1] == shapes[1][-2]
        case "take" | "gather" | "put" | "scatter":
            return shapes[0][node.attrs["axis"]] > 0 or math.prod(shapes[1]) == 0
        case "rope":
            return shapes[0][-1] % 2 == 0
        case "group_norm":
            return shapes[0][1] % int(node.attrs["groups"]) == 0
    return True


# --- tensors -----------------------------------------------------------------------------------------------------------


def random_inputs(graph: Graph, bindings: Mapping[str, int] | None = None, seed: int = 0, draw: Draw = "normal") -> list[torch.Tensor]:
    """One tensor an input, of its dtype, shape and strides, fit for the graph.

    Floats are standard normal; positive where a root, a logarithm or a variance wants it. Integers that index stay within
    the smallest axis indexed; others lie in -8 .. 8. Weights of rank 2 and more are divided by the root of their fan-in,
    so that deep models neither explode nor fade.

    Args:
        draw: ``wide``: floats of which nothing is wanted, but of weights, have magnitudes from 1e-3 to 1e2, evenly in their logarithm;
            ``special``: and one of eight (of few, one of two) is a zero of either sign, an infinity, nan, 1e30, or 1e-40; ``ends``:
            or lies at an end of the dtype's range: the largest, the smallest normal, the smallest number.
    """
    generator = torch.Generator().manual_seed(seed)
    known = dict(bindings or {})
    return [_tensor(v, d, known, generator, draw) for v, d in zip(graph.inputs, input_demands(graph), strict=True)]


def _tensor(v: Value, demand: Demand, bindings: Mapping[str, int], generator: torch.Generator, draw: Draw) -> torch.Tensor:
    shape = [dims.evaluate(d, bindings) for d in v.shape]
    if v.type.strides is None:
        return _drawn(_numbers(v, shape, shape, demand, bindings, generator), v, demand, generator, draw)
    strides = [dims.evaluate(s, bindings) for s in v.type.strides]
    length = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    numbers = _numbers(v, [length], shape, demand, bindings, generator)
    return _drawn(numbers, v, demand, generator, draw).as_strided(shape, strides)


def _drawn(x: torch.Tensor, v: Value, demand: Demand, generator: torch.Generator, draw: Draw) -> torch.Tensor:
    """Numbers in other magnitudes, with others among them, where nothing speaks against it."""
    wanted = [f for f in demand.facts if f not in ("nonzero", "table")]
    if draw == "normal" or not v.dtype.is_float or v.weight or v.exact is not None or wanted:
        return x
    x = (x.double() * 10.0 ** (torch.rand(x.shape, generator=generator, dtype=torch.float64) * 5 - 3)).to(x.dtype)
    if draw in ("special", "ends") and not demand.facts:
        limits = torch.finfo(x.dtype)
        ends = (0.75 * limits.max, -0.75 * limits.max, limits.tiny, -limits.tiny * limits.eps) if draw == "ends" else ()
        choices = torch.tensor((*_SPECIAL, *ends), dtype=torch.float64)
        special = choices[torch.randint(len(choices), x.shape, generator=generator)]
        share = 1 / 8 if x.numel() > _FEW else 1 / 2
        x = torch.where(torch.rand(x.shape, generator=generator) < share, special.to(x.dtype), x)
    return x


def _numbers(v: Value, size: list[int], shape: list[int], demand: Demand, bindings: Mapping[str, int],
             generator: torch.Generator) -> torch.Tensor:  # fmt: skip
    """Random numbers of a size, for a value of a shape."""
    dtype = v.dtype
    if dtype.is_bool:
        return torch.randint(0, 2, size, generator=generator).to(torch.bool)
    if dtype.is_integer:
        return _integers(dtype, size, demand, bindings, generator)
    if dtype.is_complex:
        return torch.complex(torch.randn(size, generator=generator), torch.randn(size, generator=generator)).to(dtype.torch)
    if "unit" in demand.facts:
        x = torch.rand(size, generator=generator) * 0.9 + (0.05 if "positive" in demand.facts else -0.45)
    elif "positive" in demand.facts or "above_one" in demand.facts:
        x = torch.rand(size, generator=generator) + (1.05 if "above_one" in demand.facts else 0.5)
    else:
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        if "nonzero" in demand.facts:
            x = torch.where(x < 0, x - 0.5, x + 0.5)
    if v.weight and len(shape) >= 2 and "table" not in demand.facts:
        fan_in = max(shape) if len(shape) == 2 else math.prod(shape[1:])
        x = x / math.sqrt(max(fan_in, 1))
    if v.exact is not None:
        x = x.to(v.exact.torch)
    return x.to(dtype.torch)


def _integers(dtype: DType, size: list[int], demand: Demand, bindings: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    lo, hi = (0 if dtype.kind == "u" else -8), 9
    if "positive" in demand.facts:
        lo, hi = 1, 4  # also an exponent: keep powers small
    if demand.below:
        lo = max(0, *(-offset for _, offset in demand.below))
        hi = min(dims.evaluate(bound, bindings) - offset for bound, offset in demand.below)
    x = torch.randint(lo, max(hi, lo + 1), size, generator=generator)
    if "nonzero" in demand.facts:
        x = torch.where(x == 0, 1, x)
    return x.to(dtype.torch)

