"""split-pools: maxima along one axis after the other; and which windows are read at once."""

from __future__ import annotations

import pytest

from graphopt.ir import parse_graph
from graphopt.passes.simplify import SplitPools
from graphopt.rewrite import PassContext
from graphopt.target import Target
from graphopt.testing import check_pass


def pooled(window: str, result: str, image: str = "B, 2, 9, 12", more: str = "") -> str:
    """Kernel, stride, padding and dilation, one list after the other."""
    attrs = ", ".join(f"{k} = [{v}]" for k, v in zip(("kernel", "stride", "padding", "dilation"), window.split(" | "), strict=True)) + more
    return f"""graph @g(%x: f32[{image}]) -> f32[{result}] where 1 <= B {{
      %0: f32[{result}] = max_pool(%x) {{{attrs}}}
      return %0
    }}"""


OVERLAPPING = pooled("5, 3 | 2, 1 | 2, 1 | 1, 2", "B, 2, 5, 10")


def test_before_and_after() -> None:
    check_pass(SplitPools(), OVERLAPPING, """graph @g(%x: f32[B, 2, 9, 12]) -> f32[B, 2, 5, 10] where 1 <= B {
      %0: f32[B, 2, 5, 12] = max_pool(%x) {kernel = [5, 1], stride = [2, 1], padding = [2, 0], dilation = [1, 1]}
      %1: f32[B, 2, 5, 10] = max_pool(%0) {kernel = [1, 3], stride = [1, 1], padding = [0, 1], dilation = [1, 2]}
      return %1
    }""")  # fmt: skip


@pytest.mark.parametrize(
    "what, before",
    [
        ("a window may reach over the end", pooled("3, 3 | 2, 2 | 1, 1 | 1, 1", "B, 2, 5, 7", more=", size = [5, 7]")),
        ("channels last", pooled("3, 3 | 1, 1 | 1, 1 | 1, 1", "B, 2, 9, 12", more=", channels_last = true")),
        ("volumes", pooled("3, 3, 3 | 2, 2, 2 | 1, 0, 1 | 1, 1, 1", "1, B, 3, 2, 5", "1, B, 5, 6, 9")),
        ("large and side by side", pooled("6, 6 | 6, 6 | 0, 0 | 1, 1", "B, 2, 1, 2")),
    ],
)  # fmt: skip
def test_windows(what: str, before: str) -> None:
    check_pass(SplitPools(), before)


def test_what_stays() -> None:
    small = pooled("2, 2 | 2, 2 | 0, 0 | 1, 1", "B, 2, 4, 6")
    check_pass(SplitPools(), small, fires=False, reason="4 steps a window would be 6")
    check_pass(SplitPools(), pooled("1, 9 | 1, 1 | 0, 0 | 1, 1", "B, 2, 9, 4"), fires=False)
    assert not SplitPools().run(parse_graph(OVERLAPPING), PassContext(target=Target.from_name("cuda:sm_90")))
