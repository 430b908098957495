"""Calling an exported model: arguments by position or by name, one tensor as the example, and what is said of other calls."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from graphopt.capture.export import exported_graph
from graphopt.errors import CaptureError


class Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return x if y is None else x + y


A, B = torch.randn(2, 3), torch.ones(3)


def test_arguments_by_position_and_by_name_are_the_same() -> None:
    exported = exported_graph(Two(), (A, B))
    for args, kwargs in (((A, B), {}), ((A,), {"y": B}), ((), {"y": B, "x": A})):
        assert [t is u for t, u in zip(exported.flatten(args, kwargs), (A, B), strict=True)] == [True, True]


def test_named_in_the_example_and_given_by_position() -> None:
    exported = exported_graph(Two(), (A,), {"y": B})
    assert exported.flatten((A, B), {})[1] is B


def test_arguments_are_looked_at_after_a_call_that_was_right() -> None:
    """The second call is compared with the first by native code; what differs is looked at by itself."""
    exported = exported_graph(Two(), (A, B))
    for _ in range(2):
        assert exported.flatten((A, B), {})[0] is A
    with pytest.raises(RuntimeError):
        exported.flatten((torch.nested.nested_tensor([B, B]), B), {})
    turned = torch.randn(3, 2).t()
    assert exported.flatten((turned, B), {})[0] is turned  # another layout is no other argument
    for wrong, error in (((A.double(), B), ValueError), ((A[:1], B), ValueError), ((A, 3), TypeError), ((A,), TypeError)):
        with pytest.raises(error):
            exported.flatten(wrong, {})
    assert exported.flatten((A, B), {})[1] is B


def test_one_tensor_is_an_example() -> None:
    assert exported_graph(Two(), A).flatten((A,), {})[0] is A


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((A, B, B), {}, "given 3 positional arguments"),
        ((A,), {"x": A}, "given 1 positional argument and the keywords x"),
        (([A, B],), {}, r"given 1 positional argument \(a list of 2\)"),
    ],
)
def test_another_form_is_told_in_a_line(args: tuple[object, ...], kwargs: dict[str, object], words: str) -> None:
    with pytest.raises(TypeError, match=f"compiled for 2 positional arguments, and was {words}$"):
        exported_graph(Two(), (A, B)).flatten(args, kwargs)


def test_a_missing_example_is_told_without_a_line_of_the_standard_library() -> None:
    with pytest.raises(CaptureError, match=r"missing a required argument: 'x'$"):
        exported_graph(Two())


def test_a_graph_that_was_taken_is_kept_by_nobody_else() -> None:
    exported = exported_graph(Two(), (A, B))
    graph = exported.take_graph()
    assert len(graph.graph.nodes) > 3
    held = weakref.ref(graph)
    del graph
    gc.collect()
    assert held() is None and exported.flatten((A, B), {})[0] is A
