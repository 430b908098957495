"""Attention before autograd: what a training graph spells out becomes an operator that has a gradient of its own.

AOTAutograd differentiates op by op, and so would keep the weights ``[M, N]`` of each attention for the backward. So Dynamo's graph is
looked at first: it is traced to aten without gradients, captured, and goes through the passes up to ``recognise-attention``. Where that
finds an attention, the node of Dynamo's graph that has its result is replaced by a call of :class:`AttentionRegion`, which computes it
from other nodes of that graph by views, scales and ``graphopt::attention_forward``. All else stays as it was; what nobody needs any
more AOTAutograd removes.

A node of Dynamo's graph and a value of the IR belong together by the trace: all nodes' values are its outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import dropout, scaled_dot_product_attention

from graphopt.capture.attention_region import AttentionRegion
from graphopt.capture.captured import Uncapturable
from graphopt.capture.decompositions import spelled_attention, spelled_dropout
from graphopt.capture.fx import capture_values
from graphopt.devices import choose_target
from graphopt.errors import first_line
from graphopt.ir import Listener, Trait, dims, types
from graphopt.ir.builder import Builder
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Node, Value, copy_nodes
from graphopt.ir.opset.attention import parts, sees_a_key
from graphopt.ir.types import TensorType
from graphopt.options import Options
from graphopt.pass_manager import PassContext, run_passes
from graphopt.passes.attention.dropout import draws_seed
from graphopt.passes.attention.masks import may_hide
from graphopt.passes.attention.recognise import RecogniseAttention
from graphopt.passes.pipelines import default_pipeline, edit_pipeline
from graphopt.remarks import Remark
from graphopt.target import Target

NAME = "train-attention"
_LAST = RecogniseAttention.name
_THROUGH = ("reshape", "transpose", "broadcast_to", "cast")  # what may lie between an attention and a node that has its result
Views = tuple[tuple[str, Any], ...]
_STATEFUL = ("_enter_autocast", "autograd_function_apply", "_functorch")  # running them would change more than values
_HINTS = ("softmax", "scaled_dot_product_attention", "exp")
_CLOSED = {  # what attention may be within, and is not seen
    "multi_head_attention_forward": "PyTorch's multi_head_attention_forward is one function, which is not looked into",
    "tag_activation_checkpoint": "a checkpoint is not looked into",
}


def train_attention(gm: torch.fx.GraphModule, options: Options) -> list[Remark]:
    """Put operators with a gradient in the place of the attentions of a Dynamo graph, which is changed.

    Returns:
        What was found, and why what was not replaced was not.
    """
    if options.backend == "eager":
        return []
    names = [str(getattr(n.target, "__name__", n.target)) for n in gm.graph.nodes]
    closed = [Remark("missed", NAME, NAME, why) for part, why in _CLOSED.items() if any(part in name for name in names)]
    if not _worth_a_look(names):
        return closed
    try:
        found, said = _look(gm, options)
    except Exception as error:  # nothing was changed yet, and training goes on without
        reason = first_line(error)
        return [*closed, Remark("missed", NAME, NAME, f"attention is not looked for: {reason}")]
    calls: dict[torch.fx.Node, torch.fx.Node] = {}
    for replacement in found:
        calls[replacement.node] = replacement.put_into(gm, calls)
    for replacement in found:  # now that no other region reads what is erased
        _erase_unread(replacement.node, gm)
    gm.recompile()
    return closed + said


def _look(gm: torch.fx.GraphModule, options: Options) -> tuple[list[_Replacement], list[Remark]]:
    """What is to be replaced, in order, and what is to be said. Changes nothing."""
    target = choose_target(_device(gm), options)
    nodes, graph, values = _capture(gm)
    ctx = PassContext(target=target)
    pipeline = [
        replace(p, dropout=True) if isinstance(p, RecogniseAttention) else p for p in edit_pipeline(default_pipeline(), options.pipeline)
    ]
    names = [p.name for p in pipeline]
    if _LAST not in names:
        return [], []
    places = _Places(graph, nodes, values)
    run_passes(graph, pipeline[: names.index(_LAST) + 1], ctx)
    said = [r for r in ctx.remarks if r.pass_name == _LAST and r.kind == "missed"]
    ctx.pass_name = NAME
    known = [k for k in places.known if k.value.producer is None or not k.value.producer.erased]
    replacements, changed = [], _changed_in_place(gm)
    for attention in [n for n in graph.nodes() if n.name == "attention"]:
        found = _replacement(attention, known, changed, target)
        if isinstance(found, str):
            ctx.missed(NAME, f"its gradient goes through the weights of all pairs: {found}", attention)
            continue
        if found is not None:
            replacements.append(found)
            rate = attention.attrs["dropout"]
            drawn = f"; weights are dropped at a rate of {rate:g}, by other random numbers than eager's" if rate else ""
            ctx.passed(NAME, f"the backward computes the weights again, in tiles{drawn}", attention)
    return replacements, said + [r for r in ctx.remarks if r.pass_name == NAME]


def _worth_a_look(names: Sequence[str]) -> bool:
    """Whether a graph has a softmax, or something that may be a part of one."""
    if any(part in name for name in names for part in _STATEFUL):
        return False
    return any(hint in name for name in names for hint in _HINTS)


def _device(gm: torch.fx.GraphModule) -> torch.device:
    """Where all tensors of a graph are."""
    fakes = [n.meta.get("example_value") for n in gm.graph.nodes]
    found = list(dict.fromkeys(x.device for x in fakes if isinstance(x, torch.Tensor)))
    if len(found) > 1:
        raise Uncapturable(f"tensors are on {' and '.join(map(str, found))}")
    if found[0].type not in ("cpu", "cuda"):
        raise Uncapturable(f"no kernels are generated for {found[0].type} devices yet")
    return found[0]


# --- from Dynamo's graph to the IR -----------------------------------------------------------------------------------


def _capture(gm: torch.fx.GraphModule) -> tuple[list[torch.fx.Node], Graph, list[Value | None]]:
    """Dynamo's nodes that are tensors, the IR graph whose outputs are those of Dynamo's, and the nodes' values in it."""
    fakes = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
    mode = next((x.fake_mode for x in fakes if isinstance(x, FakeTensor)), None)  # Dynamo's own, not the one for AOTAutograd
    if mode is None or any(x is None for x in fakes):
        raise Uncapturable("Dynamo's graph has no example values")
    nodes: list[torch.fx.Node] = []

    def run(*args: Any) -> list[torch.Tensor]:
        interpreter = _Spelled(gm, garbage_collect_values=False)
        interpreter.run(*args)
        env = interpreter.env
        nodes[:] = [n for n in gm.graph.nodes if n.op != "output" and isinstance(env.get(n), torch.Tensor)]
        return [env[n] for n in nodes]

    try:
        with mode, torch.no_grad(), traceback.preserve_node_meta():
            traced = make_fx(torch.func.functionalize(run, remove="mutations"))(*fakes)
    except Exception as error:  # whatever a user's operator, a higher-order operator or a guard may raise: training goes on without
        reason = first_line(error)
        raise Uncapturable(f"the graph cannot be traced without gradients: {reason}") from error
    graph, values = capture_values(traced, "before_autograd")
    of = dict(zip(nodes, values, strict=True))
    outputs = [of.get(n) for n in gm.graph.output_node().all_input_nodes]
    graph.set_outputs([v for v in outputs if v is not None])
    return nodes, graph, values


class _Spelled(torch.fx.Interpreter):
    """Runs a graph, and dropout by its definition: tracing PyTorch's own asks for numbers of symbolic sizes, or draws in place.

    So is attention with dropout, and all of it on a GPU, for which PyTorch has several operators and chooses by sizes.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is dropout:
            target = spelled_dropout
        elif target is scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            drops = kwargs.get("dropout_p") or any(args[4:5])
            target = spelled_attention if drops or query.device.type != "cpu" else target
        return super().call_function(target, args, kwargs)


@dataclass
class _Known:
    """A value that a node of Dynamo's graph has, or is a view of.

    Attributes:
        type: of the node's own value.
        up: the views, ``(op, its attribute)``, that make the value of the node's own; none if it is that.
        down: those that make the node's own of the value.
    """

    node: torch.fx.Node
    value: Value
    type: TensorType
    up: Views
    down: Views


class _Places(Listener):
    """The values that Dynamo's nodes have, and those that they are views of, followed through rewrites."""

    def __init__(self, graph: Graph, nodes: Sequence[torch.fx.Node], values: Sequence[Value | None]) -> None:
        having = [(n, v) for n, v in zip(nodes, values, strict=True) if v is not None]
        self.known = [_Known(n, w, v.type.logical, up, down) for n, v in having for w, up, down in _above(v)]
        self._of: dict[Value, list[_Known]] = {}
        for k in self.known:
            self._of.setdefault(k.value, []).append(k)
        graph.listeners.append(self)

    def replaced(self, old: Value, new: Value) -> None:
        moved = self._of.pop(old, [])
        for k in moved:
            k.value = new
        if moved:
            self._of.setdefault(new, []).extend(moved)


def _above(v: Value) -> Iterator[tuple[Value, Views, Views]]:
    """A value, and those that it shows all of in another shape or order, each with the views that make it of the value, and back."""
    up: Views = ()
    down: Views = ()
    yield v, up, down
    while (node := v.defined_by("reshape", "transpose")) is not None:
        shown, v = v, node.operands[0]
        if node.name == "reshape":
            up, down = (*up, ("reshape", v.shape)), (("reshape", shown.shape), *down)
        else:
            perm = node.attrs["perm"]
            up, down = (*up, ("transpose", tuple(perm.index(i) for i in range(len(perm))))), (("transpose", perm), *down)
        yield v, up, down


def _viewed(b: Builder, v: Value, views: Views) -> Value:
    for name, how in views:
        v = b.reshape(v, how) if name == "reshape" else b.transpose(v, how)
    return v


def _erase_unread(node: torch.fx.Node, gm: torch.fx.GraphModule) -> None:
    """Erase a node that nothing reads, and then those that it alone read: a draw of random numbers would be made all the same."""
    if node.users or node.op not in ("call_function", "call_method") or _written(node):
        return
    read = node.all_input_nodes
    gm.graph.erase_node(node)
    for n in read:
        _erase_unread(n, gm)


_AUGMENTED = tuple(f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul", "and", "or", "xor", "mod"))


def _changed_in_place(gm: torch.fx.GraphModule) -> set[int]:
    """The storages that a node of Dynamo's graph writes into."""
    return {_storage(x) for n in gm.graph.nodes for x in _written(n)}


def _written(n: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes whose tensors a node may write into."""
    name = str(getattr(n.target, "__name__", n.target)).partition(".")[0]
    writes = name in ("setitem", *_AUGMENTED) or (name.endswith("_") and not name.endswith("__"))
    in_place = n.kwargs.get("inplace") is True or any(a is True and p == "inplace" for a, p in zip(n.args, _parameters(n), strict=False))
    several = name.startswith("_foreach")
    written = [*(n.all_input_nodes[: None if several else 1] if writes or in_place else ()), n.kwargs.get("out")]
    return [x for x in written if isinstance(x, torch.fx.Node)]


def _parameters(n: torch.fx.Node) -> list[str]:
    """The names of what a node's function takes, in order: ``inplace`` may be given by position. None of built-in ones."""
    try:
        return list(inspect.signature(n.target).parameters) if callable(n.target) else []
    except (TypeError, ValueError):
        return []


def _storage(node: torch.fx.Node) -> int:
    x = node.meta.get("example_value")
    return x.untyped_storage()._cdata if isinstance(x, torch.Tensor) else 0


# --- one attention ------------------------------------------------------------------------------------------------------


@dataclass
class _Replacement:
    """What computes the value of a node: a region, and the nodes that it reads."""

    node: torch.fx.Node
    region: AttentionRegion
    reads: list[torch.fx.Node]

    def put_into(self, gm: torch.fx.GraphModule, calls: Mapping[torch.fx.Node, torch.fx.Node]) -> torch.fx.Node:
        """The call that takes the node's place. ``calls``: those that others' places were taken by before."""
        name = next(n for i in range(len(gm.graph.nodes)) if not hasattr(gm, n := f"graphopt_attention_{i}"))
        gm.add_submodule(name, self.region)
        with gm.graph.inserting_after(self.node):
            call = gm.graph.call_module(name, tuple(calls.get(n, n) for n in self.reads))
        call.meta = dict(self.node.meta)
        self.node.replace_all_uses_with(call)
        return call


def _replacement(attention: Node, known: Sequence[_Known], changed: set[int], target: Target) -> _Replacement | str | None:
    """What takes the place of an attention in Dynamo's graph; why nothing does; None if there is nothing to gain."""
    usable = [k for k in known if _storage(k.node) not in changed]
    has_result = set(_below(attention.result))
    results = [k for k in usable if k.value in has_result and k.node.op != "placeholder"]
    if not results:
        return "its result is changed in place, or is no value of the traced code"
    node, value, show = results[0].node, results[0].value, results[0].down
    before: dict[Value, _Known] = {}
    for k in takewhile(lambda k: k.node is not node, usable):
        before.setdefault(k.value, k)
    members = _members(value, before)
    if isinstance(members, str):
        return members
    reads = {v: before[v] for n in members for v in n.operands if v in before}
    if not any(k.node.meta["example_value"].requires_grad for k in reads.values()):
        return None
    if (why := _unfit(attention, members, before, target)) is not None:
        return why
    if (stop := _gradient_stop(node, {k.node for k in reads.values()})) is not None:
        return f"its gradient is stopped on the way, by {stop}"
    region = Graph("region", attention.graph.symbols)
    b, inputs, mapping = Builder(region), dict[torch.fx.Node, Value](), dict[Value, Value]()
    for k in reads.values():
        if k.node not in inputs:
            inputs[k.node] = region.add_input(k.type)
    for v, k in reads.items():
        mapping[v] = _viewed(b, inputs[k.node], k.up)
    copy_nodes(members, mapping, region)
    region.set_outputs([_viewed(b, mapping[value], show)])
    fake = node.meta["example_value"]
    order = sorted(range(fake.dim()), key=fake.stride, reverse=True)
    bare = {d for v in region.inputs for d in v.shape if isinstance(d, sympy.Symbol)}
    if any(dims.symbol(s) not in bare for s in dims.free_symbols(_sizes(region))):
        return "a size of it is no size of what it reads"
    return _Replacement(node, AttentionRegion(region, order), list(inputs))


def _below(v: Value) -> Iterator[Value]:
    """A value, and what shows it through views alone."""
    yield v
    for user in v.users:
        if user.name in _THROUGH:
            yield from _below(user.result)


def _members(value: Value, before: dict[Value, _Known]) -> list[Node] | str:
    """The nodes, in order, that make a value of those known before; or why there are none."""
    found: dict[Node, None] = {}
    waiting = [value]
    while waiting:
        v = waiting.pop()
        node = v.producer
        if v in before or (node is not None and node in found):
            continue
        if node is None:
            return "it reads a tensor of the traced code's own"
        known = node.name in ("attention", "concat", "pad") or node.op.has(Trait.POINTWISE, Trait.VIEW, Trait.CREATION)
        if not known and not draws_seed(node):
            return f"{node.name} would have to be computed again"
        found[node] = None
        waiting += node.operands
    if sum(n.name == "attention" for n in found) != 1:
        return "another attention would have to be computed again"
    return [n for n in value.producer.graph.nodes() if n in found]  # type: ignore[union-attr]


def _unfit(attention: Node, members: Sequence[Node], before: dict[Value, _Known], target: Target) -> str | None:
    """Why the operator with a gradient does not compute an attention; None if it does."""
    p, attrs, symbols = parts(attention.operands, attention.attrs), attention.attrs, attention.graph.symbols
    if (dtype := attention.result.dtype) not in (types.f32, types.bf16):
        return f"it is of {dtype}, and the kernels are for f32 and bf16"
    if p.bias is not None and dtype != types.f32 and not target.is_gpu and _trains(p.bias, before):
        return f"its bias needs a gradient, which would be summed in {dtype}"
    if any(d == 0 for v in attention.operands for d in v.shape):
        return "it has no elements"
    if not isinstance(p.q.shape[-1], int) or not isinstance(p.v.shape[-1], int):
        return "heads of unknown size"
    if p.bias is not None and p.bias.shape[-1] == 1 and not dims.same(p.k.shape[-2], 1) and _trains(p.bias, before):
        return "its bias, the same for all keys, needs a gradient"
    if p.slopes is not None and _trains(p.slopes, before):
        return "its slopes need a gradient, too"
    if p.q.type.rank != p.k.type.rank or p.k.type.rank != p.v.type.rank or p.q.type.rank < 3:
        return "queries, keys and values of different ranks"
    if not _same_heads(p.k, p.v, p.q):
        return "keys and values of other heads"
    learned = {v for v, k in before.items() if k.node.meta["example_value"].requires_grad}  # membership only
    if p.bias is not None and p.sinks is None and may_hide(p.bias, lambda v: v.weight or v in learned):
        return "a number that is added may hide all keys of a row, and the row is the mean of all values then"
    sees = p.bias is None and p.mask is None and sees_a_key(attrs, p.q.shape[-2], p.k.shape[-2], symbols)
    return None if sees or attrs["empty"] != "mean" else "a row may see no key, and is the mean of all values then"


def _gradient_stop(node: torch.fx.Node, reads: set[torch.fx.Node]) -> str | None:
    """What between the nodes that are read and a node keeps gradients from them (``detach``, ``no_grad``): the IR does not know of it."""

    def trains(n: torch.fx.Node) -> bool:
        x = n.meta.get("example_value")
        return isinstance(x, torch.Tensor) and x.requires_grad

    stack, seen = [node], set(reads)  # membership only
    while stack:
        n = stack.pop()
        x = n.meta.get("example_value")
        if n in seen:
            continue
        seen.add(n)
        stack += n.all_input_nodes
        if isinstance(x, torch.Tensor) and x.is_floating_point() and not x.requires_grad and any(map(trains, n.all_input_nodes)):
            return str(getattr(n.target, "__name__", n.target))
    return None


def _same_heads(k: Value, v: Value, q: Value) -> bool:
    return dims.same(k.shape[-3], v.shape[-3]) or all(x.shape[-3] == 1 or dims.same(x.shape[-3], q.shape[-3]) for x in (k, v))


def _trains(v: Value, before: dict[Value, _Known]) -> bool:
    """Whether a gradient by a value is wanted."""
    return any(n.meta["example_value"].requires_grad for n in _sources(v, before))


def _sources(v: Value, before: dict[Value, _Known]) -> list[torch.fx.Node]:
    """The nodes of Dynamo's graph that a value is made of."""
    if v in before:
        return [before[v].node]
    return [n for x in v.producer.operands for n in _sources(x, before)] if v.producer is not None else []


def _sizes(graph: Graph) -> list[Dim]:
    """All sizes in a graph."""
    of_results = [d for n in graph.nodes() for r in n.results for d in r.shape]
    return [*of_results, *(a for n in graph.nodes() for a in n.attrs.values() if isinstance(a, sympy.Expr))]
