"""The exponential of a softmax: tiny numbers are left out only where they stand beside a sum that is at least one."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.backends.forms.support import is_softmax_exp
from graphopt.ir import parse_graph

TEXT = """graph @m(%x: f32[4, 4]) -> f32[{result}] {{
  %m: f32[{shape}] = max(%x) {{axes = [{over}], keepdims = {keepdims}}}
  %s: f32[4, 4] = sub(%x, %m)
  %e: f32[4, 4] = exp(%s)
  %t: f32[4, 1] = sum(%e) {{axes = [-1], keepdims = true}}
  %y: f32[{result}] = {end}
{log}  return {out}
}}"""


def found(shape: str = "4, 1", over: str = "1", keepdims: str = "true", result: str = "4, 4", end: str = "div(%e, %t)",
          log: bool = False) -> bool:  # fmt: skip
    more, out = (f"  %l: f32[{result}] = log(%y)\n", "%l") if log else ("", "%y")
    graph = parse_graph(TEXT.format(shape=shape, over=over, keepdims=keepdims, result=result, end=end, log=more, out=out))
    return is_softmax_exp(next(n for n in graph.nodes() if n.name == "exp"))


def test_softmax_and_its_logarithm() -> None:
    assert found()
    assert found(result="4, 1", end="log(%t)")


@pytest.mark.parametrize(
    "form",
    [
        {"shape": "1, 1", "over": "0, 1"},  # a row may be far below the largest of all: its sum is tiny, too
        {"shape": "1, 4", "over": "0"},
        {"shape": "4", "keepdims": "false"},  # broadcast to other rows: positive exponents
        {"end": "div(%t, %e)"},
        {"end": "div(%e, %x)"},
        {"end": "mul(%e, %t)"},
        {"log": True},  # an entropy: log 0 is no small number
    ],
    ids=str,
)
def test_others_keep_their_small_numbers(form: dict[str, Any]) -> None:
    assert not found(**form)
