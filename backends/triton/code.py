"""A kernel under construction: lines of Triton in nested blocks, each value where its operands allow it.

A value that does not depend on a loop is written before the loop, whoever asks for it: the depth of a value is that of the deepest
variable in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.base import KernelSource
from graphopt.backends.triton.index import NO_AXES, Atom, Quotient, Sum, Var, variables
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph
from graphopt.ir.opset.quantize import LARGEST
from graphopt.ir.types import DType
from graphopt.target import Target

INDENT = "    "


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        grid: programs along up to three axes.
        blocks: compile-time sizes, by name.
        warps, stages: warps of a program, and stages of its pipelined loops.
    """

    grid: tuple[Dim, ...]
    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Payload:
    """What a compiler needs beside the text, a kernel of the file: types of the parameters in Triton's spelling, and the launch."""

    name: str
    signature: Mapping[str, str]
    launch: Launch


@dataclass(frozen=True)
class Scratch:
    """Memory that a launch takes from PyTorch's allocator: so many elements of a type."""

    dtype: DType
    numel: Dim


@dataclass(frozen=True)
class Descriptor:
    """How tiles of a tensor lie in memory, which a launch tells the device.

    Attributes:
        tensor: the parameter's name.
        dtype: of its elements.
        start: the element at which they begin.
        shape, strides: in elements; the last stride is 1.
        block: shape of a tile.
    """

    tensor: str
    dtype: DType
    start: Dim
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    block: tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Neighbouring numbers: from ``start``, an expression, as many as ``size``, which has a name."""

    start: str
    size_name: str
    size: int


@dataclass(frozen=True)
class Text:
    """An expression, the tile axes along which it varies, and its depth."""

    text: str
    axes: frozenset[int] = NO_AXES
    depth: int = 0


@dataclass
class Code:
    """Lines, and the names in them.

    Attributes:
        graph: the region.
        wide: whether places in memory need 64 bits.
        scratch: memory that the kernel and those after it share, by the parameter's name.
        then: the kernels that are launched after this one, of the same tensors and scratch.
        descriptors: of tiles that this kernel reads by descriptor, by the parameter's name.
        spans: the blocks of :meth:`block`, by the variable's name.
        helpers: functions of :mod:`~graphopt.backends.triton.library` that the lines call.
    """

    graph: Graph
    scratch: Mapping[str, Scratch] = field(default_factory=dict)
    then: list[tuple[Code, Launch]] = field(default_factory=list)
    blocks: list[list[str]] = field(default_factory=lambda: [[]])
    descriptors: dict[str, Descriptor] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)
    helpers: dict[str, None] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _atoms: dict[Atom, str] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return len(self.blocks) - 1

    @property
    def tensors(self) -> list[str]:
        """The parameters that are tensors: operands, then results."""
        return [*(f"in{k}" for k in range(len(self.graph.inputs))), *(f"out{k}" for k in range(len(self.graph.outputs)))]

    @property
    def wide(self) -> bool:
        """A place may need 64 bits: a tensor has, or may have, 2 ** 31 elements."""
        values = [*self.graph.inputs, *self.graph.outputs]
        sizes = [*(v.type.numel for v in values), *(s.numel for s in self.scratch.values())]
        ends = [dims.bounds(n, self.graph.symbols)[1] for n in sizes]
        return any(n is None or n >= 2**31 for n in ends) or any(not dims.is_static(v.type.strides or ()) for v in values)

    def fresh(self, prefix: str) -> str:
        n = self._counts[prefix] = self._counts.get(prefix, -1) + 1
        name = f"{prefix}{n}"
        return self.fresh(prefix) if name in self.graph.symbols or name in self.tensors else name

    def line(self, text: str, depth: int | None = None) -> None:
        self.blocks[self.depth if depth is None else depth].append(text)

    def let(self, prefix: str, text: str, depth: int | None = None) -> str:
        """Name an expression."""
        name = self.fresh(prefix)
        self.line(f"{name} = {text}", depth)
        return name

    @contextmanager
    def loop(self, header: str) -> Iterator[None]:
        """Lines of a loop's body."""
        self.blocks.append([])
        yield
        body = self.blocks.pop()
        self.line(header)
        self.blocks[-1] += [INDENT + line for line in body]

    def helper(self, name: str) -> str:
        self.helpers[name] = None
        return name

    # --- sizes and places ---------------------------------------------------------------------------------------------------

    def size(self, d: Dim) -> str:
        """A size, fit to be a factor."""
        text = _without_powers(dims.format_dim(d))
        return text if isinstance(d, int) or text.isidentifier() else f"({text})"

    def place(self, s: Sum) -> Text:
        """An index as text, fit to be a factor; quotients and remainders get names."""
        parts = []
        for atom, step in s.terms:
            name = self._atom(atom)
            parts.append(name if step == 1 else f"{name} * {self.size(step)}")
        if s.start != 0 or not parts:
            parts.append(self.size(s.start))
        text = " + ".join(parts).replace("+ -", "- ")
        of = variables(s)
        axes = NO_AXES.union(*(v.axes for v in of))
        return Text(text if len(parts) == 1 and " " not in text else f"({text})", axes, max((v.depth for v in of), default=0))

    def _atom(self, atom: Atom) -> str:
        if isinstance(atom, Var):
            return atom.name
        if atom not in self._atoms:
            of = self.place(atom.of)
            sign = "//" if isinstance(atom, Quotient) else "%"
            self._atoms[atom] = self.let("q" if sign == "//" else "r", f"{of.text} {sign} {self.size(atom.by)}", of.depth)
        return self._atoms[atom]

    def derived(self, s: Sum, extent: Dim, prefix: str = "at") -> Var:
        """A variable that is an index; the caller sees to it that it lies below the extent wherever it matters."""
        of = self.place(s)
        inside = tuple(dict.fromkeys(c for v in variables(s) for c in v.inside))
        return Var(self.let(prefix, of.text.removeprefix("(").removesuffix(")") if of.text[:1] == "(" else of.text, of.depth), extent,
                   of.axes, of.depth, inside)  # fmt: skip

    def program(self, axis: int, name: str = "pid") -> str:
        """Number of this program along an axis of the grid."""
        return self.let(name, f"tl.program_id({axis})" + (".to(tl.int64)" if self.wide else ""), 0)

    def block(self, name: str, start: str, size_name: str, size: int, extent: Dim, axis: int, rank: int, depth: int = 0) -> Var:
        """Neighbouring numbers along an axis of the tile, and the condition that they are below the extent.

        Args:
            start: expression of the first; empty for 0.
            size_name, size: how many, as a name and as a number.
            rank: axes of the tile.
        """
        lanes = f"tl.arange(0, {size_name})"
        if rank > 1:
            lanes += "[" + ", ".join(":" if k == axis else "None" for k in range(rank)) + "]"
        start = "" if start.startswith("0 *") else start
        text = self.let(name, f"{start} + {lanes}" if start else lanes, depth)
        self.spans[text] = Span(start or "0", size_name, size)
        whole = isinstance(extent, int) and extent % size == 0
        inside = () if whole else (self.let(f"{name}_in", f"{text} < {self.size(extent)}", depth),)
        return Var(text, extent, frozenset([axis]), depth, inside)

    # --- the kernel -----------------------------------------------------------------------------------------------------------

    def source(self, name: str, w: Workload, s: Schedule, t: Target, launch: Launch) -> KernelSource:
        """The finished file: the region as a comment, the kernels, and the function that launches them."""
        kernels = [(name, self, launch), *((f"{name}_{k}", code, after) for k, (code, after) in enumerate(self.then, 1))]
        given, symbols = [*self.tensors, *self.scratch], sorted(w.graph.symbols)
        values = (*w.graph.inputs, *w.graph.outputs)
        bits = {n: as_bits(v.dtype) for n, v in zip(self.tensors, values, strict=True)}
        mapped = [d.tensor for _, code, _ in kernels for d in code.descriptors.values()]
        described = ["copy_back"] * any(n.startswith("out") for n in mapped) + ["tensor_map"] * bool(mapped)
        helpers = sorted({h for _, code, _ in kernels for h in code.helpers})
        lines = [
            f"# {w.kind} region for {t}: {json.dumps({'sketch': s.sketch, **dict(s.knobs)})}",
            "#",
            *(f"# {line}" for line in w.text.splitlines()),
            "",
            *(["import torch"] if any(bits.values()) or self.scratch else []),
            "import triton",
            "import triton.language as tl",
            *([f"from graphopt.backends.triton.library import {', '.join(helpers)}"] if helpers else []),
            *([f"from graphopt.backends.triton.tensormap import {', '.join(described)}"] if described else []),
        ]
        for kernel, code, how in kernels:
            blocks = [f"{n}: tl.constexpr = {size}" for n, size in how.blocks.items()]
            (body,) = code.blocks
            parameters = ", ".join([*given, *code.descriptors, *symbols, *blocks])
            lines += ["", "", "@triton.jit", f"def {kernel}({parameters}):", *(INDENT + line for line in body)]
        lines += ["", "", f"def launch({', '.join([*self.tensors, *symbols])}):"]
        for n, memory in self.scratch.items():
            size = dims.format_dim(memory.numel)
            lines.append(f"{INDENT}{n} = torch.empty({size}, dtype={memory.dtype.torch}, device={self.tensors[-1]}.device)")
        for kernel, code, how in kernels:
            for n, d in code.descriptors.items():
                shape, strides, block = (", ".join(map(dims.format_dim, numbers)) for numbers in (d.shape, d.strides, d.block))
                start = f", {dims.format_dim(d.start)}" if d.start != 0 else ""
                lines.append(f"{INDENT}{n} = tensor_map({d.tensor}{as_bits(d.dtype)}, [{shape}], [{strides}], [{block}]{start})")
            passed = ", ".join([*(n + bits.get(n, "") for n in given), *code.descriptors, *symbols])
            lines.append(f"{INDENT}grid = ({''.join(dims.format_dim(n) + ', ' for n in how.grid)})")
            lines.append(f"{INDENT}{kernel}[grid]({passed}, num_warps={how.warps}, num_stages={how.stages})")
            results = [(n, d.tensor) for n, d in code.descriptors.items() if d.tensor.startswith("out")]
            lines += [f"{INDENT}copy_back({n}, {tensor}{bits[tensor]})" for n, tensor in results]
        types = [*(v.dtype for v in values), *(memory.dtype for memory in self.scratch.values())]
        pointers = {n: f"*{_POINTERS[d.name]}" for n, d in zip(given, types, strict=True)}
        payload = []
        for kernel, code, how in kernels:
            tiles = {n: f"tensordesc<{_POINTERS[d.dtype.name]}[{', '.join(map(str, d.block))}]>" for n, d in code.descriptors.items()}
            rest = {**dict.fromkeys(symbols, "i32"), **dict.fromkeys(how.blocks, "constexpr")}
            payload.append(Payload(kernel, {**pointers, **tiles, **rest}, how))
        return KernelSource(name, "triton", "\n".join(lines) + "\n", tuple(payload))


_POINTERS = {"f64": "fp64", "f32": "fp32", "f16": "fp16", "bf16": "bf16", "i64": "i64", "i32": "i32", "i16": "i16", "i8": "i8",
             "u8": "u8", "f8e4m3": "u8", "f8e5m2": "u8", "b1": "i1"}  # fmt: skip


def as_bits(dtype: DType) -> str:
    """How a tensor is passed: floats of 8 bits are read and written as what they are made of."""
    return ".view(torch.uint8)" if dtype in LARGEST else ""


def _without_powers(text: str) -> str:
    """``H**2`` as ``(H*H)``: numbers of a kernel have no powers."""
    while (at := text.find("**")) >= 0:
        start, deep = at - 1, 0
        while start >= 0 and (deep or text[start].isalnum() or text[start] in "_)"):
            deep += (text[start] == ")") - (text[start] == "(")
            start -= 1
        end = at + 2
        while end < len(text) and text[end].isdigit():
            end += 1
        base = text[start + 1 : at]
        text = f"{text[: start + 1]}({'*'.join([base] * int(text[at + 2 : end]))}){text[end:]}"
    return text


def ceildiv(n: Dim, by: int) -> Dim:
    return dims.floordiv(dims.add(n, by - 1), by)


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()


def conditions(parts: Sequence[str]) -> str:
    """Conditions that all hold; empty for none."""
    return " & ".join(dict.fromkeys(parts))
