"""What a benchmark found, what may be claimed of it, and its JSON form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt.bench.limits import Limits
from graphopt.bench.load import Load
from graphopt.bench.stats import TURNS, Ratio, Times, geometric_mean, ratio_of_medians
from graphopt.bench.systems import system as system_of
from graphopt.bench.work import Work

OURS, BEST = "graphopt", "best of ONNX Runtime and OpenVINO"
FORMAT = 2
UNCERTAINTY_LIMIT = 0.05  # of a ratio: how far the ends of its 95% interval may be


def converters(names: Iterable[str], narrow: bool = False) -> list[str]:
    """Those of the systems that run a converted model, in floats or ``narrow``: of both makers, or none.

    The best of them on each model is a peer of its own.
    """
    found = [n for n in names if system_of(n).convert is not None and system_of(n).narrow == narrow]
    return found if len(found) > 1 else []


@dataclass
class SystemResult:
    """One system on one model.

    Attributes:
        failed: why there are no times, in a line; empty if there are some.
        error: largest difference to an f64 run, relative to its largest element; None if that could not be run.
        cold, warm: seconds to the first result with empty and with filled caches, in fresh processes, without the capture; a system
            without caches has no warm. None: not measured.
        capture: seconds until the compiler had the graph (Dynamo), or the converter its file.
        memory: bytes of the peak of resident memory while it runs, above the process with the model and its weights.
        compile_memory: the same while it compiles.
        work: what this system's model must do at least, where it is another than the float one: quantized weights have fewer bytes.
    """

    name: str
    times: Times | None = None
    failed: str = ""
    error: float | None = None
    cold: float | None = None
    warm: float | None = None
    capture: float | None = None
    memory: int | None = None
    compile_memory: int | None = None
    work: Work | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        out = {k: v for k, v in vars(self).items() if k not in ("times", "work")}
        out["work"] = asdict(self.work) if self.work else None
        if self.times:
            t = self.times
            out |= {"median": t.median, "p10": t.p10, "p90": t.p90, "spread": t.spread, "seconds": [list(turn) for turn in t.turns]}
        return out


@dataclass
class ModelResult:
    """All systems on one model.

    Attributes:
        work: what the float model must do at least; None if it is not known.
        before, during: the machine's load; None where it cannot be seen.
        limits: what the machine reached in turns with the systems, medians: clocks change, and so does where a virtual machine's cores are.
        ours: the system that the others are compared with.
    """

    name: str
    systems: dict[str, SystemResult] = field(default_factory=dict)
    work: Work | None = None
    before: Load | None = None
    during: Load | None = None
    limits: Limits | None = None
    ours: str = OURS

    def median(self, system: str) -> float | None:
        found = self.systems.get(system)
        return found.times.median if found and found.times else None

    def best_converter(self) -> str | None:
        """The faster one of ONNX Runtime and OpenVINO, if one of them ran."""
        ran = [(t, name) for name in converters(self.systems, system_of(self.ours).narrow) if (t := self.median(name)) is not None]
        return min(ran)[1] if ran else None

    def complaints(self) -> list[str]:
        """Why nothing is claimed of this model; empty on a quiet machine."""
        out = self.before.complaints("before the measurement") if self.before else []
        return out + (self.during.complaints("during it") if self.during else [])

    def measured(self, peer: str) -> Ratio | None:
        """How many times as fast as a peer graphopt was, claimed or not; None if a time is missing."""
        name = self.best_converter() if peer == BEST else peer
        ours, theirs = self.systems.get(self.ours), self.systems.get(name or "")
        return ratio_of_medians(theirs.times, ours.times) if ours and theirs and ours.times and theirs.times else None

    def doubts(self, peer: str) -> str:
        """Why the ratio to a peer is not claimed, if the turns differ too much."""
        found = self.measured(peer)
        if found is None or found.uncertainty <= UNCERTAINTY_LIMIT:
            return ""
        if found.turns < TURNS:
            return f"fewer than {TURNS} rounds do not tell how sure it is"
        where = f"between {found.low:.2f} and {found.high:.2f} with 95% confidence"
        return f"it lies {where}, by {found.turns} rounds (limit {UNCERTAINTY_LIMIT:.0%} to each side)"

    def ratio(self, peer: str) -> Ratio | None:
        """How many times as fast as a peer graphopt is, by medians; None if a time is missing or nothing may be claimed."""
        return None if self.complaints() or self.doubts(peer) else self.measured(peer)

    def fraction(self, system: str, limits: Limits | None) -> float | None:
        """The least time that the machine's limits allow, over the time that a system took."""
        found = self.median(system)
        if found is None or (self.systems[system].work is None and system_of(system).narrow):
            return None  # the bytes of its weights are not known
        least = self.least_seconds(limits, self.systems[system].work)
        return least / found if least else None

    def least_seconds(self, limits: Limits | None, work: Work | None = None) -> float | None:
        """The time that some work (the float model's if None) needs at the limits: those that were measured in turns, if there are some."""
        limits, work = self.limits or limits, work or self.work
        return None if limits is None or work is None else limits.least_seconds(work.flops, work.weight_bytes)

    def to_json(self, limits: Limits | None, peers: list[str]) -> dict[str, Any]:
        return {
            "name": self.name, "ours": self.ours, "limits": asdict(self.limits) if self.limits else None,
            "work": asdict(self.work) if self.work else None,
            "load": {"before": asdict(self.before) if self.before else None, "during": asdict(self.during) if self.during else None},
            "complaints": [*self.complaints(), *(f"{p}: {doubt}" for p in peers if (doubt := self.doubts(p)))],
            "ratios": {p: r.value if (r := self.ratio(p)) else None for p in peers},
            "measured": {p: asdict(r) if (r := self.measured(p)) else None for p in peers},
            "systems": {k: {**s.to_json(), "fraction_of_limit": self.fraction(k, limits)} for k, s in self.systems.items()},
        }  # fmt: skip


@dataclass
class Results:
    """A whole run.

    Attributes:
        machine: processor, versions, threads, rounds: what a reader needs to judge the figures.
        limits: what the machine reached; None if that could not be measured, for ``limits_failed``.
    """

    machine: dict[str, Any]
    limits: Limits | None = None
    limits_failed: str = ""
    models: list[ModelResult] = field(default_factory=list)

    def peers(self) -> list[str]:
        """What graphopt is compared with, in order; the best of the two converters last."""
        names = list(dict.fromkeys(n for m in self.models for n in m.systems if n != m.ours))
        return names + ([BEST] if any(converters(names, system_of(m.ours).narrow) for m in self.models) else [])

    def geometric_mean(self, peer: str) -> tuple[float | None, int]:
        """The mean of the claimed ratios against a peer, and how many there are."""
        ratios = [r.value for m in self.models if (r := m.ratio(peer)) is not None]
        return geometric_mean(ratios), len(ratios)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; times in seconds, sizes in bytes."""
        peers = self.peers()
        means = {p: self.geometric_mean(p) for p in peers}
        return {
            "format": FORMAT, "machine": self.machine, "limits": asdict(self.limits) if self.limits else None,
            "models": [m.to_json(self.limits, peers) for m in self.models],
            "geometric_means": {p: {"ratio": mean, "models": n} for p, (mean, n) in means.items()},
        }  # fmt: skip
