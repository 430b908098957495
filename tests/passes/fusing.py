"""What the tests of fusion share: run a pass on text, and compare values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from models import random_inputs

from graphopt.ir import Graph, evaluate, parse_graph, structurally_equal, verify
from graphopt.ir.text import print_graph
from graphopt.pass_manager import Pass, run_passes
from graphopt.rewrite import PassContext

SIZES = ({"B": 1, "S": 1, "N": 1}, {"B": 2, "S": 5, "N": 3})


def assert_same_values(before: Graph, after: Graph, tolerance: float = 1e-9) -> None:
    """Both graphs compute the same, in f64, at several sizes; inputs that are not finite after it count as equal."""
    for number, sizes in enumerate(SIZES):
        bindings = {s: sizes.get(s, 2) for s in before.symbols}
        inputs = random_inputs(before, bindings, seed=number)
        expected, found = (evaluate(g, inputs, bindings=bindings, wide=True) for g in (before, after))
        for e, f in zip(expected, found, strict=True):
            torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance, equal_nan=True)


def run(g: Graph, passes: Sequence[Pass], target: object = None) -> PassContext:
    """Run passes; check structure, values, the text's round trip, and that a second run changes nothing."""
    before, ctx = g.clone(), PassContext(target=target)
    run_passes(g, passes, ctx)
    verify(g)
    assert structurally_equal(parse_graph(print_graph(g)), g)
    assert_same_values(before, g)
    assert not run_passes(g, passes, PassContext(target=target)), f"not settled:\n{g}"
    return ctx


def fused(text: str, *passes: Pass) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Regions (kind, ops but constants) in order, and the reasons of missed remarks."""
    g = parse_graph(text)
    ctx = run(g, passes)
    return regions(g), [r.message for r in ctx.remarks if r.kind == "missed"]


def regions(g: Graph) -> list[tuple[str, list[str]]]:
    return [
        (n.attrs["kind"], [m.op.name for m in n.body.nodes() if m.op.name != "constant"])
        for n in g.nodes() if n.body is not None
    ]  # fmt: skip


def unfused(g: Graph) -> list[str]:
    return [n.op.name for n in g.nodes() if n.body is None]
