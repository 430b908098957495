"""Graphs of one attention, and inputs for them."""

from __future__ import annotations

import torch

from graphopt.ir import dims, types
from graphopt.ir.graph import Graph
from graphopt.ir.text import parse_graph


def attention(m: int | str, n: int | str, d: int = 40, e: int | None = None, heads: int = 2, shared: int | None = None, attrs: str = "",
              extra: str = "", names: str = "", dtype: str = "f32", where: str = "") -> Graph:  # fmt: skip
    """One attention ``[1, heads, m, d]`` over n keys; ``extra`` are more inputs, ``names`` those that the op reads."""
    e, shared = e or d, shared or heads
    out = f"{dtype}[1, {heads}, {m}, {e}]"
    return parse_graph(f"""graph @g(%q: {dtype}[1, {heads}, {m}, {d}], %k: {dtype}[1, {shared}, {n}, {d}],
      %v: {dtype}[1, {shared}, {n}, {e}]{extra}) -> {out}{where} {{
        %0: {out} = attention(%q, %k, %v{names}) {{scale = 0.3{attrs}}}
        return %0
    }}""")


def inputs(graph: Graph, **bindings: int) -> list[torch.Tensor]:
    """Random inputs; a mask hides a third of the keys, and all of them from the second query."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for v in graph.inputs:
        shape = [d if isinstance(d, int) else dims.evaluate(d, bindings) for d in v.shape]
        x = torch.randn(shape, generator=generator)
        if v.dtype.is_bool:
            x = x < 0.4
            if x.dim() > 1 and x.shape[-2] > 1:
                x[..., 1, :] = False
            out.append(x)
        elif v.type.strides is not None:
            strides = [s if isinstance(s, int) else dims.evaluate(s, bindings) for s in v.type.strides]
            span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            out.append(torch.randn(span, generator=generator).to(v.dtype.torch).as_strided(shape, strides))
        elif v.dtype == types.i64:  # a table of pages, of which there are nine
            out.append(torch.randint(0, 9, shape, generator=generator))
        elif v.dtype.is_integer:
            low = -127 if v.dtype.kind == "i" else 0
            out.append(torch.randint(low, low + 255, shape, generator=generator).to(v.dtype.torch))
        else:
            out.append(x.to(v.dtype.torch))
    return out
