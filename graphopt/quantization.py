"""``graphopt.quantize``: a model with quantized layers, and the ledger of what that cost and gained.

Batch norms are folded into the convolutions that will be quantized. Weights are rounded one layer at a time, by a method; the model is
run twice on the example inputs, compiled in float and quantized, and each kernel is timed against the float kernel that it replaces. What
became slower is put back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from graphopt.calibration import OBSERVERS, Look, Observer, Sample, inferring, only_input, run_hooked, samples_of, try_out, watch
from graphopt.clipping import round_clipped
from graphopt.errors import GraphoptError, UsageError, nearest
from graphopt.fake_quantized import without_fakes
from graphopt.folding import without_norms
from graphopt.gptq import Hessian, round_weight
from graphopt.ledger import Entry, Ledger
from graphopt.ledger_times import RUNS, measure_times
from graphopt.linears import (
    FLOAT,
    is_convolution,
    layers_of,
    left_in_float,
    linears_of,
    replaced,
    schemes_of,
    separate,
    smooth_of,
    weight_of,
)
from graphopt.model import compile
from graphopt.moves import EXACT, move
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_conv import QuantizedConv
from graphopt.quantized_linear import QuantizedLinear, largest_of, quantize_groups
from graphopt.smoothing import groups_of, smoothed
from graphopt.split import SplitLinear
from graphopt.unquantized import unquantized

LEAST = 1 << 14  # elements of the smallest weight that is worth it
METHODS = ("rtn", "gptq", "smoothquant", "awq", "split")
CUT = 0.1  # share of an input's norm beyond a static range that is remarked on
HESSIANS = 1 << 29  # bytes of those that are kept at a time

Quantized = QuantizedLinear | SplitLinear | QuantizedConv
Progress = Callable[[str, int, int], None]
"""Told (what goes on, done, total)."""


def quantize(model: nn.Module, args: Sequence[Any] | torch.Tensor = (), kwargs: Mapping[str, Any] | None = None, *,
             scheme: str | Mapping[str, str] = "int8-weight", method: str = "rtn", calibration: Iterable[Any] | None = None,
             observer: str = "minmax", keep: Iterable[str] = (), measure: bool = True, revert: bool = True, least: int = LEAST,
             progress: Progress | None = None, reference: nn.Module | None = None, **options: Any) -> nn.Module:  # fmt: skip
    """Quantize the linear layers of a model, and, by schemes of both factors, its convolutions.

    Args:
        model: stays as it is; what is not quantized and is larger than 1 MiB lies in the same memory in the result. Of one that
            :func:`graphopt.fake_quantize` made, the layers that were trained are quantized.
        args, kwargs: example inputs (one tensor alone will do): errors of outputs and times are measured on them.
        scheme: ``int8-weight``, ``int4-weight``, ``int4-weight-g128-zp``, ``int8-dynamic``, ``int8-static`` ..., see
            docs/quantization.md; or such by layer, ``{"lm_head": "int8-weight", "*.down": "float", "*": "int4-weight"}``: the first
            pattern that fits a layer's name counts, and what none fits stays in float.
        method: how weights are rounded: ``rtn``, to the nearest; ``gptq``; ``smoothquant`` and ``awq``, which move scales from inputs
            into weights first; ``split``, into the sum of three.
        calibration: calls of the model that methods and static schemes look at: tensors, tuples of arguments, or dicts of keyword
            arguments; the example inputs if None.
        observer: which range of the inputs a static scheme represents: ``minmax``, ``percentile``, ``mse``, ``entropy``.
        keep: names of modules that stay in float; ``*`` stands for anything.
        measure: compile both models, and time each kernel against the float one.
        revert: put back in float what became slower.
        least: elements of the smallest weight that is quantized; a convolution's count 64 times.
        reference: the model that this is another form of, which errors of outputs are told against; batch norms are folded already then.
        options: of the compilations, see :class:`graphopt.Options`.

    Returns:
        A module that is called like the model, compiles, and is saved as any other (``torch.save``, ``state_dict``). Its attribute
        ``ledger`` is the :class:`~graphopt.ledger.Ledger`.

    Raises:
        UsageError: there is no such scheme, method or observer, a pattern of ``keep`` fits nothing, there is nothing to calibrate on, the
            model does not take the example inputs or the calibration (names the batch), or a weight holds infinities or nan (names it).
    """
    told, kwargs = progress or (lambda *_: None), dict(kwargs or {})
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    model, trained = without_fakes(model)
    schemes = schemes_of(scheme, list(layers_of(model)))
    for name, value, known in (("method", method, METHODS), ("observer", observer, OBSERVERS)):
        if value not in known:
            raise UsageError(f"there is no {name} {value!r}{nearest(str(value), known)}; {name}s are {', '.join(known)}")
    if method == "split" and any(s.activations for s in schemes.values()):
        raise UsageError("method 'split' rounds weights alone; give a scheme of weights, such as int2-weight")
    static = any(s.activations == "static" for s in schemes.values())
    left = left_in_float(model, schemes, tuple(keep), least)
    schemes = {n: s for n, s in schemes.items() if n not in left}
    convolutions = [n for n in schemes if n not in linears_of(model)] if reference is None else []
    samples = samples_of(calibration, args, kwargs) if method not in ("rtn", "split") or static or convolutions else []
    if reference is None:  # else whoever made it tried
        try_out(model, args, kwargs, [] if calibration is None else samples)
    given, note = model if reference is None else reference, ""
    if convolutions:
        told("folding batch norms", 0, 1)
        model, note = without_norms(model, convolutions, samples)
    if method in ("smoothquant", "awq"):
        told("smoothing", 0, 1)
        model = _smooth(model, samples, schemes, method)
    linears = layers_of(model)
    made, remarks = _rounded(model, {n: linears[n] for n in schemes}, schemes, method, samples, told)
    set_steps(model, linears, made, samples, observer, told, left)
    counts = Counter(m.scheme for m in made.values())
    said = scheme if isinstance(scheme, str) else ", ".join(f"{s} ({count})" for s, count in counts.items()) or FLOAT
    ledger = Ledger(said, notes=[note] if note else [])
    with torch.no_grad(), inferring(model):  # parametrizations are computed, some of which change themselves in training
        others = unquantized(model)
    for name, m in model.named_modules():
        ledger.entries += [_entry(name, m, made.get(name), left.get(name, ""))] if name in linears else others.get(name, [])
    if measure and not tree_leaves((args, kwargs)):
        ledger.notes.append("there were no example inputs: nothing was timed, and errors of outputs are not known")
    if differing := Counter(s for n, s in trained.items() if n in made and s != str(schemes[n])):
        ledger.notes.append(f"trained with rounding by another scheme: {', '.join(f'{s} ({count})' for s, count in differing.items())}")
    entries = {e.name: e for e in ledger.entries}
    for name in made:
        entries[name].remark = remarks.get(name, "")
    result = replaced(model, made)
    if tree_leaves((args, kwargs)):
        told("measuring errors", 0, 1)
        _layer_errors(model, linears, made, entries, args, kwargs)
        ledger.output_error = move(given, result, args, kwargs)
        if measure and made:
            told("measuring times", 0, 1)
            measure_times(model, result, entries, ledger, args, kwargs, options)
            slower = [n for n in made if (s := entries[n].speedup) is not None and s < 1.0] if revert else []
            if slower:
                result = replaced(model, {n: m for n, m in made.items() if n not in slower})
                _revert(slower, entries)
                told("measuring again", 0, 1)
                ledger.output_error = move(given, result, args, kwargs)
                ledger.seconds = compile(result, args, kwargs, **options).profile(*args, runs=RUNS, **kwargs).seconds
    result = separate(result)
    result.ledger = ledger  # type: ignore[assignment]
    return result


def _smooth(model: nn.Module, samples: Sequence[Sample], schemes: Mapping[str, Scheme], method: str) -> nn.Module:
    """The model with scales moved into the weights that will be quantized; the same function, which is made sure of."""
    groups = [g for g in groups_of(model, *samples[0]) if all(n in schemes for n in g.linears)]
    linears = linears_of(model)
    alone = [n for n in schemes if n in linears and not any(n in g.linears for g in groups)]
    result = replaced(model, smoothed(model, groups, alone, samples, schemes, method, weight_of))
    for sample in samples:
        moved = move(model, result, *sample)
        if moved is not None and not moved < EXACT:
            why = "the model may take another way for some inputs than for the first of the calibration"
            if torch.is_autocast_enabled("cpu"):
                why = "torch.autocast is on, and rounds more than that: quantize outside of it"
            raise GraphoptError(f"{method}: moving scales changed the output by {moved:.3g} of its norm, before anything was rounded; "
                                f"{why}")  # fmt: skip
    return result


def _rounded(model: nn.Module, linears: Mapping[str, nn.Module], schemes: Mapping[str, Scheme], method: str, samples: Sequence[Sample],
             told: Progress) -> tuple[dict[str, Quantized], dict[str, str]]:  # fmt: skip
    """Quantized layers by name, and remarks on some.

    What looks at products of inputs takes layers in waves whose Hessians fit into memory, each given what the ones before became.
    """
    made: dict[str, Quantized] = {}
    remarks: dict[str, str] = {}
    looks = {"gptq": round_weight, "awq": round_clipped}.get(method)
    for name in [n for n, m in linears.items() if is_convolution(m)]:  # to the nearest, by any method
        made[name] = QuantizedConv.of(linears[name], schemes[name], f"{name}.weight")
    linears = {n: m for n, m in linears.items() if n not in made}
    for wave in _waves(linears) if looks is not None else [list(linears)]:
        hessians: dict[str, Hessian] = {}
        if looks is not None:
            hessians = {n: Hessian(weight_of(linears[n]).shape[1], holds=method == "gptq") for n in wave}
            told("looking at inputs", len(made), len(linears))
            watch(replaced(model, made), wave, samples, _smoothing(linears, lambda name, x, seen=hessians: seen[name].see(x)))  # type: ignore[misc]
        for name in wave:
            told("rounding", len(made), len(linears))
            weight, scheme, what, bias = weight_of(linears[name]), schemes[name], f"{name}.weight", linears[name]._parameters["bias"]
            if method == "split":
                made[name] = SplitLinear(weight, bias, scheme, what)
                continue
            parts = quantize_groups(weight, scheme, what) if looks is None else looks(weight, hessians[name], scheme, what)
            made[name] = QuantizedLinear(*parts, bias, weight.shape[1], str(scheme), smooth=smooth_of(linears[name]))
            if method == "gptq":
                remarks[name] = hessians[name].remark()
    return made, remarks


def _smoothing(linears: Mapping[str, nn.Module], look: Look) -> Look:
    """Show inputs as the weights see them."""

    def shown(name: str, x: torch.Tensor) -> None:
        smooth = smooth_of(linears[name])
        look(name, x if smooth is None else x * smooth)

    return shown


def set_steps(model: nn.Module, linears: Mapping[str, nn.Module], made: dict[str, Any], samples: Sequence[Sample], observer: str,
               told: Progress, left: dict[str, str]) -> None:  # fmt: skip
    """Find the ranges of static layers' inputs. Those that have none stay in float: they leave ``made``, and ``left`` is told."""
    static = [n for n, m in made.items() if not isinstance(m, SplitLinear) and m.activations == "static"]
    if not static:
        return
    told("looking at inputs", 0, 1)
    seen = {n: Observer() for n in static}
    reached = dict[str, None]()

    def look(name: str, x: torch.Tensor) -> None:
        reached[name] = None
        seen[name].see(x)

    watch(model, static, samples, _smoothing(linears, look))
    for name in static:
        layer = made[name]
        assert not isinstance(layer, SplitLinear)
        if seen[name].largest:
            layer.step = torch.tensor(seen[name].step(observer, largest_of(Scheme.parse(layer.scheme))))
        else:
            left[name] = "calibration met nothing but zeros there" if name in reached else "calibration never reached it"
            del made[name]


def _waves(linears: Mapping[str, nn.Module]) -> list[list[str]]:
    """Layers in order, as many at a time as have Hessians of ``HESSIANS`` bytes together; one at least."""
    waves: list[list[str]] = []
    room = 0
    for name, m in linears.items():
        size = 8 * weight_of(m).shape[1] ** 2
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


def _entry(name: str, m: nn.Module, quantized: Quantized | None, why: str) -> Entry:
    weight = weight_of(m)
    shape = (weight.shape[0], weight.shape[1])
    if quantized is None:
        return Entry(name, shape, "", f"left: {why}", weight.nbytes, weight.nbytes)
    wrong = quantized.weight.flatten(1) - weight.detach()
    lost, norm = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (wrong, weight.detach()))
    error = float(lost / norm.clamp_min(1e-150))
    return Entry(name, shape, quantized.scheme, "quantized", weight.nbytes, quantized.nbytes, error)


def _revert(names: Sequence[str], entries: Mapping[str, Entry]) -> None:
    for name in names:
        e = entries[name]
        assert e.seconds is not None and e.float_seconds is not None
        e.verdict = f"reverted: slower, {e.seconds * 1e6:.1f} us against {e.float_seconds * 1e6:.1f}"
        e.bytes = e.float_bytes


def _cut_off(x: torch.Tensor, quantized: Quantized) -> float:
    """The share of an input's norm that is beyond a static range; 0 where there is none."""
    if isinstance(quantized, SplitLinear) or quantized.step is None:
        return 0.0
    smooth = quantized.smooth if isinstance(quantized, QuantizedLinear) else None
    x = (x if smooth is None else x * smooth).detach().double()
    most = quantized.step.double() * largest_of(Scheme.parse(quantized.scheme))
    return float((x.abs() - most).clamp_min(0).norm() / x.norm().clamp_min(1e-150))


# --- errors -------------------------------------------------------------------------------------------------------------


def _layer_errors(model: nn.Module, linears: Mapping[str, nn.Module], made: Mapping[str, Quantized], entries: Mapping[str, Entry],
                  args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:  # fmt: skip
    """Each layer's error, given the float model's inputs, one layer at a time in memory."""
    sums: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: torch.Tensor) -> None:
            x = only_input(args, kwargs)
            wrong = (made[name](x) - output).double()
            if (cut := _cut_off(x, made[name])) > CUT:
                text = f"{cut:.0%} of the example inputs' norm is beyond the range that calibration met"
                entries[name].remark = "; ".join(filter(None, (entries[name].remark, text)))
            a, b = sums.get(name, (0.0, 0.0))
            sums[name] = a + float(wrong.square().sum()), b + float(output.double().square().sum())

        return look

    handles = [linears[name].register_forward_hook(hook(name), with_kwargs=True) for name in made]
    run_hooked(model, [(tuple(args), dict(kwargs))], handles)
    for name, (a, b) in sums.items():
        entries[name].output_error = (a / b) ** 0.5 if b else 0.0
