"""Regions of every kernel family, in forms that use what a target decides: vectors, tiles, packed widths, functions, scratch."""

from __future__ import annotations

import torch
from test_conv import CASES
from test_conv_channels import CASES as CHANNELS
from test_conv_pair import CASES as PAIRS
from test_families import REDUCTIONS, ROWS
from test_pool import CASES as POOLS
from test_pool import kind_of

from graphopt.ir import dims
from graphopt.ir.graph import Graph, Value
from graphopt.ir.text import parse_graph
from graphopt.target import Target

_POINTWISE = {
    "functions": "(%x: f32[7, 33], %y: f32[33]) -> f32[7, 33] {\n %0: f32[7, 33] = exp(%x)\n %1: f32[7, 33] = tanh(%x)\n"
    " %2: f32[7, 33] = erf(%x)\n %3: f32[7, 33] = sigmoid(%x)\n %4: f32[7, 33] = log(%0)\n %5: f32[7, 33] = mul(%1, %2)\n"
    " %6: f32[7, 33] = add(%3, %4)\n %7: f32[7, 33] = maximum(%5, %6)\n %8: f32[7, 33] = sub(%7, %y)\n return %8\n}",
    "transposed": "(%x: f32[40, 70], %y: f32[70, 40]) -> f32[70, 40] {\n %0: f32[70, 40] = transpose(%x) {perm = [1, 0]}\n"
    " %1: f32[70, 40] = add(%0, %y)\n return %1\n}",
    "gathered": "(%t: f32[50, 20], %i: i64[2, 9]) -> f32[2, 9, 20] {\n %0: f32[2, 9, 20] = take(%t, %i) {axis = 0}\n"
    " %1: f32[2, 9, 20] = gelu(%0)\n return %1\n}",
    "f64": "(%x: f64[300]) -> f64[300] {\n %0: f64[300] = mul(%x, %x)\n %1: f64[300] = sqrt(%0)\n return %1\n}",
    "integers": "(%x: i32[300], %y: i32[300]) -> i32[300] {\n %0: i32[300] = mul(%x, %y)\n %1: i32[300] = maximum(%0, %x)\n return %1\n}",
    "f16": "(%x: f16[300], %y: f16[300]) -> f16[300] {\n %0: f16[300] = mul(%x, %y)\n %1: f16[300] = relu(%0)\n return %1\n}",
    "bf16": "(%x: bf16[300], %y: bf16[300]) -> bf16[300] {\n %0: bf16[300] = mul(%x, %y)\n %1: bf16[300] = relu(%0)\n return %1\n}",
    "one parallel loop": "(%x: f32[M, 4000]) -> f32[M, 4000]\nwhere 1 <= M {\n %0: f32[M, 4000] = silu(%x)\n return %0\n}",
}
_PRODUCTS = {
    "plain": "(%x: f32[13, 40], %y: f32[40, 50]) -> f32[13, 50] {\n %0: f32[13, 50] = matmul(%x, %y)\n return %0\n}",
    "transposed": "(%x: f32[2, 9, 64], %y: f32[2, 33, 64]) -> f32[2, 9, 33] {\n %t: f32[2, 64, 33] = transpose(%y) {perm = [0, 2, 1]}\n"
    " %0: f32[2, 9, 33] = matmul(%x, %t)\n return %0\n}",
    "vector": "(%x: f32[1, 300], %y: f32[64, 300]) -> f32[1, 64] {\n %t: f32[300, 64] = transpose(%y) {perm = [1, 0]}\n"
    " %0: f32[1, 64] = matmul(%x, %t)\n return %0\n}",
    "f64": "(%x: f64[9, 30], %y: f64[30, 20]) -> f64[9, 20] {\n %0: f64[9, 20] = matmul(%x, %y)\n return %0\n}",
    "bf16": "(%x: bf16[9, 64], %y: bf16[64, 20]) -> bf16[9, 20] {\n %0: bf16[9, 20] = matmul(%x, %y)\n return %0\n}",
    "integers": "(%x: i32[9, 64], %y: i32[64, 20]) -> i32[9, 20] {\n %0: i32[9, 20] = matmul(%x, %y)\n return %0\n}",
}
_CONVOLUTIONS = ("3x3", "3x3 packed", "1x1 strided", "first layer", "grouped", "line", "volume", "long", "image of any size",
                 "depthwise", "depthwise strided", "depthwise of any size", "padded")  # fmt: skip
_FEW_FILTERS = ("3x3 by filter", "channels left", "channels first", "image of any size")
_POOLS = ("max", "max of any size, first", "argmax", "avg", "avg of any size", "avg of a large window", "adaptive avg")


def packed_product(m: int | str, k: int, n: int, nr: int) -> str:
    """``gelu(x[m, k] @ w[k, n] + b)`` with w in panels of nr columns."""
    panels, where = -(-n // nr), "\nwhere 1 <= M" if isinstance(m, str) else ""
    return (f"(%x: f32[{m}, {k}], %w: f32[{panels}, {k}, {nr}], %b: f32[{n}]) -> f32[{m}, {n}]{where} {{\n"
            f" %0: f32[{k}, {panels}, {nr}] = transpose(%w) {{perm = [1, 0, 2]}}\n"
            f" %1: f32[{k}, {panels * nr}] = reshape(%0) {{shape = [{k}, {panels * nr}]}}\n"
            f" %2: f32[{k}, {n}] = slice(%1) {{axis = 1, stop = {n}}}\n %3: f32[{m}, {n}] = matmul(%x, %2)\n"
            f" %4: f32[{m}, {n}] = add(%3, %b)\n %5: f32[{m}, {n}] = gelu(%4)\n return %5\n}}")  # fmt: skip


def families(t: Target) -> dict[str, tuple[Graph, str]]:
    """(region, kind) by name."""
    nr = t.tile[1] * t.lanes(4)
    found: dict[str, tuple[Graph, str]] = {}

    def add(kind: str, texts: dict[str, str]) -> None:
        found.update({f"{kind}: {name}": (parse_graph("graph @g" + text.removeprefix("graph @g")), kind) for name, text in texts.items()})

    add("pointwise", _POINTWISE)
    add("reduction", {name: REDUCTIONS[name] for name in ("sum 0", "sum 2", "mean 1, 2", "max 1", "argmax", "long", "any 1")})
    add("rowwise", {name: text.replace("C", "127") for name, text in ROWS.items()})
    add("matmul", _PRODUCTS)
    add("matmul", {f"packed, {m} rows": packed_product(m, 300, 100, nr) for m in (1, 7, 35, "M")})
    add("matmul", {"packed, a narrow last panel": packed_product(35, 300, nr + 16, nr)})
    found.update({f"conv: {name}": (CASES[name], "conv") for name in _CONVOLUTIONS})
    found.update({f"conv of few filters: {name}": (CHANNELS[name], "conv") for name in _FEW_FILTERS})
    found["conv-depthwise: strided"] = (PAIRS["strided"], "conv-depthwise")
    found.update({f"pool: {name}": (POOLS[name], kind_of(POOLS[name])) for name in _POOLS})
    return found


def bindings(graph: Graph) -> dict[str, int]:
    """A value for each symbol."""
    return {name: {"M": 11, "B": 2, "H": 10}[name] for name in graph.symbols}


def inputs(graph: Graph) -> list[torch.Tensor]:
    """Random inputs; integers of the second input, which may be positions, are small and not negative."""
    generator, sizes = torch.Generator().manual_seed(0), bindings(graph)

    def one(v: Value, k: int) -> torch.Tensor:
        shape = [d if isinstance(d, int) else dims.evaluate(d, sizes) for d in v.shape]
        if v.dtype.is_float:
            return torch.randn(shape, generator=generator).to(v.dtype.torch)
        return torch.randint(0 if k else -40, 40, shape, generator=generator).to(v.dtype.torch)

    return [one(v, k) for k, v in enumerate(graph.inputs)]
