"""Weights of f32 that are bf16 in truth: many checkpoints were trained in bf16 and are stored, or loaded, as f32.

Such a weight is marked when a model is compiled (:attr:`~graphopt.ir.graph.Value.exact`), by looking at each of its elements. Passes rely
on the mark; so the weights of later calls, changed ones, are looked at again before anything is made of them. One that does not hold to
its mark any more is :class:`Widened`, and the graph is compiled anew, without marks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensor

from graphopt.capture.captured import Captured, TensorArgument
from graphopt.errors import GraphoptError
from graphopt.ir import types
from graphopt.ir.graph import Graph

LEAST = 1 << 10  # elements of the smallest weight that is looked at
_PART = 1 << 20  # elements at a time
_FIRST = 1 << 12  # elements that are looked at before all of them are: enough to find that a weight is not exact


class Widened(GraphoptError, RuntimeError):
    """A weight holds elements that the narrower float of its mark does not."""


def is_bf16(w: torch.Tensor) -> bool:
    """Whether all elements of an f32 weight are finite and bf16, and none of them a denormal number."""
    if w.dtype != torch.float32 or w.device.type != "cpu" or w.numel() < LEAST or isinstance(w, FakeTensor) or w.layout != torch.strided:
        return False
    bits = w.detach().contiguous().view(-1).view(torch.int32)
    starts = range(_FIRST, len(bits), _PART)
    return _fits(bits[:_FIRST]) and all(_fits(bits[i : i + _PART]) for i in starts)


def _fits(bits: torch.Tensor) -> bool:
    if bool((bits & 0xFFFF).any()):
        return False
    exponent = bits & 0x7F800000
    return not bool(((exponent == 0x7F800000) | ((exponent == 0) & (bits & 0x7FFFFFFF != 0))).any())


def exact_weights(values: Mapping[int, torch.Tensor]) -> set[int]:
    """Which of these weights are bf16: matrices, filters and tables of f32, each of whose elements is looked at."""
    return {i for i, w in values.items() if w.ndim >= 2 and is_bf16(w)}


def mark(captured: Captured, exact: Collection[int]) -> None:
    """Mark the weights of a captured graph that are bf16.

    Args:
        exact: positions of the arguments that :func:`exact_weights` found.
    """
    for i, argument in enumerate(captured.arguments):
        if isinstance(argument, TensorArgument) and i in exact:
            v = captured.graph.inputs[argument.input]
            if v.weight:
                v.exact = types.bf16


def unmarked(graph: Graph) -> Graph:
    """A copy without marks."""
    copy = graph.clone()
    for v in copy.inputs:
        v.exact = None
    return copy
