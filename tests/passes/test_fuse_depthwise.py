"""fuse-depthwise: a depthwise convolution joins the one before it; and which stay apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusing import regions
from torch import nn

import graphopt
from graphopt.ir import Builder, Graph, TensorType, Value, dims, types
from graphopt.ir.dims import Dim
from graphopt.pass_manager import run_passes
from graphopt.passes.fusion import Fuse, FuseDepthwise
from graphopt.passes.layout import ConvLayout, PackFilters
from graphopt.passes.simplify import DeadCode, Views
from graphopt.rewrite import PassContext
from graphopt.target import Target
from graphopt.testing import check_pass

ALWAYS = FuseDepthwise(always=True)
VIEWS = ("transpose", "reshape")


def fused(size: Dim = 6, channels: int = 5, filters: int = 16, kernel: int = 1, padding: int = 0, frozen: bool = True, groups: int = 1,
          stride: int = 2, pad: tuple[int, int] = (0, 1), between: Callable[[Builder, Value], Value] | None = None,
          shared: bool = False, dtype: types.DType = types.f32, multiplier: int = 1, last: bool = True) -> Graph:  # fmt: skip
    """A convolution and a depthwise one, as fusion leaves them; ``last``: the image has its channels last."""
    g = Graph("g", {"S": dims.Range(3, 64)} if not isinstance(size, int) else {})
    b = Builder(g)
    x = g.add_input(TensorType(dtype, (2, size, size, channels) if last else (2, channels, size, size)), "x")
    x = b.transpose(x, perm=(0, 3, 1, 2)) if last else x
    w = g.add_input(TensorType(dtype, (filters, channels // groups, kernel, kernel)), "w", frozen)
    y = b.conv(x, w, stride=(1, 1), padding=(padding,) * 2, dilation=(1, 1), groups=groups)
    first = y = b.relu(b.add(y, g.add_input(TensorType(dtype, (filters, 1, 1)), "b", True)))
    y = between(b, y) if between is not None else y
    if any(pad):
        y = b.pad(y, low=(0, 0, pad[0], pad[0]), high=(0, 0, pad[1], pad[1]), value=0.0)
    v = g.add_input(TensorType(dtype, (filters * multiplier, 1, 3, 3)), "v", True)
    y = b.relu(b.conv(y, v, stride=(stride,) * 2, padding=(0, 0), dilation=(1, 1), groups=filters))
    g.set_outputs([y, first] if shared else [y])
    run_passes(g, [ConvLayout(), Views(), DeadCode(), Fuse()], PassContext())
    return g


def test_two_regions_become_one() -> None:
    before = fused()
    assert [kind for kind, _ in regions(before)] == ["conv", "conv"]
    ((kind, ops),) = regions(check_pass(ALWAYS, before))
    assert (kind, [o for o in ops if o not in VIEWS]) == ("conv-depthwise", ["conv", "add", "relu", "pad", "conv", "relu"])


def test_a_photograph_with_zeros_around_it() -> None:
    assert [kind for kind, _ in regions(check_pass(ALWAYS, fused(channels=3, kernel=3, padding=1, last=False)))] == ["conv-depthwise"]


def test_a_value_that_both_read_is_read_once() -> None:
    g = Graph("g")
    b = Builder(g)
    x, w = g.add_input(TensorType(types.f32, (1, 4, 6, 6)), "x"), g.add_input(TensorType(types.f32, (16, 4, 1, 1)), "w", True)
    c, v = g.add_input(TensorType(types.f32, (16, 1, 1)), "c"), g.add_input(TensorType(types.f32, (16, 1, 3, 3)), "v", True)
    attrs = {"stride": (1, 1), "dilation": (1, 1)}
    y = b.add(b.conv(x, w, padding=(0, 0), **attrs), c)
    g.set_outputs([b.add(b.conv(y, v, padding=(1, 1), groups=16, **attrs), c)])
    run_passes(g, [ConvLayout(), Views(), DeadCode(), Fuse()], PassContext())
    (region,) = [n for n in check_pass(ALWAYS, g).nodes() if n.op.name == "fusion"]
    assert len(region.operands) == len(set(region.operands)) == 4


@pytest.mark.parametrize(
    ("reason", "case"),
    [
        ("not f32 of known sizes", {"size": dims.symbol("S")}),
        ("not f32", {"dtype": types.f64}),
        ("not a convolution of one group", {"channels": 4, "groups": 4}),
        ("computed at each call", {"frozen": False}),
        ("would have to be copied", {"kernel": 3, "padding": 1}),
        ("would have to be copied", {"last": False}),
        ("beside the image", {"pad": (3, 0)}),
        ("", {"shared": True}),
        ("", {"multiplier": 2}),
        ("", {"between": lambda b, y: b.flip(y, axes=(2,))}),
    ],
)
def test_what_stays_apart(reason: str, case: dict[str, Any]) -> None:
    check_pass(ALWAYS, fused(**case), fires=False, reason=reason or None)


SMALL = Target("cpu", "x86_64", features=("avx512f",), cores=2, cache=(32 << 10, 12 << 10, 0))
TILES = Target("cpu", "x86_64", features=("avx512f", "amx_tile", "amx_bf16"), cores=2, cache=(32 << 10, 12 << 10, 0))


@pytest.mark.parametrize(
    ("reason", "case", "target"),
    [
        (None, {"filters": 32}, SMALL),
        ("stays in the cache", {"filters": 16}, SMALL),
        ("do not fill vectors", {"filters": 40}, SMALL),
        (None, {"channels": 72, "filters": 64, "size": 16}, SMALL),
        ("AMX tiles take them", {"channels": 72, "filters": 64, "size": 16}, TILES),
    ],
)
def test_where_it_pays(reason: str | None, case: dict[str, Any], target: Target) -> None:
    g, ctx = fused(**case), PassContext(target=target)
    assert FuseDepthwise().run(g, ctx) is (reason is None)
    assert reason is None or any(reason in str(r) for r in ctx.remarks)


def test_both_weights_are_prepared() -> None:
    g = check_pass(ALWAYS, fused())
    assert PackFilters(width=16).run(g, PassContext())
    (region,) = [n for n in g.nodes() if n.op.name == "fusion"]
    assert sorted(v.shape for v in region.operands if len(v.shape) > 2) == [(1, 5, 16), (2, 6, 6, 5), (3, 3, 1, 16), (16, 1, 1)]
    assert not PackFilters(width=16).run(g, PassContext())


@pytest.mark.tvm
@torch.no_grad()
def test_a_mobile_network() -> None:
    def block(channels: int, stride: int) -> list[nn.Module]:
        wide = 4 * channels
        return [nn.Conv2d(channels, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6(), nn.ZeroPad2d((0, 1, 0, 1)),
                nn.Conv2d(wide, wide, 3, stride, padding=0, groups=wide), nn.ReLU6(), nn.Conv2d(wide, channels, 1)]  # fmt: skip

    model = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 16, 3, 2), nn.ReLU6(), *block(16, 2), *block(16, 1)).eval()
    x = torch.randn(1, 3, 56, 44)
    made = graphopt.compile(model, [x], strict=True, pipeline={"replace": {"fuse-depthwise": [ALWAYS]}})
    assert [k.kind for k in made.report.kernels].count("conv-depthwise") == 2
    torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-6)
