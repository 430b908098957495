"""Memory for packed weights is got ready before a model is captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import devices, model
from graphopt.capture import dynamo
from graphopt.capture.export import multiplied
from graphopt.options import Options
from graphopt.pages import Pages


class Words(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words, self.inner, self.scale = nn.Embedding(100, 64), nn.Linear(64, 48), nn.Parameter(torch.ones(48))
        self.head = nn.Linear(64, 100, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.words(x)
        return self.inner(h) * self.scale, self.head(h)


def given(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[Any]:
    found: list[Any] = []

    def prestart(options: Options, examples: Any, packed: Sequence[torch.Tensor] = ()) -> Pages:
        found.append(packed)
        return Pages()

    monkeypatch.setattr(module, "prestart", prestart)
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_factors_of_products_are_told_from_what_is_looked_up(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = Words(tied).eval(), torch.arange(3)
    expected = {id(m.inner.weight), id(m.head.weight)}
    assert {*map(id, multiplied(m))} == expected
    torch._dynamo.reset()  # the graph is the same one, whatever is tied
    through_dynamo, exported = given(monkeypatch, dynamo), given(monkeypatch, model)
    with torch.no_grad():
        torch.compile(m, backend="graphopt")(x)
        graphopt.compile(m, x)
    assert [{*map(id, packed)} for packed in (*through_dynamo, *exported)] == [expected, expected]


def test_none_is_expected_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    found = given(monkeypatch, dynamo)
    torch.compile(Words(False), backend="graphopt")(torch.arange(3))[0].sum().backward()
    assert [*map(list, found)] == [[]]


def test_who_gives_weights_away_has_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(devices, "Pages", lambda ahead=0: asked.append(ahead) or Pages())
    w = torch.zeros(64, 64)
    packed = [w, w.t(), torch.zeros(8, 8)]
    for options in (Options(), Options(own_weights=True), Options(freeze=False), Options(backend="eager")):
        devices.prestart(options, [w], packed)
    assert asked == [64 * 64 * 4 + 8 * 8 * 4, 0, 0, 0]


def test_packed_weights_lie_in_what_was_got_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Pages] = []

    def pages(ahead: int = 0) -> Pages:
        made.append(Pages(max(ahead, 1 << 25)))
        return made[-1]

    monkeypatch.setattr(devices, "Pages", pages)
    m, x = nn.Linear(1024, 500), torch.randn(64, 1024)
    compiled = graphopt.compile(m, x)
    (own,) = made
    assert own._ahead is not None and own._next == 0
    expected = m(x)
    assert torch.allclose(compiled(x), expected, atol=1e-4) and own._ahead is None, "taken, and the rest given back"
    with torch.no_grad():
        m.weight.mul_(2)
    assert torch.allclose(compiled(x), m(x), atol=1e-4), "packed again, elsewhere"
