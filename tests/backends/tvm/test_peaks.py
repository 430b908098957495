"""The kernels behind the machine's limits compute what they say: otherwise what they measure means nothing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tvm")
from graphopt.backends.tvm import peaks
from graphopt.backends.tvm.build import build_in_process
from graphopt.target import Target, detect

pytestmark = pytest.mark.tvm


def test_multiply_adds_are_all_made() -> None:
    target = detect()
    lanes, chains, steps = target.lanes(4), peaks.fma_chains(target), 50
    kernel = build_in_process(peaks.multiply_add(target, steps), target)
    factor, shift = torch.rand(lanes) * 0.5 + 0.5, torch.rand(lanes)
    out = torch.full((peaks.TASKS, chains, lanes), float("nan"))

    kernel(torch.cat([factor, shift]), out.view(-1))

    expected = (torch.arange(chains, dtype=torch.float64) / chains)[:, None].expand(chains, lanes)
    for _ in range(steps):
        expected = expected * factor.double() + shift.double()
    torch.testing.assert_close(out.double(), expected.expand_as(out), rtol=1e-5, atol=0)


def test_every_element_is_read() -> None:
    target = detect()
    part = 8 * target.lanes(4) * 3
    kernel = build_in_process(peaks.read(target, peaks.TASKS * part), target)
    x = torch.randint(0, 100, (peaks.TASKS, part)).float()
    out = torch.full((peaks.TASKS, 8 * target.lanes(4)), float("nan"))

    kernel(x.view(-1), out.view(-1))

    assert torch.equal(out.sum(1), x.sum(1))  # small integers: exact


@pytest.mark.parametrize("features", [(), ("avx2",), ("avx512f",)])
def test_the_sums_fit_into_the_registers(features: tuple[str, ...]) -> None:
    target = Target("cpu", "x86_64", features=features)
    assert 8 <= peaks.fma_chains(target) < target.vector_registers  # latency 4 times 2 units at least; two hold the constants
