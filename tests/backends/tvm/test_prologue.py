"""Attention over rows that the kernel makes on the way: rotary embeddings, RMS norms of heads; each of the three kernels."""

from __future__ import annotations

import pytest
import torch
from tvm_check import check, values

from graphopt.ir import types
from graphopt.ir.graph import Graph
from graphopt.ir.text import parse_graph


def rope(name: str, x: str, shape: str, size: int, dtype: str) -> str:
    """IR of x rotated by the angles of ``%c`` and ``%s``."""
    half = f"{shape}{size // 2}]"
    full = f"{shape}{size}]"
    return f"""
      %{name}a: {full} = mul(%{x}, %c)
      %{name}b: {half} = slice(%{x}) {{axis = 3, start = {size // 2}, stop = {size}}}
      %{name}n: {half} = neg(%{name}b)
      %{name}d: {half} = slice(%{x}) {{axis = 3, stop = {size // 2}}}
      %{name}e: {full} = concat(%{name}n, %{name}d) {{axis = 3}}
      %{name}f: {full} = mul(%{name}e, %s)
      %{name}: {full} = add(%{name}a, %{name}f)"""


def layer(rows: int | str, heads: int = 4, shared: int = 2, size: int = 64, dtype: str = "f32", norm: bool = True, keys: bool = True,
          rotated: bool = True, attrs: str = ", causal = true", where: str = "") -> Graph:  # fmt: skip
    """Attention over the thirds of one product ``[B, S, (H + 2 G) D]``: q and, if ``keys``, k are normalized and rotated."""
    width = (heads + 2 * shared) * size
    lines, ends = [], (0, heads * size, (heads + shared) * size, width)
    for name, n, first, last in zip("qkv", (heads, shared, shared), ends, ends[1:], strict=False):
        lead, flat = f"{dtype}[2, {n}, {rows}, ", f"{dtype}[2, {rows}, {n}, {size}]"
        cut = f"{dtype}[2, {rows}, {last - first}]"
        normed = norm and (name == "q" or (name == "k" and keys))
        lines += [f"%{name}0: {cut} = slice(%x) {{axis = 2, start = {first}, stop = {last}}}",
                  f"%{name}1: {flat} = reshape(%{name}0) {{shape = [2, {rows}, {n}, {size}]}}",
                  f"%{name}2: {flat} = rms_norm(%{name}1, %w) {{eps = 0.001}}" if normed else "",
                  f"%{name}3: {lead}{size}] = transpose(%{name}{2 if normed else 1}) {{perm = [0, 2, 1, 3]}}"]  # fmt: skip
        if rotated and (name == "q" or (name == "k" and keys)):
            lines.append(rope(f"{name}r", f"{name}3", lead, size, dtype))
    q = "qr" if rotated else "q3"
    k = "kr" if rotated and keys else "k3"
    out = f"{dtype}[2, {heads}, {rows}, {size}]"
    table = f"{dtype}[{rows}, {size}]"
    return parse_graph(f"""graph @g(%x: {dtype}[2, {rows}, {width}], %c: {table}, %s: {table}, %w: {dtype}[{size}]) -> {out}{where} {{
      {chr(10).join(lines)}
      %0: {out} = attention(%{q}, %{k}, %v3) {{scale = 0.2{attrs}}}
      return %0
    }}""")


def inputs(graph: Graph, **bindings: int) -> list[torch.Tensor]:
    out = values(graph, **bindings)
    out[3] = out[3].abs() + 0.5
    return out


GRAPHS = {
    "rotated": layer(70, norm=False), "normalized": layer(70, rotated=False), "both": layer(70), "queries alone": layer(70, keys=False),
    "small heads": layer(70, size=32, attrs=""), "heads that fill no tile": layer(60, size=48),
    "few queries": layer(1, shared=4, keys=False), "some queries": layer(3, heads=2, shared=2, keys=False),
    "rows by symbol": layer("M", where=" where 1 <= M"),
    "many rows by symbol": layer("M", where=" where 64 <= M"),
}  # fmt: skip


@pytest.mark.parametrize("template", [0, 1])
def test_against_f64(compile_all, template: int) -> None:
    """The preferred kernel of each (tiles, vectors or the one for few queries), and the next."""
    for graph, run in zip(GRAPHS.values(), compile_all([(g, "attention") for g in GRAPHS.values()], template=template), strict=True):
        bindings = {"M": 67} if graph.symbols else None
        check(graph, run, inputs(graph, M=67), bindings, factor=4.0)


def test_bf16(compile_all) -> None:
    """Products of bf16 have no f64 to compare with that rounds as they do: eager's error, and as much again."""
    graphs = [layer(70, dtype="bf16"), layer(1, shared=4, keys=False, dtype="bf16")]
    for graph, run in zip(graphs, compile_all([(g, "attention") for g in graphs]), strict=True):
        check(graph, run, inputs(graph), factor=2.0, slack=4.0)


def test_what_is_normalized_twice(compile_all) -> None:
    """A norm of a norm: the second sees what the first gives."""
    graph = parse_graph("""graph @g(%q: f32[1, 2, 50, 32], %k: f32[1, 2, 60, 32], %w: f32[32]) -> f32[1, 2, 50, 32] {
      %0: f32[1, 2, 50, 32] = rms_norm(%q) {eps = 0.5}
      %1: f32[1, 2, 50, 32] = tanh(%0)
      %2: f32[1, 2, 50, 32] = rms_norm(%1, %w)
      %3: f32[1, 2, 50, 32] = attention(%2, %k, %k) {scale = 0.3}
      return %3
    }""")
    (run,) = compile_all([(graph, "attention")])
    check(graph, run, [x.to(types.f32.torch) for x in values(graph)], factor=4.0)
