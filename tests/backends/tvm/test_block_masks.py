"""Masks that hide whole blocks: those are not visited, and what is seen is right, in both kernels."""

from __future__ import annotations

import pytest
import torch
from attention_graphs import attention
from tvm_check import check

from graphopt.ir.graph import Graph


def pattern(queries: int, keys: int, block: int) -> torch.Tensor:
    """The first block of keys, a band of blocks, and blocks by chance; some rows see nothing."""
    generator = torch.Generator().manual_seed(0)
    i, j = torch.arange(queries)[:, None] // block, torch.arange(keys) // block
    chance = torch.rand(int(i.max()) + 1, int(j.max()) + 1, generator=generator) < 0.2
    seen = (j == 0) | ((i - j).abs() <= 0) | chance[i, j]
    seen[3] = False
    return seen


def inputs(graph: Graph, mask: torch.Tensor, **bindings: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [[d if isinstance(d, int) else bindings[str(d)] for d in v.shape] for v in graph.inputs]
    return [mask.expand(shape).contiguous() if v.dtype.is_bool else torch.randn(shape, generator=generator).to(v.dtype.torch)
            for v, shape in zip(graph.inputs, shapes, strict=True)]  # fmt: skip


def masked(m: int | str, n: int | str, d: int = 64, shape: str = "", attrs: str = "", bias: bool = False, **more: str) -> Graph:
    extra = (f", %b: f32[{m}, {n}]" if bias else "") + f", %m: b1[{shape or f'{m}, {n}'}]"
    return attention(m, n, d, extra=extra, names=", %b, %m" if bias else ", %m", attrs=attrs, **more)  # type: ignore[arg-type]


GRAPHS = {
    "blocks of 64": (masked(512, 512), pattern(512, 512, 64)),
    "odd sizes": (masked(301, 517), pattern(301, 517, 50)),
    "causal, too": (masked(256, 300, attrs=", causal = true, offset = 44"), pattern(256, 300, 64)),
    "of keys": (masked(256, 400, shape="1, 400"), (torch.arange(400) % 300 < 140)[None]),
    "with a bias": (masked(200, 300, bias=True), pattern(200, 300, 64)),
    "rows that see nothing are nan": (masked(200, 300, attrs=', empty = "nan"'), pattern(200, 300, 64)),
    "rows that see nothing are the mean": (masked(200, 300, attrs=', empty = "mean"'), pattern(200, 300, 64)),
    "soft cap": (masked(256, 256, attrs=", softcap = 2.0"), pattern(256, 256, 64)),
    "symbolic": (masked("M", "N", where=" where 48 <= M, 1 <= N"), pattern(150, 333, 64)),
}  # fmt: skip


@pytest.mark.parametrize("template", [0, 1])
def test_against_f64(compile_all, template: int) -> None:
    runs = compile_all([(g, "attention") for g, _ in GRAPHS.values()], template=template)
    for (graph, mask), run in zip(GRAPHS.values(), runs, strict=True):
        sizes = {"M": mask.shape[0], "N": mask.shape[1]}
        check(graph, run, inputs(graph, mask, **sizes), sizes if graph.symbols else None, factor=4.0)


@pytest.mark.parametrize("template", [0, 1])
def test_hidden_blocks_are_not_visited(compile_all, template: int) -> None:
    """What a mask hides wholly is NaN, which would be seen in any sum; so would a weight of zero times it."""
    graph = masked(256, 1024)
    mask = torch.zeros(256, 1024, dtype=torch.bool)
    mask[:, 512:768] = True
    (run,) = compile_all([(graph, "attention")], template=template)
    q, k, v, m = inputs(graph, mask)
    for x in (k, v):
        x[:, :, :256] = float("nan")
        x[:, :, 768:] = float("nan")
    (out,) = run([q, k, v, m], None)
    (want,) = run([q, k.nan_to_num(), v.nan_to_num(), m], None)
    assert torch.isfinite(out).all() and torch.equal(out, want)
