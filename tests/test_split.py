"""SplitQuant: parts that sum to the weight, their errors, and what a ledger says."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import UsageError
from graphopt.split import ranges, split


def test_parts_are_of_disjoint_ranges() -> None:
    """The sum is exact, and limits are halfway between means of what they divide: a fixed point of k-means."""
    w = torch.randn(30, 70, generator=torch.Generator().manual_seed(0))
    low, middle, high = split(w)
    assert torch.equal(low + middle + high, w) and not (low * middle).any() and not (low * high).any() and not (middle * high).any()
    means = torch.stack([p[p != 0].double().mean() for p in (low, middle, high)])
    torch.testing.assert_close(ranges(w).double(), (means[1:] + means[:-1]) / 2, rtol=1e-3, atol=1e-3)
    assert float(low[low != 0].max()) <= float(middle[middle != 0].min()) < float(middle[middle != 0].max()) <= float(high[high != 0].min())


@pytest.mark.parametrize("w", [torch.zeros(4, 40), torch.ones(4, 40), torch.eye(40)[:4] - 1.0])
def test_few_values(w: torch.Tensor) -> None:
    assert torch.equal(torch.stack(split(w)).sum(0), w)


def test_two_bits_in_parts() -> None:
    """Less than half the error for three times the bytes; the compiled model is what eager says, by the kernel of integers."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(192, 256), nn.GELU(), nn.Linear(256, 128)).eval(), torch.randn(4, 192)
    plain, parts = (graphopt.quantize(model, (x,), scheme="int2-weight", method=m, measure=False) for m in ("rtn", "split"))
    assert parts.ledger.output_error < plain.ledger.output_error / 2
    assert [e.bytes for e in parts.ledger.entries] == [3 * e.bytes for e in plain.ledger.entries]
    assert parts.ledger.entries[0].scheme == "int2-weight, in 3 parts"
    compiled = graphopt.compile(parts, (x,), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), parts(x), rtol=1e-4, atol=1e-5)
    assert {json.loads(k.schedule)["template"] for k in compiled.report.kernels if k.kind == "matmul"} == {"quantized"}


def test_the_ledger_knows_whose_kernels_those_are() -> None:
    model, x = nn.Sequential(nn.Linear(256, 256)).eval(), torch.randn(1, 256)
    (entry,) = graphopt.quantize(model, (x,), scheme="int2-weight", method="split", revert=False).ledger.entries
    assert entry.kernel == "quantized" and entry.seconds and entry.float_seconds
    assert entry.bytes_read >= entry.bytes  # of all parts, several kernels


def test_weights_alone() -> None:
    with pytest.raises(UsageError, match="rounds weights alone"):
        graphopt.quantize(nn.Linear(256, 256), scheme="int8-dynamic", method="split")
    broken = nn.Linear(256, 256)
    broken.weight.data[3, 3] = float("nan")
    with pytest.raises(UsageError, match="1 of its 65536 elements"):
        graphopt.quantize(nn.Sequential(broken), scheme="int2-weight", method="split")
