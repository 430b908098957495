"""widen-convolutions: halves are multiplied in f32 on a CPU, with the weight cast once; on a GPU they stay."""

from __future__ import annotations

import pytest

from graphopt.ir import Graph, parse_graph
from graphopt.pass_manager import PassContext
from graphopt.passes.precision import WidenConvolutions
from graphopt.target import Target
from graphopt.testing import check_pass

WINDOW = "stride = [2, 2], padding = [1, 1], dilation = [1, 1]"


def convolution(dtype: str, acc: str = "", op: str = "conv", more: str = "") -> Graph:
    out = acc or dtype
    size, attrs = ("((H - 1)//2) + 1", "") if op == "conv" else ("2*H - 1", ", output_padding = [0, 0]")
    attrs += f", acc = {acc}" if acc else ""
    return parse_graph(f"""graph @g(%x: {dtype}[B, 4, H, H], weight %w: {dtype}[4, 4, 3, 3]) -> {out}[B, 4, {size}, {size}]
    where 1 <= B <= 64, 2 <= H {{
      %0: {out}[B, 4, {size}, {size}] = {op}(%x, %w) {{{WINDOW}{attrs}{more}}}
      return %0
    }}""")


def test_before_and_after() -> None:
    check_pass(WidenConvolutions(), convolution("bf16"), """graph @g(%x: bf16[B, 4, H, H], weight %w: bf16[4, 4, 3, 3])
    -> bf16[B, 4, ((H - 1)//2) + 1, ((H - 1)//2) + 1] where 1 <= B <= 64, 2 <= H {
      %0: f32[B, 4, H, H] = cast(%x) {dtype = f32}
      %1: f32[4, 4, 3, 3] = cast(%w) {dtype = f32}
      %2: f32[B, 4, ((H - 1)//2) + 1, ((H - 1)//2) + 1] = conv(%0, %1) {stride = [2, 2], padding = [1, 1], dilation = [1, 1]}
      %3: bf16[B, 4, ((H - 1)//2) + 1, ((H - 1)//2) + 1] = cast(%2) {dtype = bf16}
      return %3
    }""")  # fmt: skip


@pytest.mark.parametrize("op", ["conv", "conv_transpose"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("acc", ["", "f32"])
def test_sums_stay_in_f32_where_they_were(op: str, dtype: str, acc: str) -> None:
    made = check_pass(WidenConvolutions(), convolution(dtype, acc, op))
    (node,) = (n for n in made.nodes() if n.name == op)
    assert node.result.dtype.name == "f32" and node.attrs["acc"] is None
    assert [n.name for n in made.nodes()].count("cast") == (2 if acc else 3)


def test_an_image_that_two_read_is_cast_once() -> None:
    g = parse_graph("""graph @g(%x: f16[2, 4, 5], weight %v: f16[3, 4, 3], weight %w: f16[3, 4, 3]) -> (f16[2, 3, 3], f16[2, 3, 3]) {
      %0: f16[2, 3, 3] = conv(%x, %v) {stride = [1], padding = [0], dilation = [1]}
      %1: f16[2, 3, 3] = conv(%x, %w) {stride = [1], padding = [0], dilation = [1]}
      return %0, %1
    }""")
    made = check_pass(WidenConvolutions(), g)
    assert sum(n.name == "cast" and n.operands[0] is made.inputs[0] for n in made.nodes()) == 1


def test_wider_floats_stay() -> None:
    for dtype in ("f32", "f64"):
        check_pass(WidenConvolutions(), convolution(dtype), fires=False)


def test_a_gpu_multiplies_halves() -> None:
    assert not WidenConvolutions().run(convolution("f16"), PassContext(target=Target.from_name("cuda:sm_90")))
