"""Dropout by a hash: what it is, in plain integers; that its choices look random; and its expansion."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.errors import ParseError
from graphopt.ir.interpreter import evaluate
from graphopt.ir.opset.dropout import kept
from graphopt.ir.text import parse_graph
from graphopt.passes.expand import Expand
from graphopt.testing import check_pass

SEEDS = (0, 1, -7, 2**62 + 12345)
RATES = (0.1, 0.5, 0.9)


def graph(rate: float, shape: str = "2, 3, 5") -> str:
    return f"""graph @g(%x: f32[{shape}], %seed: i64[]) -> f32[{shape}] {{
      %0: f32[{shape}] = dropout(%x, %seed) {{rate = {rate}}}
      return %0
    }}"""


def mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15) * 0xD35A2D97 % 2**32
    return x ^ x >> 15


def is_kept(seed: int, r: int, j: int, rate: float) -> bool:
    low, high = seed % 2**32, (seed >> 32) % 2**32
    low = mix(low ^ mix(high))
    high = mix(high ^ low)
    first = mix(mix(r ^ low) ^ high)
    second, column = mix(first ^ 0x9E3779B9), mix(mix(j ^ high) ^ 0x9E3779B9)
    x = (first ^ column) * 0x21F0AAAD % 2**32
    return (x ^ x >> 15 ^ second) * 0xD35A2D97 % 2**32 >= round(rate * 2**32)


@pytest.mark.parametrize("seed", SEEDS)
def test_definition(seed: int) -> None:
    expected = [[is_kept(seed, r, j, 0.4) for j in range(9)] for r in range(20)]
    assert kept(torch.tensor(seed), (4, 5, 9), 0.4).reshape(20, 9).tolist() == expected
    x = torch.randn(2, 3, 5)
    (y,) = evaluate(parse_graph(graph(0.25)), [x, torch.tensor(seed)])
    assert torch.equal(y, torch.where(kept(torch.tensor(seed), (2, 3, 5), 0.25), x / 0.75, 0.0)) and (y == 0).any()


def test_ends() -> None:
    shape, seed = (7, 300), torch.tensor(3)
    assert bool(kept(seed, shape, 0.0).all()) and not kept(seed, shape, 1 - 2**-40).any()


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seed", SEEDS)
def test_choices_look_independent(seed: int, rate: float) -> None:
    """The share, and products of two choices or four, within six standard deviations; correlations of all pairs of rows and columns."""
    deviation = math.sqrt(rate * (1 - rate))
    one, other = ((kept(torch.tensor(s), (4, 256, 256), rate).double() - (1 - rate)) / deviation for s in (seed, seed + 1))

    def fair(x: torch.Tensor) -> None:
        assert abs(float(x.sum())) < 6 * math.sqrt(x.numel())

    fair(one)
    fair(one * other)
    fair(one[:-1] * one[1:])
    rows = one.reshape(1024, 256)
    fair(rows[1:] * rows[:-1])
    fair(rows[:, 1:] * rows[:, :-1])
    fair(rows[1:, 1:] * rows[:-1, :-1] * rows[1:, :-1] * rows[:-1, 1:])
    for x in (rows, rows.T):
        products = x @ x.T / math.sqrt(x.shape[1])
        apart = products[~torch.eye(len(x), dtype=torch.bool)]
        assert abs(float(apart.square().mean()) - 1) < 0.05 and float(apart.abs().max()) < 9
        assert abs(float((x.mean(1) * math.sqrt(x.shape[1])).var()) - 1) < 0.4


@pytest.mark.parametrize("text", [graph(0.3), graph(0.0), graph(0.9, "7"), graph(0.3, "B, 4").replace("{", "where 1 <= B {", 1)])
def test_expansion(text: str) -> None:
    g = check_pass(Expand(keep=()), text)
    assert "dropout" not in {n.name for n in g.nodes()}


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_what_is_no_rate(rate: float) -> None:
    with pytest.raises(ParseError, match="not from 0 to less than 1"):
        parse_graph(graph(rate))


def test_what_is_no_seed() -> None:
    with pytest.raises(ParseError, match="which is not i64"):
        parse_graph(graph(0.5).replace("i64[]", "i32[]"))
