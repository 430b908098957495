"""The operator workloads that TVM ships for its tuners (``te_workload.CONFIGS``), as modules and functions of PyTorch.

Images and filters lie as TVM's workloads have them, channels last; PyTorch's own variants may choose any layout, and may hold their
weights as oneDNN likes them best. Weights are parameters, so whoever compiles a module may pack them once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Call = Callable[[], Tensor]
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass
class TeWorkload:
    """One operator.

    Attributes:
        name: TVM's, with the number of the configuration: ``C2D.0``.
        module, args: what is compiled, and called.
        variants: ways to call it in PyTorch, by name.
        peer: what TVM's own function of that name takes, in its order and layouts.
        channels_first: whether results of the variants have their channels in front; those of the module, as TVM's, have them last.
        flops: of one call.
    """

    name: str
    module: nn.Module
    args: tuple[Tensor, ...]
    variants: dict[str, Call]
    peer: Sequence[Tensor]
    channels_first: bool = False
    flops: float = 0.0

    def plain(self, result: Tensor) -> Tensor:
        """A variant's result as TVM lays it out."""
        return (result.movedim(1, -1) if self.channels_first else result).contiguous()

    def reference(self) -> Tensor:
        """The result in f64, as TVM lays it out."""
        wide = self.module.double()(*(x.double() for x in self.args))
        self.module.float()
        return wide  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Conv:
    """Sizes of a convolution, as in TVM's configurations."""

    n: int
    space: tuple[int, ...]
    inner: int
    outer: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @staticmethod
    def of(rank: int, numbers: Sequence[int]) -> Conv:
        n, *space = numbers[: rank + 1]
        return Conv(n, tuple(space), *numbers[rank + 1 :])

    def made(self) -> nn.Module:
        kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        kind = kinds[len(self.space)]
        return kind(self.inner, self.outer, self.kernel, self.stride, self.padding, self.dilation, self.groups, bias=False)


class ChannelsLast(nn.Module):
    """A module on images ``[N, *S, C]``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(-1, 1)).movedim(1, -1).contiguous()


class ConvBnRelu(nn.Module):
    """``relu((conv(x) + bias) * scale + offset)``."""

    def __init__(self, conv: nn.Module, outer: int) -> None:
        super().__init__()
        self.conv = conv
        self.bias, self.scale, self.offset = (nn.Parameter(torch.randn(outer)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scale, bias, offset = (v[:, None, None] for v in (self.scale, self.bias, self.offset))
        return F.relu((self.conv(x) + bias) * scale + offset)


class Function(nn.Module):
    """A function of tensors."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Tensor) -> Tensor:
        return self.run(*args)


def _taps(filters: Tensor) -> Tensor:
    """A filter ``[O, I, *K]`` as TVM has it: ``[*K, I, O]``."""
    return filters.permute(*range(2, filters.dim()), 1, 0).contiguous()


def _conv(name: str, rank: int, numbers: Sequence[int]) -> TeWorkload:
    form = Conv.of(rank, numbers)
    conv = form.made()
    x = torch.randn(form.n, form.inner, *form.space)
    out = conv(x)
    flops = 2.0 * out.numel() * form.kernel**rank * form.inner // form.groups
    variants: dict[str, Call] = {"contiguous": lambda: conv(x), **_prepacked(form, conv.weight, None, x, "none")}
    if rank in LAST:
        y, other = x.contiguous(memory_format=LAST[rank]), form.made()
        other.load_state_dict(conv.state_dict())
        other.to(memory_format=LAST[rank])
        variants["channels_last"] = lambda: other(y)
    return _images(name, conv, x, variants, [_taps(conv.weight)], flops)


def _images(name: str, module: nn.Module, x: Tensor, variants: dict[str, Call], weights: Sequence[Tensor], flops: float) -> TeWorkload:
    """The workload of a module on images ``[N, C, *S]``: compiled on images with their channels last; PyTorch's variants give theirs
    with the channels in front, in any layout, and nothing is copied for it."""
    last = x.movedim(1, -1).contiguous()
    return TeWorkload(name, ChannelsLast(module), (last,), variants, (last, *weights), True, flops)


def _prepacked(form: Conv, w: Tensor, bias: Tensor | None, x: Tensor, after: str) -> dict[str, Call]:
    """The convolution with its weight packed by oneDNN beforehand, as Inductor's freezing does it."""
    ops, flat = torch.ops.mkldnn, len(form.space) == 1
    if flat:  # oneDNN's packed weights are of two axes or three
        x, w = x[:, :, None], w[:, :, None]
    rank = x.dim() - 2
    padding, stride, dilation = (
        [fill] * (rank - len(form.space)) + [v] * len(form.space)
        for v, fill in ((form.padding, 0), (form.stride, 1), (form.dilation, 1))
    )
    packed = ops._reorder_convolution_weight(w.detach(), padding, stride, dilation, form.groups, list(x.shape))
    out: dict[str, Call] = {}
    for name, y in (("prepacked", x), ("prepacked, channels last", x.contiguous(memory_format=LAST[rank]))):
        call = partial(ops._convolution_pointwise, y, packed, bias, padding, stride, dilation, form.groups, after, [], "")
        out[name] = _flat(call) if flat else call
    return out


def _flat(call: Call) -> Call:
    return lambda: call().squeeze(2)


def _depthwise(name: str, numbers: Sequence[int]) -> TeWorkload:
    n, h, w, c, kernel, stride, padding = numbers
    made = _conv(name, 2, (n, h, w, c, c, kernel, stride, padding, 1, c))
    weight = made.module.inner.weight  # [C, 1, K, K]
    made.peer = (made.peer[0], weight[:, 0].permute(1, 2, 0)[None].contiguous())  # type: ignore[index, union-attr, operator]
    return made


def _transposed(name: str, numbers: Sequence[int]) -> TeWorkload:
    n, h, w, inner, outer, kernel, stride, padding = numbers

    def made() -> nn.Module:
        return nn.ConvTranspose2d(inner, outer, kernel, stride, padding, bias=False)

    conv, other = made(), made()
    other.load_state_dict(conv.state_dict())
    other.to(memory_format=torch.channels_last)
    x = torch.randn(n, inner, h, w)
    y = x.contiguous(memory_format=torch.channels_last)
    variants: dict[str, Call] = {"contiguous": lambda: conv(x), "channels_last": lambda: other(y)}
    pads, strides, ones, ops = [padding] * 2, [stride] * 2, [1, 1], torch.ops.mkldnn
    packed = ops._reorder_convolution_transpose_weight(conv.weight.detach(), pads, [0, 0], strides, ones, 1, list(x.shape))
    for layout, image in (("prepacked", x), ("prepacked, channels last", y)):
        rest = (packed, None, pads, [0, 0], strides, ones, 1, "none", [], "")
        variants[layout] = partial(ops._convolution_transpose_pointwise, image, *rest)
    filters = conv.weight.permute(2, 3, 0, 1).contiguous()  # type: ignore[operator]
    flops = 2.0 * x.numel() * outer * kernel**2
    return _images(name, conv, x, variants, [filters], flops)


def _conv_bn_relu(name: str, numbers: Sequence[int]) -> TeWorkload:
    form = Conv.of(2, numbers)
    module = ConvBnRelu(form.made(), form.outer)
    x = torch.randn(form.n, form.inner, *form.space)
    y = x.contiguous(memory_format=torch.channels_last)
    other = ConvBnRelu(form.made(), form.outer)
    other.load_state_dict(module.state_dict())
    other.to(memory_format=torch.channels_last)
    folded = module.conv.weight * module.scale[:, None, None, None]  # type: ignore[operator]
    bias = module.bias * module.scale + module.offset
    variants: dict[str, Call] = {
        "contiguous": lambda: module(x), "channels_last": lambda: other(y),
        "folded": lambda: F.relu_(F.conv2d(x, folded, bias, form.stride, form.padding)),
        **_prepacked(form, folded, bias, x, "relu"),
    }  # fmt: skip
    weights = [_taps(module.conv.weight), module.bias, module.offset, module.scale]  # type: ignore[arg-type]
    flops = 2.0 * module(x).numel() * form.kernel**2 * form.inner
    return _images(name, module, x, variants, weights, flops)


def _function(name: str, run: Callable[..., Tensor], args: tuple[Tensor, ...], flops: float,
              **others: Callable[..., Tensor]) -> TeWorkload:  # fmt: skip
    def bound(f: Callable[..., Tensor]) -> Call:
        return lambda: f(*args)

    return TeWorkload(name, Function(run), args, {k: bound(f) for k, f in {"plain": run, **others}.items()}, args, flops=flops)


def _matmul(name: str, numbers: Sequence[int]) -> TeWorkload:
    b, n, m, k = numbers
    return _function(name, torch.bmm, (torch.randn(b, n, k), torch.randn(b, k, m)), 2.0 * b * n * m * k, matmul=torch.matmul)


def _attention_scores(name: str, numbers: Sequence[int]) -> TeWorkload:
    b, length, heads, width = numbers
    args = torch.randn(b, length, heads, width), torch.randn(b, length, heads, width)
    return _function(
        name, lambda q, v: q.permute(0, 2, 1, 3) @ v.permute(0, 2, 3, 1), args, 2.0 * b * heads * length * length * width,
        einsum=lambda q, v: torch.einsum("blhd,bmhd->bhlm", q, v),
    )  # fmt: skip


def _norm(name: str, numbers: Sequence[int]) -> TeWorkload:
    return _function(name, lambda a: (a * a).sum((1, 2)).sqrt(), (torch.randn(*numbers),), 2.0 * torch.Size(numbers).numel(),
                     vector_norm=lambda a: torch.linalg.vector_norm(a, dim=(1, 2)))  # fmt: skip


def _softmax(name: str, numbers: Sequence[int]) -> TeWorkload:
    return _function(name, lambda a: torch.softmax(a, 1), (torch.randn(*numbers),), 0.0)


_MAKERS: dict[str, Callable[[str, Sequence[int]], TeWorkload]] = {
    "C1D": lambda name, p: _conv(name, 1, p), "C2D": lambda name, p: _conv(name, 2, p), "C3D": lambda name, p: _conv(name, 3, p),
    "DEP": _depthwise, "DIL": lambda name, p: _conv(name, 2, p), "GMM": _matmul, "GRP": lambda name, p: _conv(name, 2, p),
    "T2D": _transposed, "CBR": _conv_bn_relu, "TBG": _attention_scores, "NRM": _norm, "SFM": _softmax,
}  # fmt: skip
NAMES = tuple(_MAKERS)


def made(name: str) -> TeWorkload:
    """A workload by its name, ``C2D.0``: the same random numbers in every process."""
    from tvm.s_tir.meta_schedule.testing.te_workload import CONFIGS

    kind, _, number = name.partition(".")
    torch.manual_seed(0)
    with torch.no_grad():
        return _MAKERS[kind](name, CONFIGS[kind][1][int(number or 0)])
