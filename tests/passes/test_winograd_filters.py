"""winograd-filters: what is transformed, what is taken back, and which convolutions keep their weight."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.ir import Builder, Graph, TensorType, dims, types
from graphopt.ir.dims import Dim
from graphopt.pass_manager import run_passes
from graphopt.passes.fusion import Fuse
from graphopt.passes.layout import ConvLayout, PackFilters, WinogradFilters
from graphopt.passes.layout.winograd import restore
from graphopt.passes.simplify import DeadCode, Views
from graphopt.rewrite import PassContext
from graphopt.target import Target
from graphopt.testing import check_pass

SMALL = WinogradFilters(width=4, squares=4)


def fused(channels: int = 4, filters: int = 8, size: Dim = 6, kernel: int = 3, frozen: bool = True, dtype: types.DType = types.f32,
          **attrs: Any) -> Graph:  # fmt: skip
    """A convolution with an epilogue, as fusion leaves it."""
    g = Graph("g", {s: dims.Range(1, None) for s in ("S",)} if not isinstance(size, int) else {})
    b, groups = Builder(g), attrs.get("groups", 1)
    x = g.add_input(TensorType(dtype, (2, channels, size, size)), "x")
    w = g.add_input(TensorType(dtype, (filters, channels // groups, kernel, kernel)), "w", frozen)
    y = b.conv(x, w, **{"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), **attrs})
    g.set_outputs([b.relu(b.add(y, g.add_input(y.type, "r")))])
    run_passes(g, [ConvLayout(), Views(), DeadCode(), Fuse()], PassContext())
    return g


def region(g: Graph) -> Any:
    (fusion,) = [n for n in g.nodes() if n.op.name == "fusion"]
    return fusion


def test_a_transformed_weight_is_taken_back() -> None:
    fusion = region(check_pass(SMALL, fused()))
    assert (2, 16, 4, 4) in [v.shape for v in fusion.operands] and not any(v.weight for v in fusion.operands)
    names = [n.op.name for n in fusion.body.nodes()]
    assert names.count("conv") == 1 and names.count("sub") == names.count("concat") == 2, names


def test_it_is_not_packed_again() -> None:
    g = check_pass(SMALL, fused())
    assert not PackFilters(width=4).run(g, PassContext())


def test_a_shared_weight_is_transformed_once() -> None:
    g = Graph("g")
    b = Builder(g)
    x, w = g.add_input(TensorType(types.f32, (1, 4, 6, 6)), "x"), g.add_input(TensorType(types.f32, (4, 4, 3, 3)), "w", True)
    attrs = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    g.set_outputs([b.conv(b.exp(b.conv(x, w, **attrs)), w, **attrs)])
    run_passes(g, [ConvLayout(), Views(), DeadCode(), Fuse()], PassContext())
    after = check_pass(SMALL, g)
    both = [n for n in after.nodes() if n.op.name == "fusion" and n.attrs["kind"] == "conv"]
    assert len(both) == 2 and len({v for n in both for v in n.operands if v.type.rank == 4 and v.shape[1] == 16}) == 1


@pytest.mark.parametrize(
    "reason, case",
    [
        ("unknown size", {"size": dims.symbol("S")}),
        ("do not fill", {"filters": 6}),
        ("squares", {"size": 2}),
        ("", {"stride": (2, 2)}),
        ("", {"dilation": (2, 2), "padding": (2, 2)}),
        ("", {"groups": 2}),
        ("", {"kernel": 1, "padding": (0, 0)}),
        ("", {"frozen": False}),
        ("", {"dtype": types.f64}),
    ],
)
def test_what_keeps_its_weight(reason: str, case: dict[str, Any]) -> None:
    check_pass(SMALL, fused(**case), fires=False, reason=reason or None)


def test_the_target_says_how_wide_a_panel_is() -> None:
    for feature, nr in (("avx512f", 32), ("avx2", 16)):
        g, ctx = fused(64, 32, 12), PassContext(target=Target("cpu", "x86_64", features=(feature,)))
        assert WinogradFilters().run(g, ctx) and (32 // nr, 16, 64, nr) in [v.shape for v in region(g).operands]
    for target, g in ((Target("cuda", "sm_90"), fused(64, 32, 12)), (Target("cpu", "x86_64"), fused(16, 16, 12))):
        ctx = PassContext(target=target)
        assert not WinogradFilters().run(g, ctx)
    assert "16 and 16 channels" in ctx.remarks[-1].message


def test_amx_tiles_take_the_weight_in_panels() -> None:
    target = Target.from_name("cpu:sapphirerapids:2")
    for case, thirds in (((64, 64, 12), True), ((64, 64, dims.symbol("S")), False), ((64, 16, 12, 1), False)):
        kernel = case[3] if len(case) > 3 else 3
        g, ctx = fused(*case[:3], kernel=kernel, padding=(kernel // 2,) * 2), PassContext(target=target)  # type: ignore[arg-type]
        assert not WinogradFilters().run(g, ctx) and PackFilters().run(g, ctx)
        assert ("AMX" in ctx.remarks[0].message) is thirds
        width = 32 if thirds else target.panel_width(int(case[1]), 4)  # type: ignore[call-overload]
        assert [v.shape[2] for v in region(g).operands if v.type.rank == 3] == [width]


def test_only_the_whole_inverse_is_recognised() -> None:
    """The kernel's form is the one that restore() writes, and no other difference of rows."""
    from graphopt.backends.forms.convform import ConvForm, conv_of

    for swapped in (False, True):
        g = Graph("body")
        b = Builder(g)
        u = g.add_input(TensorType(types.f32, (1, 16, 4, 4)), "u")
        w = restore(b, u)
        if swapped:
            node = w.producer.operands[1].producer  # type: ignore[union-attr]
            g.set_operand(node, 0, node.operands[1])  # type: ignore[arg-type, union-attr]
        x = g.add_input(TensorType(types.f32, (1, 6, 6, 4)), "x")
        g.set_outputs([b.conv(x, w, stride=(1, 1), padding=(1, 1), dilation=(1, 1), channels_last=True)])
        form = conv_of(g)
        assert isinstance(form, ConvForm) and (form.transformed is u) is not swapped
