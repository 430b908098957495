"""output-order: a transposed result is copied by a kernel; and which results are left as they are."""

from __future__ import annotations

import pytest
import torch
from fusing import run
from torch import nn

import graphopt
from graphopt.ir import parse_graph
from graphopt.passes.layout import OutputOrder
from graphopt.testing import check_pass

HEAD = "graph @g(%x: f32[2, 5, 3]) -> "
REGION = """
      %0: f32[2, 5, 3] = fusion(%x) {kind = "pointwise"} body (%a: f32[2, 5, 3]) -> f32[2, 5, 3] {
        %0: f32[2, 5, 3] = exp(%a)
        return %0
      }
      %1: f32[2, 3, 5] = transpose(%0) {perm = [0, 2, 1]}"""
BEFORE = f"{HEAD}f32[2, 3, 5] {{{REGION}\n      return %1\n    }}"


def test_a_pointwise_region_writes_in_the_wanted_order() -> None:
    after = f"""{HEAD}f32[2, 3, 5] {{
      %0: f32[2, 3, 5] = fusion(%x) {{kind = "pointwise"}} body (%a: f32[2, 5, 3]) -> f32[2, 3, 5] {{
        %0: f32[2, 5, 3] = exp(%a)
        %1: f32[2, 3, 5] = transpose(%0) {{perm = [0, 2, 1]}}
        return %1
      }}
      return %0
    }}"""
    check_pass(OutputOrder(), BEFORE, after)


def test_any_other_result_is_copied() -> None:
    region = """
      %0: f32[2, 5, 3] = fusion(%x) {kind = "rowwise"} body (%a: f32[2, 5, 3]) -> f32[2, 5, 3] {
        %0: f32[2, 5, 3] = softmax(%a) {axis = -1}
        return %0
      }"""
    before = f"{HEAD}f32[2, 3, 5] {{{region}\n %1: f32[2, 3, 5] = transpose(%0) {{perm = [0, 2, 1]}}\n return %1\n}}"
    copied = """
      %1: f32[2, 3, 5] = fusion(%0) {kind = "pointwise"} body (%a: f32[2, 5, 3]) -> f32[2, 3, 5] {
        %0: f32[2, 3, 5] = transpose(%a) {perm = [0, 2, 1]}
        return %0
      }
      return %1
    }"""
    check_pass(OutputOrder(), before, f"{HEAD}f32[2, 3, 5] {{{region}{copied}")


def test_a_result_with_its_channels_last() -> None:
    last = "f32[2, 4, 5, 6; 120, 1, 24, 4]"
    before = f"""graph @g(%x: {last}) -> {last} {{
      %0: f32[2, 4, 5, 6] = fusion(%x) {{kind = "pointwise"}} body (%a: {last}) -> f32[2, 4, 5, 6] {{
        %0: f32[2, 4, 5, 6] = relu(%a)
        return %0
      }}
      return %0
    }}"""
    after = f"""graph @g(%x: {last}) -> {last} {{
      %0: f32[2, 5, 6, 4] = fusion(%x) {{kind = "pointwise"}} body (%a: {last}) -> f32[2, 5, 6, 4] {{
        %0: f32[2, 4, 5, 6] = relu(%a)
        %1: f32[2, 5, 6, 4] = transpose(%0) {{perm = [0, 2, 3, 1]}}
        return %1
      }}
      %1: f32[2, 4, 5, 6] = transpose(%0) {{perm = [0, 3, 1, 2]}}
      return %1
    }}"""
    check_pass(OutputOrder(), before, after)


def test_a_reshape_that_moves_elements() -> None:
    views = """
      {0}%0: f32[2, 3, 5, 7] = reshape(%x) {{shape = [2, 3, 5, 7]}}
      {0}%1: f32[2, 5, 3, 7] = transpose(%0) {{perm = [0, 2, 1, 3]}}
      {0}%2: f32[10, 21] = reshape(%1) {{shape = [10, 21]}}"""
    before = f"graph @g(%x: f32[2, 105]) -> (f32[10, 21], f32[10, 21]) {{{views.format('')}\n%3: f32[10, 21] = neg(%2)\n return %2, %3\n}}"
    after = f"""graph @g(%x: f32[2, 105]) -> (f32[10, 21], f32[10, 21]) {{
      %0: f32[10, 21] = fusion(%x) {{kind = "pointwise"}} body (%x: f32[2, 105]) -> f32[10, 21] {{{views.format('')}
        return %2
      }}
      %1: f32[10, 21] = neg(%0)
      return %0, %1
    }}"""
    check_pass(OutputOrder(), before, after)


@pytest.mark.parametrize(
    ("why", "before"),
    [
        ("it is wanted as it lies", BEFORE.replace("-> f32[2, 3, 5] {", "-> f32[2, 3, 5; 15, 1, 3] {", 1)),
        ("it is read elsewhere", BEFORE.replace("return %1", "%2: f32[2, 3, 5] = neg(%1)\n return %1, %2").replace(
            "-> f32[2, 3, 5] {", "-> (f32[2, 3, 5], f32[2, 3, 5]) {", 1)),
        ("its size is not known", BEFORE.replace("2, 5, 3", "B, 5, 3").replace("2, 3, 5", "B, 3, 5").replace(
            " {", " where 2 <= B {", 1).replace("[B, 5, 3] {\n", "[B, 5, 3] where 2 <= B {\n")),
        ("no memory moves", BEFORE.replace("2, 5, 3", "1, 5, 3").replace("2, 3, 5", "5, 1, 3").replace("[0, 2, 1]", "[1, 0, 2]")),
        ("its order has gaps", BEFORE.replace("-> f32[2, 3, 5] {", "-> f32[2, 3, 5; 40, 1, 4] {", 1)),
        ("it is of a weight", "graph @g(weight %x: f32[2, 5, 3]) -> f32[2, 3, 5] {\n"
         " %1: f32[2, 3, 5] = transpose(%x) {perm = [0, 2, 1]}\n return %1\n}"),
        ("no elements move", f"{HEAD}f32[3, 10] {{\n %1: f32[3, 2, 5] = reshape(%x) {{shape = [3, 2, 5]}}\n"
         " %2: f32[3, 10] = reshape(%1) {shape = [3, 10]}\n return %2\n}"),
    ],
)  # fmt: skip
def test_left_as_it_is(why: str, before: str) -> None:
    g = parse_graph(before)
    text = str(g)
    run(g, [OutputOrder()])
    assert str(g) == text, why


@pytest.mark.tvm
@torch.no_grad()
def test_a_network_of_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 40, 1)).eval()
    x = torch.randn(2, 3, 9, 11)
    made = graphopt.compile(model, [x])
    assert "restride" not in made.report.program
    got = made(x)
    torch.testing.assert_close(got, model(x))
    assert got.is_contiguous()


@pytest.mark.tvm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_what_only_moves_elements(dtype: torch.dtype) -> None:
    """Windows, shuffled channels, images with their channels last or first, and turned matrices, of odd sizes."""

    def windows(x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 3, 5, 2, 7, 11).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 5, 7, 11)

    def shuffled(x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 3, 5, 14, 11).transpose(1, 2).reshape(2, 15, 14, 11)

    def last(x: torch.Tensor) -> torch.Tensor:
        return x.to(memory_format=torch.channels_last)

    x = (torch.randn(2, 15, 14, 11) * 50).to(dtype)
    wide = (torch.randn(3, 37, 53) * 50).to(dtype)
    for fn, arg in ((windows, x), (shuffled, x), (last, x), (lambda x: x.permute(0, 2, 3, 1).contiguous(), x),
                    (lambda x: x.mT.contiguous(), wide), (lambda x: torch.where(x > 0, torch.zeros_like(x), x), last(x)),
                    (lambda x: torch.nn.functional.pixel_shuffle(x, 2), x[:, :12]),
                    (lambda x: torch.nn.functional.pixel_unshuffle(x[..., :10], 2), x)):  # fmt: skip
        torch._dynamo.reset()
        got, want = torch.compile(fn, backend="graphopt", options={"strict": True})(arg), fn(arg)
        assert got.stride() == want.stride()
        assert torch.equal(got, want)
        assert "restride" not in graphopt.reports()[-1].program


def folded(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Windows of an image, and their elements in another order."""
    y = x.reshape(5, 6, 3, 6).unfold(3, 2, 3)
    return y, y.reshape(2, 6, 5, 3, 2)


@pytest.mark.parametrize(
    ("program", "given"),
    [
        (folded, lambda: torch.randn(6, 5, 6, 3).permute(3, 2, 1, 0)),
        (lambda x: (x + 1).view(2, 0, 2).transpose(0, 2), lambda: torch.randn(0, 4)),
        (lambda x: (x + 1).view(5, 2, 0, 3).permute(3, 1, 0, 2), lambda: torch.randn(0, 5)),
        (lambda x: (x.transpose(0, 1), x.transpose(0, 1) * 1), lambda: torch.randn(3, 4)),
        (lambda x: (x.relu().transpose(1, 2), x.relu().sum(1)), lambda: torch.randn(3, 4, 5)),
    ],
)
def test_views_of_arguments_and_of_nothing(program, given) -> None:
    """An argument in another order than a result of it is copied as it stands; where no element lies, no order is asked for."""
    x = given()
    torch._dynamo.reset()
    with torch.no_grad():
        want, got = program(x), torch.compile(program, backend="graphopt")(x)
    for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (want, got)), strict=True):
        assert torch.equal(a, b) and (a.stride() == b.stride() or not a.numel())
