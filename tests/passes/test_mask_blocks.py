"""mask-blocks: a table for masks that are the model's own, and for no others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import GraphoptError
from graphopt.ir import Graph, evaluate, parse_graph
from graphopt.pass_manager import PassContext
from graphopt.passes.attention import MaskBlocks
from graphopt.target import Target
from graphopt.testing import check_pass

BEFORE = """
graph @g(%q: f32[1, 2, 64, 8], %k: f32[1, 2, 1024, 8], %v: f32[1, 2, 1024, 8], weight %m: b1[64, 1024]) -> f32[1, 2, 64, 8] {
  %o: f32[1, 2, 64, 8] = attention(%q, %k, %v, %m) {scale = 0.5}
  return %o
}"""
AFTER = """
graph @g(%q: f32[1, 2, 64, 8], %k: f32[1, 2, 1024, 8], %v: f32[1, 2, 1024, 8], weight %m: b1[64, 1024]) -> f32[1, 2, 64, 8] {
  %b: b1[4, 16, 32, 32] = reshape(%m) {shape = [4, 16, 32, 32]}
  %a: b1[4, 32] = any(%b) {axes = [1, 3]}
  %s: u8[4, 32] = cast(%a) {dtype = u8}
  %d: b1[4, 16, 32, 32] = reshape(%m) {shape = [4, 16, 32, 32]}
  %e: b1[4, 32] = all(%d) {axes = [1, 3]}
  %c: u8[] = constant() {value = 3, dtype = u8}
  %t: u8[4, 32] = where(%e, %c, %s)
  %o: f32[1, 2, 64, 8] = attention(%q, %k, %v, %m, %t) {scale = 0.5}
  return %o
}"""


def test_before_and_after() -> None:
    check_pass(MaskBlocks(), BEFORE, AFTER)


def _table(g: Graph, mask: Tensor) -> Tensor:
    """What the graph's table holds."""
    new = g.clone()
    node = next(n for n in new.nodes() if n.name == "attention")
    new.set_outputs([node.operands[4]])
    return evaluate(new, [torch.zeros([int(d) for d in v.shape]) if not v.weight else mask for v in new.inputs])[0]


def test_what_stands_in_a_table() -> None:
    """Sizes that fill no block: what is missing neither hides a pair nor shows one."""
    g = check_pass(MaskBlocks(), BEFORE.replace("64", "70").replace("1024", "1001").replace("b1[", "b1[1, 1, "))
    mask = torch.zeros(70, 1001, dtype=torch.bool)
    mask[:, 32:64] = True
    mask[64:, 992:] = True
    mask[20, 100] = True
    found = _table(g, mask[None, None])
    want = torch.zeros(5, 32, dtype=torch.uint8)
    want[:, 1], want[4, 31], want[1, 3] = 3, 3, 1
    assert torch.equal(found, want[None, None])


def test_one_table_for_all_layers() -> None:
    text = BEFORE.replace("return %o", "%p: f32[1, 2, 64, 8] = attention(%o, %k, %v, %m) {scale = 0.5}\n  return %p")
    g = check_pass(MaskBlocks(), text)
    assert sum(n.name == "any" for n in g.nodes()) == 1


@pytest.mark.parametrize(("text", "why"), [
    (BEFORE.replace("weight %m", "%m"), "the mask is not made of weights alone"),
    (BEFORE.replace("1024", "1000"), None),  # hardly anything to look through
    (BEFORE.replace("64, ", "8, ").replace("1024", "16384"), None),  # the kernel for few queries does not look
    (BEFORE.replace("b1[64, 1024]", "b1[1, 1024]"), None),  # one row for all
    (BEFORE.replace("{scale = 0.5}", '{scale = 0.5, empty = "mean"}'), None),  # all blocks are visited
    (BEFORE.replace("1024", "N").replace("-> f32[1, 2, 64, 8]", "-> f32[1, 2, 64, 8] where 1 <= N"), None),
    (AFTER, None),
])  # fmt: skip
def test_must_not_fire(text: str, why: str | None) -> None:
    check_pass(MaskBlocks(), text, fires=False, reason=why)


@pytest.mark.parametrize(("text", "why"), [
    (AFTER.replace("(%q, %k, %v, %m, %t)", "(%q, %k, %v, %t)"), "a table of no mask"),
    (AFTER.replace(") -> f32", ", %n: b1[1, 1024]) -> f32", 1).replace("%v, %m, %t", "%v, %n, %t"), "is no table of"),
])  # fmt: skip
def test_tables_that_fit_no_mask(text: str, why: str) -> None:
    with pytest.raises(GraphoptError, match=why):
        parse_graph(text)


def test_not_for_gpus() -> None:
    assert not MaskBlocks().run(parse_graph(BEFORE), PassContext(target=Target.from_name("cuda:sm_90")))


class Masked(nn.Module):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.mask)


def test_a_mask_that_changes() -> None:
    """The table follows the buffer."""
    x = [torch.randn(1, 2, 256, 32, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    block = torch.arange(256) // 64
    model = Masked(block[:, None] == block)
    compiled = graphopt.compile(model, tuple(x))
    assert "16, 8] = where(" in compiled.report.text_after
    torch.testing.assert_close(compiled(*x), model(*x))
    model.mask.copy_(block[:, None] != block)
    torch.testing.assert_close(compiled(*x), model(*x))
