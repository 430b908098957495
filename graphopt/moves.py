"""How far another model's outputs are from a model's: the errors that ledgers and searches tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from graphopt.calibration import inferring

EXACT = 1e-3  # how far what only rounds otherwise may move an output in f32, relative to its norm


def moves(model: nn.Module, other: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[float]:
    """The errors of another model's floating-point outputs, in order, each relative to the norm of the model's."""
    with torch.no_grad(), inferring(model), inferring(other):
        both = [tree_leaves(m(*args, **kwargs)) for m in (model, other)]
    want, got = ([x for x in xs if isinstance(x, torch.Tensor) and x.is_floating_point()] for xs in both)
    return (relative_error([(g.double(), w.double())]) for g, w in zip(got, want, strict=True))


def move(model: nn.Module, other: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:
    """The error of the first floating-point output; None if there is none."""
    return next(moves(model, other, args, kwargs), None)


def relative_error(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Of results beside those wanted, relative to the norm of these. Where both are the same infinity, none; inf if one is nan alone."""
    lost = norm = 0.0
    for got, want in pairs:
        same = (got == want) | (got.isnan() & want.isnan())
        lost += float(torch.where(same, 0.0, got - want).square().sum())
        norm += float(want[want.isfinite()].square().sum())
    error = (lost / max(norm, 1e-150)) ** 0.5
    return error if error == error else float("inf")
