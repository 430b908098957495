"""Idioms: what passes look for, and what random choice alone would seldom make."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from graphopt.ir import Builder, Graph, dims, types
from graphopt.ir.graph import copy_nodes
from graphopt.ir.ops import Trait
from graphopt.ir.ops import op as op_named
from graphopt.ir.types import TensorType
from graphopt.testing.pool import FLOATS, Pool
from graphopt.testing.recipes.layers import convolution
from graphopt.testing.recipes.registry import RECIPES


def _spelled_out(pool: Pool) -> None:
    """A composite by its definition, as a model may spell it."""
    name = pool.pick(["softmax", "layer_norm", "rms_norm", "gelu", "silu", "rope", "log_softmax", "attention", "mean"])
    value = RECIPES[name](pool, name)
    node = value.producer
    assert node is not None
    pool.values[-1] = Builder(pool.graph, before=node).expand(node)
    pool.graph.erase(node)


def _conv_and_norm(pool: Pool) -> None:
    x = convolution(pool, False)
    channels = x.shape[1]
    mean, var = pool.input(x.dtype, (channels,), keep=False), pool.input(x.dtype, (channels,), keep=False)
    for v in (*x.producer.operands[1:], mean, var) if x.producer is not None else ():
        v.weight = True
    pool.add("batch_norm", [x, mean, var])


def normed_convolution(pool: Pool) -> None:
    """A convolution, and a norm over groups of its channels behind it."""
    x = convolution(pool, False)
    channels = x.shape[1]
    groups = [n for n in range(1, channels + 1) if channels % n == 0] if isinstance(channels, int) else [1]
    affine = [pool.input(x.dtype, (channels,), keep=False) for _ in range(pool.pick([0, 1, 2]))]
    pool.add("group_norm", [pool.add("relu", [x]) if pool.flag() else x, *affine], groups=pool.pick(groups))


def _wide_conv(pool: Pool) -> None:
    """A 3x3 convolution of channels enough for Winograd's transform."""
    x, w = pool.input(types.f32, (1, 32, 11, 12), keep=False), pool.input(types.f32, (32, 32, 3, 3), keep=False)
    w.type, w.weight = w.type.logical, True
    pool.add("conv", [x, w], stride=(1, 1), padding=(1, 1), dilation=(1, 1))


def _mobile_block(pool: Pool) -> None:
    """A convolution that makes more channels, and a depthwise one that reads them, with zeros around the image or without."""
    x, w = pool.input(types.f32, (1, 3, 5, 7), keep=False), pool.input(types.f32, (16, 3, 1, 1), keep=False)
    v = pool.input(types.f32, (16, 1, 3, 3), keep=False)
    for weight in (w, v):
        weight.type, weight.weight = weight.type.logical, True
    y = pool.builder.relu(pool.builder.conv(x, w, stride=(1, 1), padding=(0, 0), dilation=(1, 1)))
    if pool.flag():
        y = pool.builder.pad(y, low=(0, 0, 0, 1), high=(0, 0, 1, 1), value=0.0)
    pool.add("conv", [y, v], stride=(pool.pick([1, 2]),) * 2, padding=(1, 1), dilation=(1, 1), groups=16)


def _frozen_conv(pool: Pool) -> None:
    """Convolutions whose weights a pass prepares for a kernel of their own."""
    (_mobile_block if pool.flag() else _wide_conv)(pool)


def _linear(pool: Pool) -> None:
    """A linear layer as capture sees it: leading axes flattened, a weight, a bias, an activation."""
    x = pool.operand(FLOATS, least=2, most=3)
    lead, width = x.shape[:-1], pool.pick([pool.static_size(), 48, 70])
    if isinstance(x.shape[-1], int):
        w = pool.input(x.dtype, (width, x.shape[-1]), keep=False)
        w.type, w.weight = w.type.logical, True
        w = pool.builder.transpose(w, (1, 0))
    else:
        w = pool.input(x.dtype, (x.shape[-1], width), keep=False)
    y = pool.add("matmul", [pool.builder.reshape(x, (dims.numel(lead), x.shape[-1])), w])
    y = pool.add("add", [y, pool.input(x.dtype, (width,))])
    if pool.flag():
        y = pool.add("reshape", [y], shape=(*lead, width))
    pool.add(pool.pick(["relu", "gelu", "tanh"]), [y])


def _large_weight(pool: Pool) -> None:
    """A product with a weight that is worth quantizing, and another of the same rows."""
    x = pool.input(types.f32, (pool.size(), 128), keep=False)
    for _ in range(pool.pick([1, 2])):
        w = pool.input(types.f32, (128, pool.pick([128, 130])), keep=False)
        w.type, w.weight = w.type.logical, True
        pool.add(pool.pick(["relu", "tanh"]), [pool.add("matmul", [x, w])])


def _tied(pool: Pool) -> None:
    """An embedding and the output layer that is tied to it: one weight, looked up and multiplied."""
    w = pool.input(types.f32, (pool.pick([48, 70]), 4), keep=False)
    w.type, w.weight = w.type.logical, True
    x = pool.add("take", [w, pool.input(types.i64, (3,), keep=False)], axis=0)
    x = pool.add(pool.pick(["relu", "tanh"]), [x])
    pool.add("matmul", [x, pool.builder.transpose(w, (1, 0))])


def linear_attention(pool: Pool) -> None:
    """Attention without a softmax, as N x N scores, which are divided by their sums."""
    length, size = pool.pick([pool.size(), 40]), pool.static_size()
    q, k, v = (pool.input(types.f32, (length, size), keep=False) for _ in range(3))
    scores = pool.add("matmul", [pool.add("sigmoid", [q]), pool.builder.transpose(pool.add("sigmoid", [k]), (1, 0))])
    weights = pool.builder.div(scores, pool.builder.sum(scores, axes=(1,), keepdims=True)) if pool.flag() else scores
    pool.add("matmul", [weights, v])


def causal_linear_attention(pool: Pool) -> None:
    """The same under a triangular mask, of a length that is worth chunks or is not."""
    length, size = pool.pick([530, pool.size(), 320]), pool.pick([4, 1, 3])
    q, k, v = (pool.input(types.f32, (length, size), keep=False) for _ in range(3))
    b = pool.builder
    scores = pool.add("matmul", [pool.add("sigmoid", [q]), b.transpose(pool.add("sigmoid", [k]), (1, 0))])
    at = b.iota(size=length)
    seen = b.le(at, b.reshape(at, shape=(length, 1)))
    scores = b.where(seen, scores, 0.0) if pool.flag() else b.mul(scores, b.cast(seen, types.f32))
    weights = b.div(scores, b.sum(scores, axes=(1,), keepdims=True)) if pool.flag() else scores
    pool.add("matmul", [weights, v])


def masked_attention(pool: Pool) -> None:
    """Attention under a mask that may be a buffer of the model, of sizes that fill blocks or do not."""
    rows, keys, size = pool.pick([16, 40]), pool.pick([33, 64]), pool.pick([4, 8])
    q, k, v = (pool.input(types.f32, (1, 2, n, size), keep=False) for n in (rows, keys, keys))
    pool.add("attention", [q, k, v, pool.input(types.b1, (rows, keys), keep=False)], scale=0.5)


def biased_attention(pool: Pool) -> None:
    """Attention with a bias that may be a weight, of sizes that fill vectors or do not."""
    rows, keys, size = pool.pick([4, 7]), pool.pick([1, 5]), pool.pick([4, 8])
    q, k, v = (pool.input(types.f32, (1, 2, n, size), keep=False) for n in (rows, keys, keys))
    pool.add("attention", [q, k, v, pool.input(types.f32, pool.pick([(rows, keys), (1, 2, rows, keys)]), keep=False)], scale=0.5)


def wide_product(pool: Pool) -> None:
    """A product with a matrix that may be a weight, and fills tiles or does not."""
    rows, depth, columns = pool.pick([pool.size(), 3, 1]), pool.pick([32, 64, 48]), pool.pick([32, 40, 24])
    x, w = (pool.input(types.f32, shape, keep=False) for shape in ((rows, depth), (depth, columns)))
    pool.add("relu", [pool.add("matmul", [x, w])])


def exact_product(pool: Pool) -> None:
    """A product with a weight that is known to hold nothing but bf16."""
    rows, depth, columns = pool.pick([pool.size(), 3, 1]), pool.pick([32, 64, 48]), pool.pick([32, 40, 24])
    w = pool.graph.add_input(TensorType(types.f32, (depth, columns)), "w", True, types.bf16)
    pool.add("relu", [pool.add("matmul", [pool.input(types.f32, (rows, depth), keep=False), w])])


def odd_product(pool: Pool) -> None:
    """Two products with weights whose rows fill no words of 16 bytes, one after the other."""
    rows, sizes = pool.pick([pool.size(), 3, 1]), [pool.pick([5, 7, 8, 9]) for _ in range(3)]
    x = pool.input(types.f32, (rows, sizes[0]), keep=False)
    for depth, columns in pairwise(sizes):
        w = pool.graph.add_input(TensorType(types.f32, (depth, columns)), "w", True)
        x = pool.add("relu", [pool.add("matmul", [x, w])])


def sibling_products(pool: Pool) -> None:
    """Products of one left operand, of few rows, with weights that are read transposed; each goes on through a view."""
    depth = pool.pick([4, 7, 16])
    x = pool.input(types.f32, (pool.pick([1, 2, 5]), depth), keep=False)
    for _ in range(pool.pick([2, 3])):
        w = pool.graph.add_input(TensorType(types.f32, (pool.pick([3, 8, 17]), depth)), "w", True)
        y = pool.add("matmul", [x, pool.builder.transpose(w, perm=(1, 0))])
        pool.add("relu", [pool.builder.reshape(y, shape=(1, *y.shape))])


def _resized(pool: Pool) -> None:
    """An axis resized as PyTorch spells it: neighbours, read by clipped indices, mixed by weights."""
    x = pool.operand(FLOATS, least=1, most=3)
    size = pool.static_size()
    low = pool.builder.iota(size=size)
    high = pool.builder.add(low, pool.builder.constant(1, low.dtype))
    a, b = (pool.builder.take(x, index, axis=-1, clip=True) for index in (low, high))
    step = pool.builder.mul(pool.builder.sub(b, a), pool.input(x.dtype, (size,), keep=False))
    pool.add("add", [a, step])


def _there_and_back(pool: Pool) -> None:
    x = pool.operand(FLOATS, least=2)
    perm = (*range(x.type.rank - 2), x.type.rank - 1, x.type.rank - 2)
    match pool.chooser.integer(0, 4):
        case 0:
            pool.add("transpose", [pool.add("transpose", [x], perm=perm)], perm=perm)
        case 1:
            pool.add("reshape", [pool.add("reshape", [x], shape=(dims.numel(x.shape),))], shape=x.shape)
        case 2:
            pool.add("cast", [pool.add("cast", [x], dtype=types.f64)], dtype=x.dtype)
        case 3:
            pool.add("neg", [pool.add("neg", [x])])
        case 4:
            pool.add("mul", [pool.add("mul", [x, pool.builder.constant(2.0, x.dtype)]), pool.builder.constant(0.5, x.dtype)])


IDIOMS: tuple[Callable[[Pool], None], ...] = (
    _there_and_back, _linear, _tied, _spelled_out, _conv_and_norm, _frozen_conv, _resized, _large_weight
)  # fmt: skip


# --- fusion ------------------------------------------------------------------------------------------------------------


def fuse_chain(pool: Pool) -> None:
    """Put one pointwise node, and the pointwise nodes that only it uses, into a ``fusion`` node."""
    g = pool.graph
    roots = [n for n in g.nodes() if n.op.has(Trait.POINTWISE) and n.result.uses]
    if not roots:
        return
    root = pool.pick(roots)
    chain = [root]
    for node in chain:  # grows while it is walked
        for v in dict.fromkeys(node.operands):
            p = v.producer
            if p is not None and p not in chain and p.op.has(Trait.POINTWISE) and all(u in chain for u in v.users):
                chain.append(p)
    inner = [n for n in g.nodes() if n in chain]
    outer = list(dict.fromkeys(v for n in inner for v in n.operands if v.producer not in chain))
    body = Graph("body", g.symbols)
    mapping = {v: body.add_input(v.type.logical, v.hint) for v in outer}
    copy_nodes(inner, mapping, body)
    body.set_outputs([mapping[root.result]])
    fused = g.create(op_named("fusion"), outer, {"kind": "pointwise"}, before=root, body=body)
    g.replace(root.result, fused.result)
    for node in reversed(inner):
        g.erase(node)
