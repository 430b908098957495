"""Bits by layer: the way from float to what saves most, the budget, and the front as a table, as JSON and as a picture."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.bits import Option, _options, _way, _whole, fastest_within, plot
from graphopt.errors import UsageError
from graphopt.ledger import Entry, Ledger


def model() -> nn.Sequential:
    """Three layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 192), nn.Tanh(), nn.Linear(192, 160), nn.GELU(), nn.Linear(160, 128)).eval()


def test_the_way() -> None:
    """Least loss for what is saved first; a better scheme of a layer takes the place of the other; every step saves more."""
    options = [Option(("a",), "int8", 3.0, 0.01), Option(("a",), "int4", 4.0, 0.10), Option(("b",), "int8", 3.0, 0.0),
               Option(("b",), "int4", 2.0, 0.0), Option(("c", "d"), "int8", 1.0, 0.02)]  # fmt: skip
    points = _way(options)
    assert [p.schemes for p in points] == [
        {}, {"b": "int8"}, {"b": "int8", "a": "int8"}, {"b": "int8", "a": "int8", "c": "int8", "d": "int8"},
        {"b": "int8", "a": "int4", "c": "int8", "d": "int8"},
    ]  # fmt: skip
    assert [p.saved for p in points] == [0, 3, 6, 7, 8] and points[-1].expected == pytest.approx(0.12)
    assert _way([]) == points[:1]


def test_no_set_of_layers_saves_more_for_as_little() -> None:
    """Against all sets, with additive losses: the points of the way are on the convex hull."""
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(12, 2, generator=generator).tolist()
    options = [Option((str(i // 2),), f"s{i % 2}", a, b) for i, (a, b) in enumerate(values)]
    every = [(sum(o.saved for o in c if o), sum(o.loss for o in c if o))
             for c in itertools.product(*((None, options[2 * i], options[2 * i + 1]) for i in range(6)))]  # fmt: skip
    for p in _way(options):
        better = [s for s, loss in every if loss <= p.expected + 1e-12]
        assert p.saved >= max(better) - max(o.saved for o in options)  # the greedy bound: less than one option is missed


def test_the_whole_is_that_of_all_schemes() -> None:
    """A scheme of weights alone knows no convolutions, and layers may share a kernel in one and not in another."""

    def entry(name: str, seconds: float | None, together: tuple[str, ...]) -> Entry:
        return Entry(name, (2, 2), "s", "quantized", 16, 4, float_seconds=seconds, together=together)

    weights = Ledger("w", [entry("a", 5.0, ("a", "b")), entry("b", 5.0, ("a", "b")), entry("c", None, ())])
    both = Ledger("d", [entry("conv", 7.0, ("conv",)), entry("a", 2.0, ("a",)), entry("b", 2.5, ("b",)), entry("c", 1.0, ("c",))])
    for ledgers in ({"w": weights, "d": both}, {"d": both, "w": weights}):
        assert _whole(ledgers, True) == 5.0 + 7.0 + 1.0 and _whole(ledgers, False) == 64.0


@pytest.mark.parametrize("schemes", [("int8-weight", "int8-dynamic"), ("int8-dynamic", "int4-weight")])
def test_the_share_that_is_left_of_a_net_of_convolutions(schemes: tuple[str, str]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 256))
    _, front = fastest_within(net.eval(), (torch.randn(2, 3, 12, 12),), budget=0.5, schemes=schemes, measure=False)
    assert front.whole == 4 * (27 * 32 + 288 * 64 + 64 * 256)
    assert all(0.2 * front.whole < front.whole - p.saved <= front.whole for p in front.points)


def test_layers_of_one_kernel_are_chosen_together() -> None:
    def entry(name: str, seconds: float, together: tuple[str, ...]) -> Entry:
        return Entry(name, (2, 2), "s", "quantized", 16, 4, seconds=seconds, float_seconds=5.0, together=together)

    ledger = Ledger("s", [entry("a", 2.0, ("a", "b")), entry("b", 2.0, ("a", "b")), entry("c", 6.0, ("c",))])
    assert _options({"s": ledger}, True) == [Option(("a", "b"), "s", 3.0, 0.0)]  # once; c is slower
    kept = Ledger("s", [replace(ledger.entries[0], verdict="left: as asked"), *ledger.entries[1:]])
    assert _options({"s": kept}, True) == [Option(("b",), "s", 3.0, 0.0)]
    assert [(o.names, o.saved) for o in _options({"s": ledger}, False)] == [(("a",), 12.0), (("b",), 12.0), (("c",), 12.0)]


@pytest.mark.parametrize("budget", [1e-9, 0.02, 1.0])
def test_within_the_budget(budget: float, tmp_path: Path) -> None:
    m, x = model(), torch.randn(50, 128)
    made, front = fastest_within(m, (x,), budget=budget, schemes=("int8-weight", "int4-weight", "int2-weight"), measure=False)
    with torch.no_grad():
        error = float((made(x) - m(x)).norm() / m(x).norm())
    assert error <= budget
    schemes = {e.name: e.scheme for e in made.ledger.entries if e.quantized}
    assert schemes == front.points[front.chosen].schemes and front.points[0].loss == 0.0
    assert all(a.saved < b.saved for a, b in itertools.pairwise(front.points)) and len(front.options) == 9
    if budget == 1e-9:
        assert not schemes and type(made[0]) is nn.Linear
    elif budget == 1.0:
        assert set(schemes.values()) == {"int2-weight"}
    else:
        assert schemes and set(schemes.values()) != {"int2-weight"}
        assert json.loads(json.dumps(front.to_json()))["chosen"] == front.chosen
        assert "taken" in front.table() and "within 2.000%" in front.table()
        pytest.importorskip("matplotlib")
        plot(front, tmp_path / "front.png")
        assert (tmp_path / "front.png").stat().st_size > 10_000


def test_a_metric_of_ones_own() -> None:
    """A metric that looks at the first layer alone: the others are quantized as far as it goes."""
    m, x = model(), torch.randn(50, 128)

    def metric(other: nn.Module) -> float:
        return 1.0 + 10 * float((other[0](x) - m[0](x)).norm() / m[0](x).norm())

    _, front = fastest_within(m, (x,), budget=1e-3, metric=metric, measure=False)
    assert front.points[front.chosen].schemes == {"2": "int4-weight", "4": "int4-weight"}


def test_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is slower by a kernel's time is no option."""

    def measure(model, result, entries, ledger, args, kwargs, options):
        for name, e in entries.items():
            e.float_seconds, e.seconds, e.together = 4.0, 1.0 if name == "2" else 5.0, (name,)

    monkeypatch.setattr("graphopt.quantization.measure_times", measure)
    made, front = fastest_within(model(), (torch.randn(2, 128),), budget=0.5, schemes=("int8-weight",))
    assert front.unit == "seconds" and front.whole == 12.0 and [(o.names, o.saved) for o in front.options] == [(("2",), 3.0)]
    assert [e.name for e in made.ledger.entries if e.quantized] == ["2"]


def test_why_layers_are_left() -> None:
    """The user asked for one alone; another is too small for any scheme, and others the search left."""
    torch.manual_seed(0)
    m = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in ((128, 256), (256, 128), (128, 8), (8, 2048)))).eval()
    made, _ = fastest_within(m, (torch.randn(2, 128),), budget=0.0, keep=["3"], measure=False)
    assert [e.verdict for e in made.ledger.entries] == [
        *["left: the search left it in float"] * 2, "left: 1024 elements are too few", "left: as asked"
    ]  # fmt: skip


def test_wrong_requests() -> None:
    m, x = model(), torch.randn(2, 128)
    with pytest.raises(UsageError, match="changes more than the layer"):
        fastest_within(m, (x,), budget=0.1, method="awq")
    with pytest.raises(UsageError, match="no share of it"):
        fastest_within(m, (x,), budget=0.1, metric=lambda _: 0.0)
    with pytest.raises(UsageError, match="the metric of the float model raised KeyError: 'x'"):
        fastest_within(m, (x,), budget=0.1, metric=lambda _: {}["x"])
    with pytest.raises(UsageError, match="there is no scheme"):
        fastest_within(m, (x,), budget=0.1, schemes=("int3",))
