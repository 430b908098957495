"""Small graphs of well-known models, for tests of passes. Weights are inputs, as capture makes them."""

from __future__ import annotations

import math

import torch

from graphopt.ir import Builder, Graph, Value, dims, types
from graphopt.ir.dims import Dim, Range
from graphopt.ir.types import DType, TensorType


class Model:
    """A graph under construction, with the layers that models are made of."""

    def __init__(self, name: str, dtype: DType = types.f32) -> None:
        self.g, self.dtype, self.count = Graph(name), dtype, 0
        self.b = Builder(self.g)

    def symbol(self, name: str, lo: int = 1, hi: int = 64) -> Dim:
        self.g.symbols[name] = Range(lo, hi)
        return dims.symbol(name)

    def input(self, *shape: Dim, dtype: DType | None = None, name: str = "x") -> Value:
        return self.g.add_input(TensorType(dtype or self.dtype, shape), name)

    def weight(self, *shape: int) -> Value:
        self.count += 1
        return self.g.add_input(TensorType(self.dtype, shape), f"w{self.count}", weight=True)

    def linear(self, x: Value, out: int, bias: bool = True) -> Value:
        """x @ w^T + b, as torch.nn.Linear."""
        y = self.b.matmul(x, self.b.transpose(self.weight(out, int(x.shape[-1])), perm=(1, 0)))
        return self.b.add(y, self.weight(out)) if bias else y

    def heads(self, x: Value, n: int) -> Value:
        """[B, S, n * D] to [B, n, S, D]."""
        batch, seq, size = x.shape
        return self.b.transpose(self.b.reshape(x, shape=(batch, seq, n, int(size) // n)), perm=(0, 2, 1, 3))

    def join_heads(self, x: Value) -> Value:
        batch, n, seq, size = x.shape
        return self.b.reshape(self.b.transpose(x, perm=(0, 2, 1, 3)), shape=(batch, seq, dims.mul(n, size)))

    def layer_norm(self, x: Value) -> Value:
        size = int(x.shape[-1])
        return self.b.layer_norm(x, self.weight(size), self.weight(size))

    def bert_layer(self, x: Value, heads: int, mask: Value | None = None) -> Value:
        b, size = self.b, int(x.shape[-1])
        q, k, v = (self.heads(self.linear(x, size), heads) for _ in range(3))
        scores = b.mul(b.matmul(q, b.transpose(k, perm=(0, 1, 3, 2))), 1 / math.sqrt(size // heads))
        if mask is not None:
            scores = b.add(scores, mask)
        context = self.join_heads(b.matmul(b.softmax(scores, axis=3), v))
        x = self.layer_norm(b.add(self.linear(context, size), x))
        return self.layer_norm(b.add(self.linear(b.gelu(self.linear(x, 4 * size)), size), x))

    def llama_layer(self, x: Value, cos: Value, sin: Value, heads: int, groups: int) -> Value:
        b, size = self.b, int(x.shape[-1])
        batch, seq, head = x.shape[0], x.shape[1], size // heads
        h = b.rms_norm(x, self.weight(size))
        q = b.rope(self.heads(self.linear(h, size, bias=False), heads), cos, sin)
        k = b.rope(self.heads(self.linear(h, groups * head, bias=False), groups), cos, sin)
        v = self.heads(self.linear(h, groups * head, bias=False), groups)
        k, v = (self.repeat(t, heads // groups, (batch, groups, seq, head)) for t in (k, v))
        out = b.attention(q, k, v, scale=1 / math.sqrt(head), causal=True)
        x = b.add(x, self.linear(self.join_heads(out), size, bias=False))
        h = b.rms_norm(x, self.weight(size))
        gated = b.mul(b.silu(self.linear(h, 3 * size, bias=False)), self.linear(h, 3 * size, bias=False))
        return b.add(x, self.linear(gated, size, bias=False))  # type: ignore[no-any-return]

    def repeat(self, x: Value, times: int, shape: tuple[Dim, ...]) -> Value:
        """Repeat each head, as grouped-query attention does."""
        batch, groups, seq, head = shape
        wide = self.b.broadcast_to(self.b.reshape(x, shape=(batch, groups, 1, seq, head)), shape=(batch, groups, times, seq, head))
        return self.b.reshape(wide, shape=(batch, dims.mul(groups, times), seq, head))

    def done(self, *outputs: Value) -> Graph:
        self.g.set_outputs(outputs)
        return self.g


def bert(layers: int = 1, size: int = 32, heads: int = 4, symbolic: bool = False, seq: int = 6) -> Graph:
    """A stack of BERT layers over ``[B, S, size]``, with an additive mask."""
    m = Model("bert")
    batch, length = (m.symbol("B"), m.symbol("S")) if symbolic else (2, seq)
    x, mask = m.input(batch, length, size), m.input(batch, 1, 1, length, name="mask")
    for _ in range(layers):
        x = m.bert_layer(x, heads, mask)
    return m.done(x)


def llama(layers: int = 1, size: int = 32, heads: int = 4, groups: int = 2, symbolic: bool = False, seq: int = 6) -> Graph:
    """A stack of Llama layers over ``[B, S, size]``: RMSNorm, RoPE, grouped-query attention, SwiGLU."""
    m = Model("llama")
    batch, length = (m.symbol("B"), m.symbol("S")) if symbolic else (2, seq)
    x = m.input(batch, length, size)
    cos, sin = (m.input(1, 1, length, size // heads, name=n) for n in ("cos", "sin"))
    for _ in range(layers):
        x = m.llama_layer(x, cos, sin, heads, groups)
    return m.done(x)


def random_inputs(g: Graph, bindings: dict[str, int] | None = None, seed: int = 0) -> list[torch.Tensor]:
    """One random f64-ready tensor an input; symbols take ``bindings``."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for v in g.inputs:
        shape = [dims.evaluate(d, bindings or {}) for d in v.shape]
        if v.dtype.is_float:
            out.append(torch.randn(shape, generator=generator).to(v.dtype.torch))
        elif v.dtype.is_bool:
            out.append(torch.rand(shape, generator=generator) > 0.5)
        else:
            out.append(torch.randint(0, 3, shape, generator=generator).to(v.dtype.torch))
    return out
