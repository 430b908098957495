"""Attention in training for models on a GPU, without one: the graphs are Dynamo's, of fake tensors that are on ``cuda``.

Fake tensors refuse to compute with one another across devices, so what would be made in the wrong place shows. Autograd itself asks the
driver, so nothing is recorded for a backward here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import CASES, DECLINED
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from training_checks import Fn, qkv

from graphopt import devices
from graphopt.capture.training import train_attention
from graphopt.compiler import compile_fx
from graphopt.options import Options
from graphopt.target import Target
from graphopt.trained_attention import attention_backward, attention_forward

FACTORIES = (torch.arange, torch.ones, torch.zeros, torch.empty, torch.full, torch.tensor)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver would say of the GPU; and three methods of tensors that ask a driver for fake ones, too, by operators that do not."""
    monkeypatch.setattr(devices, "detect_gpu", lambda index: Target.from_name("cuda:sm_90"))
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
        monkeypatch.setattr(torch.Tensor, "__invert__", inverted)
        monkeypatch.setattr(torch.Tensor, "__getitem__", indexed)


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.contiguous.default(x)


def inverted(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.bitwise_not.default(x)


def indexed(x: torch.Tensor, index: Any) -> torch.Tensor:
    """x[index], of numbers, slices, None and an ellipsis."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (x.dim() + 1 + parts.count(None) - len(parts))
    axis = 0
    for part in parts:
        if isinstance(part, int):
            x = torch.ops.aten.select.int(x, axis, part)
            continue
        if part is None:
            x = torch.ops.aten.unsqueeze.default(x, axis)
        elif part != slice(None):
            x = torch.ops.aten.slice.Tensor(x, axis, part.start, part.stop)
        axis += 1
    return x


def moved(fn: Fn, inputs: Sequence[torch.Tensor], device: str = "cuda:0", **kwargs: Any) -> tuple[torch.fx.GraphModule, list[Any]]:
    """Dynamo's graph of a function as it is for tensors of another device, and its inputs: fake ones, as are all values."""
    found: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, **kwargs)(*(t.clone().requires_grad_(t.is_floating_point()) for t in inputs))
    gm = found[0]
    for n in gm.graph.nodes:
        asks = n.target in (torch._C._set_grad_enabled, F.multi_head_attention_forward) or n.op == "get_attr"
        if asks and not torch.cuda.is_available():
            pytest.skip("PyTorch asks the driver to record a gradient, and within its function, of fake tensors, too")
    mode = next(n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")).fake_mode
    for n in gm.graph.nodes:
        if n.target in FACTORIES:
            n.kwargs = {**n.kwargs, "device": device}
    gm.recompile()

    class Moved(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            here, there = super().run_node(n), n.meta.get("example_value")
            if isinstance(there, torch.Tensor):
                here.requires_grad_(there.requires_grad)
                n.meta["example_value"] = here
            return here

    with mode, torch.no_grad():
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
                 for x in (n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder"))]  # fmt: skip
        Moved(gm).run(*fakes)
    return gm, fakes


def all_on(gm: torch.fx.GraphModule, fakes: Sequence[Any], device: str = "cuda:0") -> None:
    """A changed graph computes all of its results there, and graphopt's operators are given nothing from elsewhere."""
    with fakes[0].fake_mode, torch.no_grad(), Devices() as seen:
        assert all(x.device == torch.device(device) for x in gm(*fakes))
    assert seen.devices == {torch.device(device)}


class Devices(TorchDispatchMode):
    """Where the operands of graphopt's operators are: their own fake results do not ask."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[torch.device] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "graphopt":
            self.devices.update(a.device for a in args if isinstance(a, torch.Tensor))
        return func(*args, **(kwargs or {}))


HALVES = "a learned bias of halves"  # whose gradient GPUs' kernels sum in f32


@pytest.mark.parametrize("name", [*CASES, HALVES])
def test_found(name: str) -> None:
    fn, inputs = CASES[name] if name in CASES else DECLINED[name][:2]
    gm, fakes = moved(fn, inputs)
    said = train_attention(gm, Options())
    assert [r.kind for r in said] == ["passed"], [str(r) for r in said]
    assert len(gm.graph.find_nodes(op="call_module")) == 1
    all_on(gm, fakes)


@pytest.mark.parametrize("name", [n for n in DECLINED if n != HALVES])
def test_declined(name: str) -> None:
    fn, inputs, reason = DECLINED[name]
    gm, _ = moved(fn, inputs)
    before = gm.code
    said = train_attention(gm, Options())
    assert said and all(r.kind == "missed" for r in said) and any(reason in r.message for r in said), [str(r) for r in said]
    assert gm.code == before


def test_tensors_on_several_devices_are_said() -> None:
    fn, inputs = CASES["causal"]
    gm, _ = moved(fn, inputs)
    last = next(iter(gm.graph.find_nodes(op="placeholder")))
    last.meta["example_value"] = torch.empty(last.meta["example_value"].shape)
    (said,) = train_attention(gm, Options())
    assert said.kind == "missed" and "tensors are on cpu and cuda:0" in said.message


@pytest.mark.parametrize("drop", ["function", "library"])
def test_a_seed_is_drawn_where_it_is_used(drop: str) -> None:
    def by_function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.dropout(torch.softmax(q @ k.transpose(-1, -2), -1), 0.25) @ v

    def by_library(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query=q, key=k, value=v, dropout_p=0.25)

    gm, fakes = moved(by_function if drop == "function" else by_library, qkv())
    assert [r.kind for r in train_attention(gm, Options())] == ["passed"]
    all_on(gm, fakes)


@pytest.mark.parametrize("attrs", [{"causal": True}, {"window": 3, "causal": True}, {"softcap": 2.0, "dropout": 0.25}])
def test_the_reference_of_the_operators(attrs: dict[str, Any]) -> None:
    given = {"scale": 0.5, "causal": False, "offset": 0, "window": None, "softcap": None, "empty": "zero", "dropout": 0.0, **attrs}
    with FakeTensorMode(), torch.no_grad():
        q, k, v, bias, dout = (torch.empty(2, 4, n, m, device="cuda") for n, m in ((9, 8), (7, 8), (7, 8), (9, 7), (9, 8)))
        seed = torch.zeros((), dtype=torch.int64, device="cuda") if given["dropout"] else None
        operands = (q, k, v, bias, None, None, None, seed)
        out, lse = attention_forward(*operands, *given.values())
        results = attention_backward(dout, out, lse, *operands, *given.values(), True)
        assert all(x.device.type == "cuda" for x in (out, lse, *results)) and results[3].shape == bias.shape


def test_kernels_of_both_steps(tmp_path: Path) -> None:
    """They are written for the GPU; none is loaded or run."""
    pytest.importorskip("triton")
    options = Options(strict=True, cache_dir=tmp_path, tuning_db=None)
    gm, fakes = moved(CASES["shared heads"][0], CASES["shared heads"][1])
    train_attention(gm, options)
    q, k, v = sorted(fakes, key=lambda x: -x.shape[1])
    dout, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])

    def backward(dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *qkv: torch.Tensor) -> list[torch.Tensor]:
        rest = (None, None, None, None, None, 0.3, True, 0, None, None, "zero", 0.0, False)
        return list(torch.ops.graphopt.attention_backward(dout, out, lse, *qkv, *rest))

    with fakes[0].fake_mode, torch.no_grad():
        steps = make_fx(gm)(*fakes), make_fx(backward)(dout, q, lse, q, k, v)
    for step, kind in zip(steps, ("attention_forward", "attention_backward"), strict=True):
        report = compile_fx(step, {}, options).report
        assert report.target == "cuda:sm_90" and not report.fallbacks
        assert kind in [n for x in report.kernels for n in x.ops] and "@triton.jit" in Path(report.kernels[-1].path).read_text()
