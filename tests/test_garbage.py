"""The garbage collector while a model is compiled."""

from __future__ import annotations

import gc

import pytest
import torch

import graphopt
from graphopt import model
from graphopt.garbage import uncollected


def test_nothing_is_collected_meanwhile() -> None:
    with pytest.raises(KeyError), uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled(), "the outer one goes on"
        raise KeyError
    assert gc.isenabled()


def test_who_has_turned_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("own_weights", [False, True])
def test_a_model_that_gives_its_weights_away_is_compiled_with_collections(own_weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    compile_fx = model.compile_fx
    monkeypatch.setattr(model, "compile_fx", lambda *a, **k: seen.append(gc.isenabled()) or compile_fx(*a, **k))
    graphopt.compile(torch.nn.Linear(4, 4), torch.randn(2, 4), own_weights=own_weights)
    assert seen == [own_weights] and gc.isenabled()
