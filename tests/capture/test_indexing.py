"""Reading and writing by index, running sums, padding and diagonals: captured by the table, exactly eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.capture.helpers import check, compiled

X = torch.arange(120.0).reshape(4, 5, 6)
I, J = torch.tensor([1, -1, 3]), torch.tensor([0, 4, -5])


def test_several_indices() -> None:
    check(lambda x, i, j: (x[i, j], x[:, i, j], x[i, :, j], x[i[:, None], j], x[i, j, j[:2][:, None]], x[None][:, i, j]), X, I, J)


def test_narrow_indices() -> None:
    check(lambda x, i: (x[i], x[i, :, i], x[i[:2], i[1:]]), X, torch.tensor([-2, 3, 0], dtype=torch.int32))


def test_puts() -> None:
    def fn(x: torch.Tensor, i: torch.Tensor, j: torch.Tensor, v: torch.Tensor) -> Any:
        a, b, c, d = (x.clone() for _ in range(4))
        a[i, j], b[:, j], c[i, :, j] = v, 7.0, v[:, :5]
        d[x > 50] = -1.0
        e = x.index_put((i, j), v, accumulate=True).index_add(1, i.clamp(0, 3), x[:, :3], alpha=2)
        f = x.index_copy(1, i.abs(), x[:, :3]).index_fill(2, j, 3.0).put(i, v[:, 0], accumulate=True)
        return a, b, c, d, e, f, x.take(j), x.index_reduce(0, i.abs(), x[:3], "amax", include_self=False)

    check(fn, X, I, J, torch.randn(3, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16], ids=str)
def test_scatters(dtype: torch.dtype) -> None:
    def fn(x: torch.Tensor, i: torch.Tensor, s: torch.Tensor) -> Any:
        out = [x.scatter(0, i, s), x.scatter(0, i, 2), x.scatter_add(0, i, s), x.scatter(0, i, s, reduce="multiply")]
        return [*out, *(x.scatter_reduce(0, i, s, r, include_self=self) for r in ("sum", "prod", "amax") for self in (True, False))]

    x, s = (torch.arange(n) % 5 - 1 for n in (24, 15))
    check(fn, x.reshape(4, 6).to(dtype), torch.tensor([[1, 2, 0, 3], [3, 2, 1, 0]]), s.reshape(3, 5).to(dtype))


def test_means_by_index() -> None:
    i = torch.tensor([[1, 2, 1], [1, 0, 1]])
    check(lambda x, i, s: (x.scatter_reduce(0, i, s, "mean"), x.scatter_reduce(0, i, s, "mean", include_self=False)), X[0], i, X[1])


def test_a_masked_scatter_whose_source_is_long_enough() -> None:
    check(lambda x, y: x.masked_scatter(x > 60, y), X, torch.randn(120))
    check(lambda x, y: x.masked_scatter(x > 118, y), X, torch.randn(60), library=("aten.masked_scatter.default",))


def test_running_sums_and_extremes() -> None:
    y = torch.tensor([[1.0, 1.0, 3.0, float("nan"), 2.0], [5.0, 4.0, 5.0, 4.0, 6.0]])
    check(lambda x: (x.cumsum(0), x.cumprod(1), x.cummax(1), x.cummin(0).indices, x.logcumsumexp(1), x[0, 0].cumsum(0)), y)
    check(lambda x: (x.cumsum(0), x.cummax(1), x.cumsum(1, dtype=torch.float32)), torch.tensor([[1, 2], [3, 1]], dtype=torch.int32))


def test_padding() -> None:
    check(lambda x: (F.pad(x, (2, 1), mode="reflect"), F.pad(x, (2, 1, 0, 3), mode="replicate"), F.pad(x, (1, 2), mode="circular")), X)
    check(lambda x: F.pad(x, (-1, 2, 1, -2), mode="replicate"), X, library=("aten.replication_pad2d.default",))


def test_diagonals_and_blocks() -> None:
    def diagonals(x: torch.Tensor) -> Any:
        return x.diagonal(1, 0, 2).clone(), x[0].diagonal(-2) + 1, torch.diag_embed(x[0], -1, 0, 2), x[0].trace(), x[0, 0].diag(1)

    check(diagonals, X)
    check(lambda x: x.diagonal_scatter(torch.ones(4, 4), -1, 1, 2), X)
    check(lambda x: (x.rot90(1, (0, 2)), x.rot90(-1), x.rot90(2), x.unfold(1, 3, 2) + 0, x.unfold(2, 2, 2) + 0), X)
    check(lambda x: (F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2), F.channel_shuffle(x, 4)), torch.randn(2, 8, 4, 6))


WINDOWS = [
    {"kernel_size": 2, "stride": 2}, {"kernel_size": (2, 3), "stride": (2, 3)}, {"kernel_size": 3}, {"kernel_size": 1, "stride": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2}, {"kernel_size": (2, 3), "dilation": (2, 1), "padding": (0, 2), "stride": (3, 2)},
    {"kernel_size": 2, "stride": 4, "padding": 1}, {"kernel_size": (3, 1), "dilation": (3, 1), "stride": (2, 1), "padding": (2, 0)},
    {"kernel_size": 2, "stride": 2, "dilation": 3},
]  # fmt: skip


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows_side_by_side(window: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 8, 12)
    columns = F.unfold(x, **window)
    for dtype in (torch.float32, torch.bfloat16):
        check(lambda x: (F.unfold(x, **window), F.unfold(x[0], **window) + 1), x.to(dtype))
        check(lambda y: F.fold(y, (8, 12), **window), columns.to(dtype))
    check(lambda y: F.fold(y, (8, 12), **window), columns[0])


def test_windows_of_many_places_are_left_to_pytorch() -> None:
    x = torch.randn(1, 2, 12, 12)
    check(lambda x: F.unfold(x, 9), x, library=("aten.im2col.default",))
    check(lambda x: F.fold(x, (12, 12), 9), F.unfold(x, 9), library=("aten.col2im.default",))
    check(lambda x: F.unfold(x, 12, stride=12), x)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_channel_shuffle_keeps_the_layout(groups: int) -> None:
    for x in (torch.randn(2, 8, 6), torch.randn(2, 8, 4, 6), torch.randn(2, 8, 2, 3, 4)):
        check(lambda x: F.channel_shuffle(x, groups), x)
        channels_last = x.transpose(1, -1).contiguous().transpose(1, -1) if x.dim() == 3 else x.to(
            memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        )  # fmt: skip
        check(lambda x: (F.channel_shuffle(x, groups), F.channel_shuffle(x, groups).relu()), channels_last)


@pytest.mark.parametrize("mode", ["linear", "bilinear", "trilinear", "bicubic"])
@pytest.mark.parametrize("size", [3, 5, 8])
@pytest.mark.parametrize("align_corners", [False, True])
def test_resizing_beside_infinite_elements(mode: str, size: int, align_corners: bool) -> None:
    rank = {"linear": 1, "trilinear": 3}.get(mode, 2)
    x = torch.randn(1, 2, *[4] * rank)
    x.view(-1)[[1, x.numel() // 2, -1]] = torch.tensor([float("inf"), float("-inf"), float("inf")])
    check(lambda x: F.interpolate(x, size=[size] * rank, mode=mode, align_corners=align_corners), x)


def test_indices_of_one_element_each() -> None:
    i, j = torch.tensor([0]), torch.tensor([2])
    check(lambda x, i, j: (x[i, j], x[:, i, j], x[i[:, None], j], x[i, j[:, None, None]]), X[:1], i, j)


@pytest.mark.parametrize("bad", [4, -5])
def test_out_of_range_raises(bad: int) -> None:
    fn = compiled(lambda x, i: x[:, :4, :4][i, i] + 1)
    with pytest.raises(IndexError), torch.no_grad():
        fn(X, torch.tensor([0, bad]))
