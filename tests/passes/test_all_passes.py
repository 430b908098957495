"""Every registered pass on random graphs over the whole op table: sound, equivalent, honest, settled on the second run."""

from __future__ import annotations

import pytest

import graphopt.passes  # noqa: F401  (registers the passes)
from graphopt.errors import EquivalenceError, GraphoptError
from graphopt.ir import Graph, structural_hash, verify
from graphopt.pass_manager import PASSES, PassContext, parse_pipeline, run_passes
from graphopt.passes.pipelines import default_pipeline
from graphopt.target import Target, detect
from graphopt.testing import check_settled, random_graph
from graphopt.testing.recipes.idioms import (
    biased_attention,
    causal_linear_attention,
    exact_product,
    linear_attention,
    masked_attention,
    normed_convolution,
    odd_product,
    sibling_products,
    wide_product,
)
from graphopt.value_check import ValueCheck, check_changed, numerics_of
from graphopt.verification import check_equivalent

NAMES = sorted(n for n in PASSES if not n.startswith("test-"))

FIRST = {  # passes that look for what another one makes
    "pack-weights": ("fuse",), "share-packed": ("fuse", "pack-weights"), "pack-filters": ("conv-layout", "fuse"),
    "winograd-filters": ("conv-layout", "fuse"), "output-order": ("conv-layout", "fuse"), "fuse-depthwise": ("conv-layout", "fuse"),
    "pack-quantized": ("quantize-weights", "fuse"), "halve-weights": ("fuse",), "turn-bias": ("fuse",),
    "weights-in-place": ("sibling-matmuls", "fuse"),
}  # fmt: skip


TARGETS = {  # of passes that do nothing on just any processor
    "pad-products": "cuda:sm_90", "split-reductions": "cuda:sm_90", "autocast": "cpu:znver4:2",
}  # fmt: skip
OPTIONS = {  # random graphs are small, and AMX tiles do without the transform
    "split-reductions": "{least=2}", "fuse-depthwise": "{always=True}", "winograd-filters": "{width=32}",
    "halve-weights": "{tiles=True}", "mask-blocks": "{least=64}", "turn-bias": "{lanes=2}", "pad-products": "{always=True}",
    "weights-in-place": "{rows=1000,depth=1}", "sibling-matmuls": "{always=True}",
}  # fmt: skip
ALSO = {  # what a pass looks for, where chance alone seldom makes it
    "linear-attention": (linear_attention,), "causal-linear-attention": (causal_linear_attention,), "mask-blocks": (masked_attention,),
    "turn-bias": (biased_attention,), "halve-weights": (wide_product,), "narrow-weights": (exact_product,),
    "pad-products": (odd_product,), "weights-in-place": (sibling_products,), "sibling-matmuls": (sibling_products,),
    "channel-norms": (normed_convolution,), "conv-layout": (normed_convolution,),
}  # fmt: skip


def check_on(name: str, seed: int) -> bool:
    """Check a pass on one random graph; whether it fired. Graphs that the pass does not take are left out."""
    g = random_graph(seed, max_nodes=10, symbolic=seed % 3 != 0, fusion=seed % 4 == 3, also=ALSO.get(name, ()))
    for earlier in FIRST.get(name, ()):
        (p,) = parse_pipeline(earlier + OPTIONS.get(earlier, ""))
        p.run(g, PassContext(target=detect()))
    target = Target.from_name(TARGETS[name]) if name in TARGETS else detect()
    (p,), new, ctx = parse_pipeline(name + OPTIONS.get(name, "")), g.clone(), PassContext(target=target, owns_weights=True, pass_name=name)
    try:
        p.requires(new)
    except GraphoptError:
        return False
    try:
        changed = p.run(new, ctx)
        p.ensures(new)
        verify(new)
        check_changed(p, structural_hash(g), new, changed)
        if changed:
            check_equivalent(g, new, numerics=numerics_of(p), what=f"pass {name}")
            check_settled(p, new)
    except (AssertionError, GraphoptError) as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\non\n{g}") from error
    return changed


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_keeps_random_graphs_right(name: str) -> None:
    for seed in range(40):
        check_on(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_pass_keeps_1000_random_graphs_right(name: str) -> None:
    fired = sum(check_on(name, seed) for seed in range(40, 1040))
    assert fired > 0, "random graphs hold nothing for this pass: add an idiom to graphopt.testing.recipes"


@pytest.mark.parametrize("level", [0, 1, 2])
def test_pipelines_keep_random_graphs_right(level: int) -> None:
    for seed in range(25):
        check_pipeline(level, random_graph(seed, max_nodes=10, symbolic=seed % 3 != 0), seed)


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 1, 2])
def test_pipelines_keep_1000_random_graphs_right(level: int) -> None:
    for seed in range(40, 1040):
        check_pipeline(level, random_graph(seed, max_nodes=12, symbolic=seed % 3 != 0), seed)


def check_pipeline(level: int, g: Graph, seed: int) -> None:
    before = g.clone()
    try:
        run_passes(g, default_pipeline(level), PassContext(target=detect()), [ValueCheck()])
        check_equivalent(before, g, what=f"pipeline {level}")
    except EquivalenceError as error:
        raise AssertionError(f"seed {seed}: {error}\non\n{before}") from error
