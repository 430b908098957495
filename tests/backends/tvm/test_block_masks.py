"""Masks that hide whole blocks: those are not visited, and what is seen is right, in both kernels."""

from __future__ import annotations

import pytest
import torch
from attention_graphs import attention
from tvm_check import check

from graphopt.ir import types
from graphopt.ir.graph import Graph
from graphopt.target import Target, detect


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
    given = {types.b1: lambda shape: mask.expand(shape).contiguous(), types.u8: lambda shape: table(mask).expand(shape).contiguous()}
    return [given[v.dtype](shape) if v.dtype in given else torch.randn(shape, generator=generator).to(v.dtype.torch)
            for v, shape in zip(graph.inputs, shapes, strict=True)]  # fmt: skip


def table(mask: torch.Tensor) -> torch.Tensor:
    """Of 16 queries and 32 keys, 1 if the mask leaves a pair, and 2 more if it leaves all."""
    blocks = [list(rows.split(32, -1)) for rows in mask.split(16, -2)]
    return torch.tensor([[int(b.any()) + 2 * int(b.all()) for b in row] for row in blocks], dtype=torch.uint8)


def masked(m: int | str, n: int | str, d: int = 64, shape: str = "", attrs: str = "", bias: bool = False, blocks: str = "",
           **more: str) -> Graph:  # fmt: skip
    """Attention under a mask ``[m, n]``, or of another shape; ``blocks`` is the shape of its table."""
    extra = (f", %b: f32[{m}, {n}]" if bias else "") + f", %m: b1[{shape or f'{m}, {n}'}]" + (f", %t: u8[{blocks}]" if blocks else "")
    names = (", %b" if bias else "") + ", %m" + (", %t" if blocks else "")
    return attention(m, n, d, extra=extra, names=names, attrs=attrs, **more)  # type: ignore[arg-type]


GRAPHS = {
    "blocks of 64": (masked(512, 512), pattern(512, 512, 64)),
    "odd sizes": (masked(301, 517), pattern(301, 517, 50)),
    "causal, too": (masked(256, 300, attrs=", causal = true, offset = 44"), pattern(256, 300, 64)),
    "of keys": (masked(256, 400, shape="1, 400"), (torch.arange(400) % 300 < 140)[None]),
    "with a bias": (masked(200, 300, bias=True), pattern(200, 300, 64)),
    "rows that see nothing are nan": (masked(200, 300, attrs=', empty = "nan"'), pattern(200, 300, 64)),
    "rows that see nothing are the mean": (masked(200, 300, attrs=', empty = "mean"'), pattern(200, 300, 64)),
    "soft cap": (masked(256, 256, attrs=", softcap = 2.0"), pattern(256, 256, 64)),
    "table": (masked(301, 517, blocks="19, 17", attrs=', causal = true, offset = 216, empty = "nan"'), pattern(301, 517, 50)),
    "table of heads": (masked(200, 300, shape="1, 2, 200, 300", blocks="1, 2, 13, 10", bias=True), pattern(200, 300, 24)),
    "symbolic": (masked("M", "N", where=" where 48 <= M, 1 <= N"), pattern(150, 333, 64)),
}  # fmt: skip


@pytest.mark.parametrize("template", [0, 1])
def test_against_f64(compile_all, template: int) -> None:
    runs = compile_all([(g, "attention") for g, _ in GRAPHS.values()], template=template)
    for (graph, mask), run in zip(GRAPHS.values(), runs, strict=True):
        sizes = {"M": mask.shape[0], "N": mask.shape[1]}
        check(graph, run, inputs(graph, mask, **sizes), sizes if graph.symbols else None, factor=4.0)


def test_tables_where_groups_are_smaller_than_their_rows(compile_all) -> None:
    """Vectors of four: a group has 8 queries, an element of a table 16."""
    (graph, mask), target = GRAPHS["table"], Target.from_name("cpu:x86-64-v2:2")
    if why := detect().lacks(target):
        pytest.skip(why)
    (run,) = compile_all([(graph, "attention")], target=target)
    check(graph, run, inputs(graph, mask), factor=4.0)


@pytest.mark.parametrize("template", [0, 1])
def test_hidden_blocks_are_not_visited(compile_all, template: int) -> None:
    """What a mask hides wholly is NaN, which would be seen in any sum; so would a weight of zero times it."""
    graph = masked(256, 1024)
    mask = torch.zeros(256, 1024, dtype=torch.bool)
    mask[:, 512:640] = True
    (run,) = compile_all([(graph, "attention")], template=template)
    q, k, v, m = inputs(graph, mask)
    for x in (k, v):
        x[:, :, :256] = float("nan")
        x[:, :, 896:] = float("nan")  # blocks are no larger than 256
    (out,) = run([q, k, v, m], None)
    (want,) = run([q, k.nan_to_num(), v.nan_to_num(), m], None)
    assert torch.isfinite(out).all() and torch.equal(out, want)


@pytest.mark.parametrize("template", [0, 1])
def test_a_table_is_believed(compile_all, template: int) -> None:
    """The mask itself is read nowhere but where its table says that it leaves some pairs of a block."""
    graph, plain = masked(256, 1024, blocks="16, 32"), masked(256, 1024)
    run, other = compile_all([(graph, "attention"), (plain, "attention")], template=template)
    q, k, v, m, t = inputs(graph, torch.rand(256, 1024, generator=torch.Generator().manual_seed(2)) < 0.5)
    (all_seen,) = run([q, k, v, m, torch.full_like(t, 3)], None)
    (want,) = other([q, k, v, torch.ones_like(m)], None)
    assert torch.equal(all_seen, want)
    (none_seen,) = run([q, k, v, m, torch.zeros_like(t)], None)
    assert not none_seen.any()
