"""Bits by layer: the fastest model within a budget of accuracy.

    maximize  sum of what layers save   so that   the metric moves by the budget at most

Each layer is quantized alone, by each scheme: what that moves the metric by is its sensitivity. Layers are then quantized one after the
other, always the one with the least sensitivity for what is saved, and the models on that way are judged: the last within the budget is
taken. Layers that one kernel multiplies by (a gate) are chosen together. What is saved are seconds of kernels, or bytes if nothing is
measured; what is slower quantized is left.

Reference: Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27(3), 1979 (the greedy way along the hull).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._pytree import tree_leaves

from graphopt.calibration import inferring, samples_of, tried, try_out
from graphopt.errors import UsageError, first_line
from graphopt.fake_quantized import without_fakes
from graphopt.folding import without_norms
from graphopt.ledger import Ledger
from graphopt.ledger_times import families
from graphopt.linears import layers_of, replaced
from graphopt.moves import relative_error
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantization import Progress, ledger_of, quantize

SCHEMES = ("int8-weight", "int4-weight")
METHODS = ("rtn", "gptq", "split")  # that round a layer without changing another
LEFT = "left: as asked"  # of layers that were given no scheme
LOOKS = 8  # models along the way that are judged, besides those that the search needs

Metric = Callable[[nn.Module], float]
"""How good a model is: any number but 0 that moves when the model gets worse."""


@dataclass(frozen=True)
class Option:
    """Layers that are chosen together, in one scheme: what that saves, in seconds or bytes, and what it alone moves the metric by."""

    names: tuple[str, ...]
    scheme: str
    saved: float
    loss: float


@dataclass(frozen=True)
class Point:
    """A model on the way.

    Attributes:
        schemes: of the layers that are quantized.
        saved: in seconds or bytes.
        expected: the sum of the sensitivities.
        loss: what the metric was seen to move by; None if the model was not judged.
    """

    schemes: dict[str, str]
    saved: float
    expected: float
    loss: float | None


@dataclass(frozen=True)
class Front:
    """What a search found.

    Attributes:
        unit: of what is saved, ``seconds`` or ``bytes``; ``whole``: of what it is saved, the float model's layers together.
        budget: what the metric may move by, relative to the float model's.
        options: each set of layers in each scheme.
        points: from the float model to that which saves most.
        chosen: the index of the point that was taken.
    """

    unit: str
    whole: float
    budget: float
    options: list[Option]
    points: list[Point]
    chosen: int

    def to_json(self) -> dict[str, Any]:
        """For programs: seconds or bytes, and shares of the float model's metric."""
        return asdict(self)

    def table(self, width: int = 120) -> str:
        """The models on the way, a line each; the one that was taken is marked."""
        scale, unit = (1e6, "us") if self.unit == "seconds" else (1e-6, "MB")
        table = Table("", "layers", "the layer before, and its scheme", f"saved, {unit}", "left", "metric moved", "expected")
        before: dict[str, str] = {}
        for i, p in enumerate(self.points):
            new = [n for n, s in p.schemes.items() if before.get(n) != s]
            what = f"{', '.join(new)}: {p.schemes[new[0]]}" if new else "float"
            loss = "" if p.loss is None else f"{p.loss:.3%}"
            table.add_row("taken" if i == self.chosen else "", str(len(p.schemes)), what, f"{p.saved * scale:.2f}",
                          f"{1 - p.saved / self.whole:.1%}" if self.whole else "", loss, f"{p.expected:.3%}")  # fmt: skip
            before = p.schemes
        console = Console(file=StringIO(), width=width, highlight=False, color_system=None)
        console.print(table)
        assert isinstance(console.file, StringIO)
        return console.file.getvalue() + f"within {self.budget:.3%}: {self.points[self.chosen].saved * scale:.2f} {unit} saved\n"


def fastest_within(model: nn.Module, args: Sequence[Any] | torch.Tensor = (), kwargs: Mapping[str, Any] | None = None, *, budget: float,
                   schemes: Sequence[str] = SCHEMES, metric: Metric | None = None, method: str = "rtn",
                   calibration: Iterable[Any] | None = None, measure: bool = True, progress: Progress | None = None,
                   **given: Any) -> tuple[nn.Module, Front]:  # fmt: skip
    """The fastest of the models with some layers quantized whose metric moved by no more than a budget.

    Args:
        model, args, kwargs, calibration, measure: see :func:`graphopt.quantize`; ``given``: its other arguments.
        budget: share of the float model's metric: 0.005 is half a percent, in either direction.
        schemes: that layers may be given.
        metric: how good a model is; None for the error of the outputs on the calibration's calls, relative to their norm, whose
            budget is then that error itself.
        method: ``rtn``, ``gptq`` or ``split``.

    Returns:
        The model as :func:`graphopt.quantize` makes it, with its ledger, and what was found on the way.

    Raises:
        UsageError: as :func:`graphopt.quantize`; the method moves scales between layers; or the metric is 0 or no finite number.
    """
    if method not in METHODS:
        raise UsageError(f"bits by layer take the methods {', '.join(METHODS)}; {method!r} changes more than the layer that it rounds")
    told, kwargs = progress or (lambda *_: None), dict(kwargs or {})
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    samples = samples_of(calibration, args, kwargs)
    given |= {"method": method, "calibration": None if calibration is None else [k or a for a, k in samples]}
    model, _ = without_fakes(model)
    try_out(model, args, kwargs, [] if calibration is None else samples)
    reference, note = model, ""
    moved = _judge(model, metric, samples)
    if any(Scheme.parse(s).activations for s in schemes):  # once for all: what stays in float is no other model
        model, note = without_norms(model, list(layers_of(model)), samples)
    given["reference"] = reference
    made = {s: quantize(model, args, kwargs, scheme=s, measure=measure, revert=False, progress=progress, **given) for s in schemes}
    ledgers = {s: ledger_of(m) for s, m in made.items()}
    if measure and not any(e.seconds for ledger in ledgers.values() for e in ledger.entries):
        raise UsageError("no kernel of a quantized layer was timed: give measure=False to choose by bytes")
    layers = {s: dict(m.named_modules()) for s, m in made.items()}
    options = _options(ledgers, measure)
    for i, o in enumerate(options):
        told("sensitivity", i, len(options))
        options[i] = Option(o.names, o.scheme, o.saved, moved(replaced(model, {n: layers[o.scheme][n] for n in o.names})))
    points = _way(options)
    losses = {0: 0.0}

    def loss(i: int) -> float:
        if i not in losses:
            told("judging models", len(losses), LOOKS)
            losses[i] = moved(replaced(model, {n: layers[s][n] for n, s in points[i].schemes.items()}))
        return losses[i]

    last = len(points) - 1
    for i in range(LOOKS):
        loss(round(last * i / (LOOKS - 1)))
    low, high = 0, last + 1  # the first is within the budget, and what comes after the last is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if loss(middle) <= budget else (low, middle)
    chosen = max([i for i, x in losses.items() if x <= budget and i >= low], default=0)
    result = quantize(model, args, kwargs, scheme=points[chosen].schemes, measure=measure, progress=progress, **given)
    while chosen and moved(result) > budget:  # what GPTQ makes of a layer depends on those before it
        told("judging models", len(losses), len(losses) + chosen)
        chosen -= 1
        result = quantize(model, args, kwargs, scheme=points[chosen].schemes, measure=measure, progress=progress, **given)
    losses[chosen] = moved(result)
    ledger_of(result).notes += [note] if note else []
    _explain(ledger_of(result), list(ledgers.values()))
    points = [Point(p.schemes, p.saved, p.expected, losses.get(i)) for i, p in enumerate(points)]
    unit = "seconds" if measure else "bytes"
    return result, Front(unit, _whole(ledgers, measure), budget, options, points, chosen)


def _explain(ledger: Ledger, alone: Sequence[Ledger]) -> None:
    """Say of what the search left that it did, and of what no scheme could have, why. ``alone``: each scheme's, of all layers."""
    quantized = {e.name for found in alone for e in found.entries if e.quantized}
    why = {e.name: e.verdict for found in alone for e in found.entries if not e.quantized}
    for e in ledger.entries:
        if e.verdict == LEFT:
            e.verdict = "left: the search left it in float" if e.name in quantized else why[e.name]


def _judge(model: nn.Module, metric: Metric | None, samples: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> Metric:
    """What a model moved the metric by, as a share of the float model's. Raises UsageError if that is 0 or no finite number."""
    if metric is not None:
        try:
            with torch.no_grad():
                was = float(metric(model))
        except Exception as failed:
            raise UsageError(f"the metric of the float model raised {type(failed).__name__}: {first_line(failed)}") from failed
        if not abs(was) > 0 or was in (float("inf"), float("-inf")):
            raise UsageError(f"the metric of the float model is {was}: no share of it can be told")

        def moved(other: nn.Module) -> float:
            with torch.no_grad():
                change = abs(float(metric(other)) - was) / abs(was)
            return change if change == change else float("inf")

        return moved
    with torch.no_grad(), inferring(model):
        wanted = [_floats(tried(model, sample, f"calibration batch {i}")) for i, sample in enumerate(samples)]

    def error(other: nn.Module) -> float:
        with torch.no_grad(), inferring(other):
            return relative_error((_floats(other(*a, **k)), y) for (a, k), y in zip(samples, wanted, strict=True))

    return error


def _floats(out: Any) -> torch.Tensor:
    """The first floating-point output, f64."""
    found = next((x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_floating_point()), None)
    if found is None:
        raise UsageError("the model has no output of floats: give a metric")
    return found.double()


def _options(ledgers: Mapping[str, Ledger], measure: bool) -> list[Option]:
    """Each set of layers in each scheme, where that saves something; sensitivities are not known yet."""
    entries = {s: {e.name: e for e in ledger.entries if e.quantized} for s, ledger in ledgers.items()}
    sets = families([e.together if measure and e.together else (e.name,) for found in entries.values() for e in found.values()])
    out = []
    for s, found in entries.items():
        for members in sets:
            these = [found[n] for n in members if n in found]
            if not these:
                continue
            pairs = dict.fromkeys((e.together, e.float_seconds or 0.0, e.seconds or 0.0) for e in these)  # a kernel each, once
            saved = sum(a - b for _, a, b in pairs) if measure else float(sum(e.float_bytes - e.bytes for e in these))
            if saved > 0:
                out.append(Option(tuple(e.name for e in these), s, saved, 0.0))
    return out


def _whole(ledgers: Mapping[str, Ledger], measure: bool) -> float:
    """Of all layers that some scheme may be given to: a scheme of weights alone knows no convolutions. Of times that were taken for each
    scheme, the longest."""
    entries = [e for ledger in ledgers.values() for e in ledger.entries]
    if not measure:
        return float(sum({e.name: e.float_bytes for e in entries}.values()))
    sets = families([e.together or (e.name,) for e in entries])
    kernels = [dict.fromkeys((e.together or (e.name,), e.float_seconds or 0.0) for e in ledger.entries) for ledger in ledgers.values()]
    return sum(max(sum(t for names, t in found if set(names) <= set(members)) for found in kernels) for members in sets)


def _way(options: Sequence[Option]) -> list[Point]:
    """Models from float to what saves most: the option with the least loss for what it saves more is taken next."""
    now: dict[tuple[str, ...], Option] = {}
    points = [Point({}, 0.0, 0.0, None)]

    def more(o: Option) -> tuple[float, float]:
        """What it saves and loses beyond what its layers save and lose already."""
        old = [p for names, p in now.items() if set(names) & set(o.names)]
        return o.saved - sum(p.saved for p in old), o.loss - sum(p.loss for p in old)

    while left := [o for o in options if more(o)[0] > 0]:
        best = min(left, key=lambda o: (max(more(o)[1], 0.0) / more(o)[0], more(o)[1], -more(o)[0]))
        now = {names: p for names, p in now.items() if not set(names) & set(best.names)} | {best.names: best}
        schemes = {n: o.scheme for names, o in now.items() for n in names}
        points.append(Point(schemes, sum(o.saved for o in now.values()), sum(o.loss for o in now.values()), None))
    return points


def plot(front: Front, file: Any) -> None:
    """Write a picture: the front, and the sensitivity of each layer. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(o.names for o in front.options))
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 0.25 * len(names) + 4), constrained_layout=True)
    scale, unit = (1e6, "us") if front.unit == "seconds" else (1e-6, "MB")
    judged = [p for p in front.points if p.loss is not None]
    left.plot([p.saved * scale for p in judged], [100 * (p.loss or 0.0) for p in judged], "o-", color="#0f75bc", label="judged")
    left.plot([p.saved * scale for p in front.points], [100 * p.expected for p in front.points], ":", color="#b8b8b8",
              label="sum of sensitivities")  # fmt: skip
    taken = front.points[front.chosen]
    left.plot(taken.saved * scale, 100 * (taken.loss or 0.0), "*", color="#c1272d", markersize=14, label="taken")
    left.axhline(100 * front.budget, color="black", linewidth=0.8)
    left.set(xlabel=f"saved, {unit}", ylabel="metric moved, %", title=f"within {front.budget:.2%} (the line)")
    left.set_yscale("symlog", linthresh=100 * front.budget or 1.0)
    left.legend()
    left.grid(alpha=0.3)
    schemes = list(dict.fromkeys(o.scheme for o in front.options))
    for i, s in enumerate(schemes):
        mine = [o for o in front.options if o.scheme == s]
        right.barh([names.index(o.names) + 0.8 * (i + 0.5) / len(schemes) for o in mine], [100 * o.loss for o in mine],
                   height=0.8 / len(schemes), label=s)  # fmt: skip
    right.set_yticks([i + 0.4 for i in range(len(names))], [", ".join(n) for n in names], fontsize=6)
    right.set_ylim(len(names), 0)
    spread = "log" if any(o.loss for o in front.options) else "linear"
    right.set(xlabel="metric moved by this layer alone, %", title="sensitivity", xscale=spread)
    right.legend()
    figure.savefig(file, dpi=130)
    plt.close(figure)
