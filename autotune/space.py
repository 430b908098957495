"""The words that templates, tuner and database share: Workload, Param, Constraint, SearchSpace, Schedule.

A workload is a canonical fused region: its text, with names and source lines left out, is its identity, so equal regions
of different models share one kernel and one tuning record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.ir.hashing import canonical_text
from graphopt.ir.text import parse_graph


@dataclass(frozen=True)
class Workload:
    """What a kernel must compute.

    Attributes:
        kind: the family, as fusion named it: ``pointwise``, ``reduction``, ``rowwise``, ``matmul`` ...
        text: canonical text of the region; strides on inputs and outputs are part of it.
    """

    kind: str
    text: str

    @staticmethod
    def of(body: Graph, kind: str) -> Workload:
        return Workload(kind, canonical_text(body))

    @cached_property
    def graph(self) -> Graph:
        """The region, parsed. Do not change it."""
        return parse_graph(self.text)

    @cached_property
    def key(self) -> str:
        """SHA-256 of kind and text, 16 hex digits."""
        return hashlib.sha256(f"{self.kind}\n{self.text}".encode()).hexdigest()[:16]


Knob = int | str | bool | tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """A point of a search space: the same type for TVM and for Triton.

    Attributes:
        template: name of the template.
        sketch: which structure (e.g. ``tiled``, ``direct``).
        knobs: (name, value), sorted by name.
    """

    template: str
    sketch: str = "default"
    knobs: tuple[tuple[str, Knob], ...] = ()

    @staticmethod
    def make(template: str, sketch: str = "default", **knobs: Knob) -> Schedule:
        return Schedule(template, sketch, tuple(sorted(knobs.items())))

    def __getitem__(self, name: str) -> Any:
        return dict(self.knobs)[name]

    def to_json(self) -> str:
        return json.dumps({"template": self.template, "sketch": self.sketch, "knobs": dict(self.knobs)})

    @staticmethod
    def from_json(text: str) -> Schedule:
        data = json.loads(text)
        knobs = {k: tuple(v) if isinstance(v, list) else v for k, v in data["knobs"].items()}
        return Schedule.make(data["template"], data["sketch"], **knobs)


@dataclass(frozen=True)
class Param:
    """A knob and its choices, the default first.

    Choices that are all tuples are tile sizes: the factors of one size by level; all numbers, they are ordered; otherwise they are names.

    Attributes:
        group: knobs of one group shape one structure (a register tile, the division into tasks): what is good for one of them depends
            on the others, so a search inherits them together. A knob without a group is one of its own.
    """

    name: str
    choices: tuple[Knob, ...]
    group: str = ""


@dataclass(frozen=True)
class Constraint:
    """A condition on knobs, and what it says when it rejects."""

    reason: str
    holds: Callable[[Mapping[str, Knob]], bool]


@dataclass(frozen=True)
class Level:
    """A loop of a kernel, or several that run as one.

    Attributes:
        trips: iterations for one of the level around it; a mean where they differ.
        touched: bytes of each operand (in the order of :class:`LoopNest`) that one iteration touches.
        kind: ``parallel``, ``serial``, ``unrolled`` or ``vector``.
    """

    trips: float
    touched: tuple[float, ...]
    kind: str = "serial"


@dataclass(frozen=True)
class LoopNest:
    """The loops that a schedule makes of a workload, as far as they decide its speed: what a cost model looks at.

    Attributes:
        operands: what is read and written: inputs, outputs, scratch.
        levels: outermost first. All trips together, each doing ``flops``, are the whole kernel.
        flops: operations of one iteration of the innermost level, with those that are wasted.
        waste: operations done / operations needed, at least 1.
        registers: vector registers that the innermost level holds.
        moved: bytes copied before the loops start: packing, padding.
    """

    operands: tuple[str, ...]
    levels: tuple[Level, ...]
    flops: float
    waste: float = 1.0
    registers: int = 0
    moved: float = 0.0


class Rule(str, Enum):
    """A derivation rule: one step from what a workload computes to the loops that compute it. A sketch is what some rules yield.

    What a rule leaves open (sizes of tiles, widths of vectors, who does what) are the sketch's knobs.

    Reference: Zheng et al., "Ansor: Generating High-Performance Tensor Programs for Deep Learning", OSDI 2020, section 4.1.
    """

    FLAT = "flat"  # the elements of the result in memory's order, in pieces: nothing is used twice
    INLINE = "inline"  # what stands before is computed where it is used
    ROWS = "rows"  # row by row: what is summed over a row is at hand for what uses it
    TILE = "multi-level tiling"  # tasks, tiles of registers, steps of the summed axis
    FUSE = "fused consumer"  # what stands behind is computed on a tile before it is stored
    PACK = "packed operand"  # an operand is copied into the order in which tiles read it, or is held so
    CACHE_WRITE = "cache write"  # sums of several tiles are kept near while a block of the summed axis is used by all of them
    PIECES = "divided tasks"  # lines and channels of a task of any size
    RFACTOR = "reduction factorization"  # one summed axis in pieces, each with sums of its own, which are summed at the end
    SPLIT_DEPTH = "split depth"  # the same of a product's depth
    TURN = "turned tasks"  # threads divide the other axis first
    TENSORIZE = "tensorization"  # instructions that multiply pairs, or whole tiles
    SPLIT_NUMBERS = "split numbers"  # a number of f32 as a sum of narrower ones
    LIBRARY = "library"  # PyTorch's kernels: a call for each operation
    WINOGRAD = "winograd"  # Winograd's transform: fewer multiplications


@dataclass(frozen=True)
class SearchSpace:
    """All schedules of a template for a workload; the default is always among them.

    Attributes:
        sketches: structures that have the same knobs.
        rules: what yielded each sketch, by its name.
        nest: the loops of a schedule, for a cost model; None where a template does not tell.
    """

    template: str
    sketches: tuple[str, ...] = ("default",)
    params: tuple[Param, ...] = ()
    constraints: tuple[Constraint, ...] = field(default_factory=tuple)
    nest: Callable[[Schedule], LoopNest] | None = field(default=None, compare=False)
    rules: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict, compare=False)

    def default(self) -> Schedule:
        """The schedule that needs no tuning: the first sketch, the first choice of every knob."""
        return Schedule.make(self.template, self.sketches[0], **{p.name: p.choices[0] for p in self.params})

    def rejection(self, schedule: Schedule) -> str | None:
        """Why a schedule is not in the space, or None if it is."""
        knobs = dict(schedule.knobs)
        if schedule.template != self.template or schedule.sketch not in self.sketches:
            return f"{schedule.template}/{schedule.sketch} is no sketch of {self.template}"
        for p in self.params:
            if knobs.get(p.name) not in p.choices:
                return f"{p.name} = {knobs.get(p.name)} is not among {p.choices}"
        return next((c.reason for c in self.constraints if not c.holds(knobs)), None)

    def check(self, schedule: Schedule) -> Schedule:
        """The schedule, or UsageError with the reason that it is rejected."""
        if (reason := self.rejection(schedule)) is not None:
            raise UsageError(f"schedule {schedule.to_json()}: {reason}")
        return schedule
