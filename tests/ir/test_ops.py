"""Every op of the table: inference agrees with evaluation, the expansion with the op, the text with the node."""

from __future__ import annotations

import pytest
import torch

from graphopt.ir import OPS, Graph, dims, evaluate, parse_graph, print_graph, structurally_equal, verify
from graphopt.ir.ops import EvalContext
from graphopt.ir.types import DType
from graphopt.rewrite import Rewriter
from graphopt.sampling import random_inputs, sample_bindings
from graphopt.testing import random_graph
from graphopt.testing.pool import DTYPES, supported_dtypes
from graphopt.testing.recipes import RECIPES
from graphopt.verification import compare

INFERRED = [name for name, op in OPS.items() if op.infer is not None]
COMPOSITES = [name for name, op in OPS.items() if op.expand is not None]
SEEDS = range(8)


def test_every_op_with_inference_has_a_recipe() -> None:
    assert list(dict.fromkeys(INFERRED)) and not [n for n in INFERRED if n not in RECIPES]


@pytest.mark.parametrize("name", INFERRED)
def test_inference_agrees_with_evaluation(name: str) -> None:
    for seed in SEEDS:
        g = random_graph(seed, ops=[name], max_nodes=2)
        verify(g)
        for bindings in sample_bindings(g, seed):
            inputs = random_inputs(g, bindings, seed)
            for wide in (False, True):
                for x, v in zip(evaluate(g, inputs, bindings=bindings, wide=wide), g.outputs, strict=True):
                    assert list(x.shape) == [dims.evaluate(d, bindings) for d in v.shape], g
                    assert x.dtype == expected_dtype(v.dtype, wide), g


def expected_dtype(dtype: DType, wide: bool) -> torch.dtype:
    if wide and dtype.is_float:
        return torch.float64
    return torch.complex128 if wide and dtype.is_complex else dtype.torch


@pytest.mark.parametrize("name", COMPOSITES)
def test_expansion_agrees_with_evaluation(name: str) -> None:
    compared = 0
    for seed in SEEDS:
        g = random_graph(seed, ops=[name], max_nodes=1)
        expanded = expand_all(g)
        verify(expanded)
        assert len(expanded) > 1 or name not in [n.op.name for n in expanded]
        for bindings in sample_bindings(g, seed):
            found = compare(g, expanded, bindings=bindings, seed=seed)
            compared += not found.not_compared
            assert all(c.ok for c in found.checks if c.precision == "wide"), f"{found.first_bad}\n{g}\n{expanded}"
    assert compared >= len(SEEDS)


def expand_all(g: Graph) -> Graph:
    """The graph with each composite node replaced by its definition, once."""
    out = g.clone()
    for node in list(out.nodes()):
        if node.op.expand is not None:
            for old, new in zip(node.results, Rewriter(out, node).expand_all(node), strict=True):
                out.replace(old, new)
            out.erase(node)
    return out


@pytest.mark.parametrize("name", INFERRED)
def test_text_round_trip(name: str) -> None:
    for seed in SEEDS:
        g = random_graph(seed, ops=[name], max_nodes=2)
        assert structurally_equal(parse_graph(print_graph(g)), g)


def test_pointwise_ops_exist_in_the_dtypes_that_pytorch_has() -> None:
    assert set(supported_dtypes("add")) == set(DTYPES)
    assert DType.named("b1") not in supported_dtypes("sub") and DType.named("i64") not in supported_dtypes("exp")
    assert DType.named("c64") in supported_dtypes("exp") and DType.named("c64") not in supported_dtypes("lt")


def test_every_op_has_a_line_of_documentation() -> None:
    assert [n for n, op in OPS.items() if not op.doc] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_pad_reads_any_order_of_memory(dtype: torch.dtype) -> None:
    x, attrs = torch.randint(0, 2, (2, 3, 5)).to(dtype), {"low": (0, 1, 0), "high": (0, 3, 1), "value": 1.0}
    want = torch.nn.functional.pad(x.float(), (0, 1, 1, 3), value=1.0).to(dtype)
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        back = [order.index(axis) for axis in range(3)]
        got = OPS["pad"].evaluate([x.permute(order).contiguous().permute(back)], attrs, EvalContext({}))
        assert torch.equal(got, want) and got.stride() == want.permute(order).contiguous().permute(back).stride()
