"""``graphopt.quantize``: a model with quantized layers, and the ledger of what that cost and gained.

Weights are rounded one layer at a time, by a method; the model is run twice on the example inputs, compiled in float and quantized,
and each kernel is timed against the float kernel that it replaces. What became slower is put back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from graphopt.calibration import OBSERVERS, Observer, Sample, inferring, only_input, samples_of, watch
from graphopt.capture.captured import TensorArgument
from graphopt.compiler import CompiledGraph
from graphopt.errors import GraphoptError, UsageError, nearest
from graphopt.gptq import Hessian, round_weight
from graphopt.ir.graph import Value
from graphopt.ledger import Entry, Ledger
from graphopt.lower import KernelStep
from graphopt.model import CompiledModel, compile
from graphopt.passes.quantization.quantize_products import MOST_TERMS
from graphopt.passes.quantization.scheme import Scheme
from graphopt.profile import CallCost, Profile
from graphopt.quantized_linear import QuantizedLinear, quantize_groups
from graphopt.smoothing import Smoothed, groups_of, smoothed

LEAST = 1 << 14  # elements of the smallest weight that is worth it
METHODS = ("rtn", "gptq", "smoothquant", "awq")
EXACT = 1e-3  # how far moving scales may move an output in f32, relative to its norm
HESSIANS = 1 << 29  # bytes of those that are kept at a time
_RUNS = 20  # of each model, in turns of a few
_TURNS = 4

Progress = Callable[[str, int, int], None]
"""Told (what goes on, done, total)."""


def quantize(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, scheme: str = "int8-weight",
             method: str = "rtn", calibration: Iterable[Any] | None = None, observer: str = "minmax", keep: Iterable[str] = (),
             measure: bool = True, revert: bool = True, least: int = LEAST, progress: Progress | None = None,
             **options: Any) -> nn.Module:  # fmt: skip
    """Quantize the linear layers of a model.

    Args:
        model: stays as it is; what is not quantized is shared with the result.
        args, kwargs: example inputs: errors of outputs and times are measured on them.
        scheme: ``int8-weight``, ``int4-weight``, ``int4-weight-g128-zp``, ``int8-dynamic``, ``int8-static`` ..., see
            docs/quantization.md.
        method: how weights are rounded: ``rtn``, to the nearest; ``gptq``; ``smoothquant`` and ``awq``, which move scales from inputs
            into weights first.
        calibration: calls of the model that methods and static schemes look at: tensors, tuples of arguments, or dicts of keyword
            arguments; the example inputs if None.
        observer: which range of the inputs a static scheme represents: ``minmax``, ``percentile``, ``mse``, ``entropy``.
        keep: names of modules that stay in float; ``*`` stands for anything.
        measure: compile both models, and time each kernel against the float one.
        revert: put back in float what became slower.
        least: elements of the smallest weight that is quantized.
        options: of the compilations, see :class:`graphopt.Options`.

    Returns:
        A module that is called like the model, compiles, and is saved as any other (``torch.save``, ``state_dict``). Its attribute
        ``ledger`` is the :class:`~graphopt.ledger.Ledger`.

    Raises:
        UsageError: there is no such scheme, method or observer, a pattern of ``keep`` fits nothing, there is nothing to calibrate on, or a
            weight holds infinities or nan (names it).
    """
    chosen, told = Scheme.parse(scheme), progress or (lambda *_: None)
    kwargs = dict(kwargs or {})
    for name, value, known in (("method", method, METHODS), ("observer", observer, OBSERVERS)):
        if value not in known:
            raise UsageError(f"there is no {name} {value!r}{nearest(str(value), known)}; {name}s are {', '.join(known)}")
    samples = samples_of(calibration, args, kwargs) if method != "rtn" or chosen.activations == "static" else []
    if method in ("smoothquant", "awq"):
        told("smoothing", 0, 1)
        model = _smooth(model, samples, chosen, method, tuple(keep), least)
    linears = {name: m for name, m in model.named_modules() if _weight(m) is not None}
    left = _left(model, linears, tuple(keep), least, bool(chosen.activations))
    wanted = [n for n in linears if n not in left]
    made = _rounded(model, {n: linears[n] for n in wanted}, chosen, method, samples, observer, told, left)
    ledger = Ledger(str(chosen), [_entry(name, m, made.get(name), left.get(name, "")) for name, m in linears.items()])
    entries = {e.name: e for e in ledger.entries}
    result = _replaced(model, made)
    if tree_leaves((args, kwargs)):
        told("measuring errors", 0, 1)
        ledger.output_error = _output_errors(model, result, linears, made, entries, args, kwargs)
        if measure and made:
            told("measuring times", 0, 1)
            _measure(model, result, entries, ledger, args, kwargs, options)
            slower = [n for n in made if (s := entries[n].speedup) is not None and s < 1.0] if revert else []
            if slower:
                result = _replaced(model, {n: m for n, m in made.items() if n not in slower})
                _revert(slower, entries)
                told("measuring again", 0, 1)
                ledger.output_error = _relative(model, result, args, kwargs)
                ledger.seconds = compile(result, args, kwargs, **options).profile(*args, runs=_RUNS, **kwargs).seconds
    result.ledger = ledger  # type: ignore[assignment]
    return result


def _smooth(model: nn.Module, samples: Sequence[Sample], scheme: Scheme, method: str, keep: Sequence[str], least: int) -> nn.Module:
    """The model with scales moved into the weights that will be quantized; the same function, which is made sure of."""
    linears = {name: m for name, m in model.named_modules() if _weight(m) is not None}
    left = _left(model, linears, keep, least, bool(scheme.activations))
    groups = [g for g in groups_of(model, *samples[0]) if all(n in linears and n not in left for n in g.linears)]
    alone = [n for n in linears if n not in left and not any(n in g.linears for g in groups)]
    result = _replaced(model, smoothed(model, groups, alone, samples, scheme, method, _of))
    for sample in samples:
        moved = _relative(model, result, *sample)
        if moved is not None and not moved < EXACT:
            raise GraphoptError(f"{method}: moving scales changed the output by {moved:.3g} of its norm, before anything was rounded; "
                                "the model may take another way for some inputs than for the first of the calibration")  # fmt: skip
    return result


def _rounded(model: nn.Module, linears: Mapping[str, nn.Module], scheme: Scheme, method: str, samples: Sequence[Sample], observer: str,
             told: Progress, left: dict[str, str]) -> dict[str, QuantizedLinear]:  # fmt: skip
    """Quantized layers by name; ``left`` is told of those that cannot be after all.

    GPTQ takes them in waves whose Hessians fit into memory, each given what the ones before became.
    """
    made: dict[str, QuantizedLinear] = {}
    waves = _waves(linears) if method == "gptq" else [list(linears)]
    for wave in waves:
        hessians: dict[str, Hessian] = {}
        if method == "gptq":
            hessians = {n: Hessian(_of(linears[n]).shape[1]) for n in wave}
            told("looking at inputs", len(made), len(linears))
            now = _replaced(model, made)
            watch(now, wave, samples, lambda name, x, seen=hessians: seen[name].see(x))  # type: ignore[misc]
        for name in wave:
            told("rounding", len(made), len(linears))
            weight, what = _of(linears[name]), f"{name}.weight"
            parts = round_weight(weight, hessians[name], scheme, what) if hessians else quantize_groups(weight, scheme, what)
            bias, smooth = linears[name]._parameters["bias"], _smooth_of(linears[name])
            made[name] = QuantizedLinear(*parts, bias, weight.shape[1], str(scheme), smooth=smooth)
    if scheme.activations == "static":
        seen: dict[str, Observer] = {}
        told("looking at inputs", 0, 1)

        def look(name: str, x: torch.Tensor) -> None:
            smooth = _smooth_of(linears[name])
            seen.setdefault(name, Observer()).see(x if smooth is None else x * smooth)

        watch(model, linears, samples, look)
        for name, m in list(made.items()):
            found = seen.get(name)
            if found is not None and found.largest:
                m.step = torch.tensor(found.step(observer))
            else:
                left[name] = "calibration met nothing but zeros there" if found else "calibration never reached it"
                del made[name]
    return made


def _waves(linears: Mapping[str, nn.Module]) -> list[list[str]]:
    """Layers in order, as many at a time as have Hessians of ``HESSIANS`` bytes together; one at least."""
    waves: list[list[str]] = []
    room = 0
    for name, m in linears.items():
        size = 4 * _of(m).shape[1] ** 2
        if not waves or size > room:
            waves.append([])
            room = HESSIANS
        waves[-1].append(name)
        room -= size
    return waves


def ledger_of(model: nn.Module) -> Ledger:
    """The ledger of a model that :func:`quantize` made. Raises UsageError for another one."""
    found = getattr(model, "ledger", None)
    if not isinstance(found, Ledger):
        raise UsageError(f"{type(model).__name__} has no ledger: graphopt.quantize did not make it")
    return found


# --- which --------------------------------------------------------------------------------------------------------------


def _weight(m: nn.Module) -> nn.Parameter | None:
    """The matrix of a module that is a linear layer, if it is one: ``nn.Linear`` itself, smoothed, and transformers' ``Conv1D``."""
    plain = type(m) in (nn.Linear, Smoothed) or (type(m).__name__ == "Conv1D" and hasattr(m, "nf"))
    return m.weight if plain and isinstance(m.weight, nn.Parameter) else None


def _of(m: nn.Module) -> torch.Tensor:
    """The weight ``[out, in]``."""
    weight = _weight(m)
    assert weight is not None
    return weight if type(m) in (nn.Linear, Smoothed) else weight.t()


def _smooth_of(m: nn.Module) -> torch.Tensor | None:
    """What a layer multiplies its inputs by first."""
    return m.smooth if isinstance(m, Smoothed) else None


def _left(model: nn.Module, linears: Mapping[str, nn.Module], keep: Sequence[str], least: int, activations: bool) -> dict[str, str]:
    """The layers that stay in float, and why."""
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise UsageError(f"keep={pattern!r} fits none of the linear layers: {', '.join(linears) or 'there is none'}")
    holders: dict[int, list[str]] = {}
    for name, m in model.named_modules():
        for p in m.parameters(recurse=False):
            holders.setdefault(id(p), []).append(name)
    out = {}
    for name, m in linears.items():
        weight = _of(m)
        others = [n for n in holders[id(_weight(m))] if n not in linears]
        if any(fnmatchcase(name, pattern) for pattern in keep):
            out[name] = "as asked"
        elif weight.dtype != torch.float32:
            out[name] = f"its weight is {weight.dtype}".replace("torch.", "")
        elif activations and weight.shape[1] > MOST_TERMS:
            out[name] = f"sums of {weight.shape[1]} products may exceed 32 bits"
        elif weight.numel() < least:
            out[name] = f"{weight.numel()} elements are too few"
        elif others:
            out[name] = f"its weight is that of {others[0]}, too"
    return out


def _entry(name: str, m: nn.Module, quantized: QuantizedLinear | None, why: str) -> Entry:
    weight = _of(m)
    shape = (weight.shape[0], weight.shape[1])
    if quantized is None:
        return Entry(name, shape, "", f"left: {why}", weight.nbytes, weight.nbytes)
    error = float((quantized.weight - weight.detach()).norm() / weight.detach().norm().clamp_min(1e-30))
    return Entry(name, shape, quantized.scheme, "quantized", weight.nbytes, quantized.nbytes, error)


def _replaced(model: nn.Module, made: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the model's modules with some in the place of others; tensors are shared."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo |= {id(m): made[name] for name, m in model.named_modules() if name in made}
    return copy.deepcopy(model, memo)


def _revert(names: Sequence[str], entries: Mapping[str, Entry]) -> None:
    for name in names:
        e = entries[name]
        assert e.seconds is not None and e.float_seconds is not None
        e.verdict = f"reverted: slower, {e.seconds * 1e6:.1f} us against {e.float_seconds * 1e6:.1f}"
        e.bytes = e.float_bytes


# --- errors -------------------------------------------------------------------------------------------------------------


def _output_errors(model: nn.Module, result: nn.Module, linears: Mapping[str, nn.Module], made: Mapping[str, QuantizedLinear],
                   entries: Mapping[str, Entry], args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:  # fmt: skip
    """Each layer's error, given the float model's inputs, one layer at a time in memory; returns that of the model."""
    sums: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: torch.Tensor) -> None:
            wrong = (made[name](only_input(args, kwargs)) - output).double()
            a, b = sums.get(name, (0.0, 0.0))
            sums[name] = a + float(wrong.square().sum()), b + float(output.double().square().sum())

        return look

    handles = [linears[name].register_forward_hook(hook(name), with_kwargs=True) for name in made]
    try:
        with torch.no_grad(), inferring(model):
            model(*args, **kwargs)
    finally:
        for h in handles:
            h.remove()
    for name, (a, b) in sums.items():
        entries[name].output_error = (a / b) ** 0.5 if b else 0.0
    return _relative(model, result, args, kwargs)


def _relative(model: nn.Module, result: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:
    """The error of the model's first floating-point output, relative to its norm."""
    with torch.no_grad(), inferring(model), inferring(result):
        both = [tree_leaves(m(*args, **kwargs)) for m in (model, result)]
    floats = [next((x.double() for x in xs if isinstance(x, torch.Tensor) and x.is_floating_point()), None) for xs in both]
    want, got = floats
    if want is None or got is None:
        return None
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


# --- times --------------------------------------------------------------------------------------------------------------


def _measure(model: nn.Module, result: nn.Module, entries: Mapping[str, Entry], ledger: Ledger, args: Sequence[Any],
             kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> None:  # fmt: skip
    """Time both models' kernels in turns, and put times beside the weights that they multiply by."""
    compiled = [compile(m, args, kwargs, **options) for m in (model, result)]
    if not all(isinstance(c._compiled, CompiledGraph) for c in compiled):
        return  # library calls as a whole: there are no kernels to time
    profiles: list[list[Profile]] = [[], []]
    for _ in range(_TURNS):
        for c, found in zip(compiled, profiles, strict=True):
            found.append(c.profile(*args, runs=_RUNS // _TURNS, **kwargs))
    ledger.float_seconds, ledger.seconds = (min(p.seconds for p in found) for found in profiles)
    before, after = (_by_weights(c, found) for c, found in zip(compiled, profiles, strict=True))
    for names in _families([*before, *after]):
        old = [c for n, c in before.items() if set(n) <= set(names)]
        new = [c for n, c in after.items() if set(n) <= set(names)]
        members = [entries[n] for n in names if n in entries]
        if not old or not new or not any(e.quantized for e in members):
            continue
        kernels = dict.fromkeys(_kernel(call) for call, _ in new)
        for e in members:
            e.kernel, e.together = ", ".join(kernels), tuple(m.name for m in members)
            e.seconds, e.float_seconds = sum(s for _, s in new), sum(s for _, s in old)
            e.bytes_read = sum(call.bytes for call, _ in new)


def _by_weights(compiled: CompiledModel, profiles: Sequence[Profile]) -> dict[tuple[str, ...], tuple[CallCost, float]]:
    """Names of modules -> a call that multiplies by their weights, and its time: the least of what several profiles say."""
    graph = compiled._compiled
    if not isinstance(graph, CompiledGraph):
        return {}
    given = compiled._exported.weights
    names = {a.input: given[i] for i, a in enumerate(graph.captured.arguments) if isinstance(a, TensorArgument) and i in given}
    out: dict[tuple[str, ...], tuple[CallCost, float]] = {}
    for i, call in enumerate(profiles[0].calls):
        if call.step is None or call.kind not in ("matmul", "library"):
            continue
        found = dict.fromkeys(names[v.index] for v in _weights_behind(call.step.node.operands) if v.index in names)
        modules = tuple(dict.fromkeys(n.rpartition(".")[0] for n in found if n.rpartition(".")[2] in ("weight", "integers")))
        if modules:
            out[modules] = (call, min(p.calls[i].seconds for p in profiles))
    return out


def _weights_behind(values: Iterable[Value]) -> list[Value]:
    """The inputs that staged values are made from; nothing of what is computed at each call."""
    found: dict[Value, None] = {}
    for v in values:
        stack, mine, whole = [v], dict[Value, None](), True
        while stack and whole:
            u = stack.pop()
            if u.producer is not None:
                whole = u.producer.op.name != "fusion"
                stack += u.producer.operands
            elif u.weight:
                mine[u] = None
            else:
                whole = False
        found |= mine if whole else {}
    return list(found)


def _families(keys: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Sets of names that have none in common, put together from sets that have."""
    out: list[dict[str, None]] = []
    for key in keys:
        touching = [s for s in out if any(n in s for n in key)]
        merged = dict.fromkeys(n for s in touching for n in s) | dict.fromkeys(key)
        out = [s for s in out if s not in touching] + [merged]
    return [tuple(s) for s in out]


def _kernel(call: CallCost) -> str:
    return f"{call.step.schedule.template}" if isinstance(call.step, KernelStep) else "library"
