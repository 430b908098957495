"""batch_norm(conv(x, w) + b, mean, var, g, h)  =>  conv(x, w * s) + ((b - mean) * s + h),  s = g / sqrt(var + eps)

Why: a whole read and write of the activation less; what remains is a shift, which is fused into the convolution.
When: the weight, the bias and the norm's parameters are all frozen (staged), so that the new weight is computed once, and
again if one of them changes; the convolution's result has no other use. Likewise for a matmul whose last axis is the norm's
channel axis, and for a transposed convolution.
Numerics: the products are rounded in another order. 16-bit weights are scaled in f32 and rounded once.
Reference: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
arXiv:1712.05877, section 3.2.
"""

from __future__ import annotations

from graphopt.ir import Graph, Node, Value, dims, types
from graphopt.ir.opset.normalize import channel_shape
from graphopt.ir.stage import Staged, staged_values
from graphopt.pass_manager import Pass, PassContext
from graphopt.rewrite import Numerics, Reject, Rewriter, erase_dead

RULE = "FoldBatchNorm"
_PRODUCTS = ("conv", "conv_transpose", "matmul")


class FoldBatchNorm(Pass):
    """One walk: each batch norm into the convolution or matmul before it."""

    name = "fold-batch-norm"
    numerics = Numerics.REASSOCIATES

    def run(self, g: Graph, ctx: PassContext) -> bool:
        norms = [node for node in g.nodes() if node.name == "batch_norm"]
        staged = staged_values(g) if norms else None
        changed = False
        for norm in norms:
            assert staged is not None  # new nodes are not in it, and none that is in it goes away
            product, bias = producer(norm.operands[0])
            reject = check(norm, product, bias, staged)
            if reject is not None:
                ctx.missed(RULE, reject.reason, reject.culprit if isinstance(reject.culprit, Node) else norm)
                continue
            number = ctx.fuel.take()
            if number is None or product is None:
                continue
            ctx.passed(RULE, "into the weights of the " + product.name, norm, number)
            g.replace(norm.results[0], fold(g, norm, product, bias))
            erase_dead(g, norm)
            changed = True
        return changed


def producer(v: Value) -> tuple[Node | None, Value | None]:
    """The convolution or matmul behind a value, and the bias added to it, if any."""
    node = v.defined_by("add")
    if node is None:
        return v.defined_by(*_PRODUCTS), None
    a, b = node.operands
    product = a.defined_by(*_PRODUCTS)
    return (product, b) if product is not None else (b.defined_by(*_PRODUCTS), a)


def check(norm: Node, product: Node | None, bias: Value | None, staged: Staged) -> Reject | None:
    """Why a batch norm must stay, or None."""
    if product is None:
        return Reject("it does not follow a convolution or a matmul", norm)
    x = norm.operands[0]
    if not product.results[0].has_one_use or (bias is not None and not x.has_one_use):
        return Reject(f"the result of the {product.name} has other uses", product)
    if product.name == "matmul" and (x.type.rank != 2 or product.operands[1].type.rank != 2):
        return Reject("its channels are not the columns of the matmul", norm)
    if product.name == "conv" and product.attrs["channels_last"]:
        return Reject("its channels are not those of the convolution", norm)
    if product.operands[1].dtype != x.dtype:
        return Reject(f"its weight is of {product.operands[1].dtype}, and would be rounded to it again", product)
    for what, v in (("the weight", product.operands[1]), *(("a parameter of the norm", v) for v in norm.operands[1:])):
        if v not in staged:
            return Reject(f"{what} is not frozen", norm)
    if bias is not None:
        if bias not in staged:
            return Reject("the bias is not frozen", norm)
        along = (*[1] * (x.type.rank - bias.type.rank), *bias.shape)  # lined up with the axes of x
        if len(along) > x.type.rank or not dims.same(along[1], x.shape[1]) or any(n != 1 for n in (along[0], *along[2:])):
            return Reject("what is added in between is no vector over the channels", norm)
    return None


def fold(g: Graph, norm: Node, product: Node, bias: Value | None) -> Value:
    """Build the scaled product and its shift."""
    rw = Rewriter(g, norm)
    w, dtype = product.operands[1], norm.operands[0].dtype
    wide = types.f32 if dtype.bits < 32 else dtype
    mean, var, *affine = (rw.cast(v, wide) for v in norm.operands[1:])
    scale = rw.rsqrt(rw.add(var, norm.attrs["eps"]))
    if affine:
        scale = rw.mul(scale, affine[0])
    shift = rw.mul(mean, scale)
    if bias is not None:
        shift = rw.mul(rw.sub(rw.cast(rw.reshape(bias, shape=mean.shape), wide), mean), scale)
    else:
        shift = rw.neg(shift)
    if len(affine) > 1:
        shift = rw.add(shift, affine[1])
    scaled = rw.cast(_scaled(rw, product, rw.cast(w, wide), scale), dtype)
    new = rw.create(product.name, [product.operands[0], scaled], dict(product.attrs))
    channels = channel_shape(norm.operands[0].type) if product.name != "matmul" else mean.shape
    return rw.add(new, rw.reshape(rw.cast(shift, dtype), shape=channels))  # type: ignore[no-any-return]


def _scaled(rw: Rewriter, product: Node, w: Value, scale: Value) -> Value:
    """The weight with its output channels scaled."""
    if product.name == "matmul":
        return rw.mul(w, scale)  # type: ignore[no-any-return]
    taps = [1] * (w.type.rank - 2)
    if product.name == "conv":
        return rw.mul(w, rw.reshape(scale, shape=(w.shape[0], 1, *taps)))  # type: ignore[no-any-return]
    groups = product.attrs["groups"]  # the weight is [C, O / groups, *K]
    split = rw.reshape(w, shape=(groups, dims.floordiv(w.shape[0], groups), *w.shape[1:]))
    return rw.reshape(rw.mul(split, rw.reshape(scale, shape=(groups, 1, w.shape[1], *taps))), shape=w.shape)  # type: ignore[no-any-return]
