"""The default schedule of attention is in its own space, and fits, for every size of heads on every target."""

from __future__ import annotations

import pytest
from attention_graphs import attention
from test_triton_offline import TARGETS
from triton_check import templates

from graphopt.backends.triton.offline import compile_offline
from graphopt.target import Target


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("depth", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("queries", [1, 40, 1024])
def test_defaults_are_in_their_space(queries: int, depth: int, dtype: str, target: str) -> None:
    t = Target.from_name(target)
    w, found = templates(attention(queries, 1024, depth, depth, heads=4, dtype=dtype), "attention", t)
    for template in found:
        space = template.space(w, t)
        assert space.rejection(space.default()) is None


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "name"), [("bf16", "cuda:sm_80"), ("bf16", "cuda:sm_89"), ("bf16", "cuda:sm_100"),
                                             ("bf16", "hip:gfx942"), ("f32", "cuda:sm_89")])  # fmt: skip
def test_defaults_of_wide_heads_fit(dtype: str, name: str) -> None:
    t = Target.from_name(name)
    w, (template, *_) = templates(attention(1024, 1024, 256, 256, heads=4, dtype=dtype), "attention", t)
    found = compile_offline(template.emit(w, template.space(w, t).default(), t), t)
    assert found.shared <= t.shared_memory and (found.spills == 0 or dtype == "f32")
