"""What PyTorch's tracing of a Dynamo graph depends on, as a text: equal texts, equal traces, as long as PyTorch is what was installed.

Only of graphs of which all of it is known: sizes are numbers, functions are PyTorch's, arguments are plain tensors that share no memory.
What a process replaces within PyTorch (a kernel registered for one of its operators, a function of a module other than
``torch.nn.functional``) is not seen. After AOTAutograd's own cache (``torch._functorch._aot_autograd.autograd_cache``), which knows
nothing of other compilers' results.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.backends.opt_einsum
from torch._functorch import config as functorch_config
from torch.fx.node import _get_qualified_name
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from graphopt.capture.source import location

_TENSORS = (torch.Tensor, torch.nn.Parameter)
_PLAIN = (bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)
_OURS = ("torch", "_operator", "math", "builtins")  # modules whose functions are what they were
_KERNEL_CHOICES = ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled")


class Unknown(Exception):
    """Something that decides the trace is not known to be the same another time; its text says what."""


def graph_text(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], frozen: Mapping[int, str], names: Mapping[int, str]) -> str:
    """All that decides what AOTAutograd makes of a Dynamo graph, names and source lines of its nodes included.

    Args:
        example_inputs: one an argument of the graph.
        frozen: argument -> name of the weight that it is.
        names: argument -> the user's name.

    Raises:
        Unknown: it cannot be said.
    """
    return "\n".join([*_settings(), *_arguments(example_inputs, frozen, names), *_nodes(gm)])


def _settings() -> Iterator[str]:
    """What tracing asks PyTorch besides the graph."""
    if _get_current_dispatch_mode_stack() or _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
        raise Unknown("a mode of PyTorch's dispatcher is active")
    if torch._C._is_any_autocast_enabled():
        raise Unknown("autocast is on")
    if other := [n for n, f in vars(functional).items() if isinstance(f, types.FunctionType) and not _of_torch(f)]:
        raise Unknown(f"torch.nn.functional.{other[0]} was replaced")
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError as error:  # set by the newer of two interfaces: the older one cannot say
        raise Unknown("the precision of products is set by backend") from error
    yield f"torch {torch.__version__} {torch.version.git_version}, {torch.get_default_dtype()}, {torch.get_default_device()}, {precision}"
    yield f"grad {torch.is_grad_enabled()}, inference {torch.is_inference_mode_enabled()}"
    yield f"deterministic {torch.are_deterministic_algorithms_enabled()} {torch.is_deterministic_algorithms_warn_only_enabled()}"
    yield f"{[(d, torch.get_autocast_dtype(d)) for d in torch._C._autocast_supported_devices()]} {torch.is_autocast_cache_enabled()}"
    yield f"flush {float(torch.tensor(1e-40) * 1) == 0}, mkldnn {torch.backends.mkldnn.enabled}"
    cudnn, einsum = torch.backends.cudnn, torch.backends.opt_einsum
    yield f"{cudnn.enabled} {cudnn.deterministic} {cudnn.benchmark}, {einsum.enabled} {einsum.strategy} {einsum.is_available()}"
    yield f"{[getattr(torch.backends.cuda, name, bool)() for name in _KERNEL_CHOICES]} {torch._C._get_sdp_priority_order()}"
    yield repr(sorted((k, repr(v)) for k, v in functorch_config.get_config_copy().items()))


def _of_torch(f: Any) -> bool:
    return (getattr(f, "__module__", None) or "torch").partition(".")[0] in _OURS


def _arguments(examples: Sequence[Any], frozen: Mapping[int, str], names: Mapping[int, str]) -> Iterator[str]:
    if not examples:
        raise Unknown("no argument says on which device it runs")
    if len({x.device for x in examples if isinstance(x, torch.Tensor)}) > 1:
        raise Unknown("arguments on several devices")
    memory: dict[int, int] = {}
    for i, x in enumerate(examples):
        if type(x) not in _TENSORS:
            raise Unknown(f"an argument of type {type(x).__name__}")
        if x.layout != torch.strided or x.is_quantized or x.is_conj() or x.is_neg() or x._is_zerotensor():
            raise Unknown("an argument whose memory does not hold its elements")
        if memory.setdefault(x.untyped_storage()._cdata, i) != i:
            raise Unknown("arguments that share memory")
        yield (f"{i}: {type(x).__name__} {names.get(i)} {frozen.get(i)} {x.dtype} {_sizes(x.shape)} {_sizes(x.stride())} "
               f"{_sizes((x.storage_offset(),))} {x.device} {x.requires_grad} {x.is_inference()}")  # fmt: skip


def _sizes(sizes: Sequence[Any]) -> str:
    if any(type(s) is not int for s in sizes):
        raise Unknown("symbolic sizes")
    return str(tuple(sizes))


def _nodes(gm: torch.fx.GraphModule) -> Iterator[str]:
    for node in gm.graph.nodes:
        where = location(node.meta)
        yield f"{node.name} = {node.op} {_target(node)} {_text(node.args)} {_text(node.kwargs)} {where!r}"


def _target(node: torch.fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return ""
    if node.op == "call_method":
        if not isinstance(_value(node.args[0]), torch.Tensor):
            raise Unknown(f"a call of {node.target} on what is no tensor")
        return str(node.target)
    if node.op != "call_function":
        raise Unknown(f"a node of kind {node.op}")
    f: Any = node.target
    if isinstance(f, torch._ops.OpOverload):
        if f.namespace not in ("aten", "prims"):
            raise Unknown(f"the operator {f}")
        return str(f)
    if not isinstance(f, types.FunctionType | types.BuiltinFunctionType | type(torch.Tensor.add)) or not _of_torch(f):
        raise Unknown(f"the function {getattr(f, '__name__', f)}")
    try:
        return _get_qualified_name(f)
    except RuntimeError as error:
        raise Unknown(f"the function {f}") from error


def _value(x: Any) -> Any:
    return x.meta.get("example_value") if isinstance(x, torch.fx.Node) else x


def _text(x: Any) -> str:
    """An argument of a node, with the values that are known when it is traced."""
    if isinstance(x, torch.fx.Node):
        if not isinstance(_value(x), torch.Tensor | tuple | list | torch.Size | type(None) | bool | int | float):
            raise Unknown(f"a value of type {type(_value(x)).__name__}")
        return f"%{x.name}"
    if isinstance(x, tuple | list):
        return f"{type(x).__name__}[{', '.join(map(_text, x))}]"
    if isinstance(x, slice):
        return f"slice[{_text(x.start)}, {_text(x.stop)}, {_text(x.step)}]"
    if isinstance(x, dict):
        return "{" + ", ".join(f"{_text(k)}: {_text(v)}" for k, v in x.items()) + "}"
    if type(x) in _PLAIN:
        return repr(x)
    raise Unknown(f"an argument of type {type(x).__name__}")
