"""fuse v into its reader  iff  time(reader with v inside) <= time(reader) + time(v alone) + launch

Why: a value inside of a kernel is neither written nor read back, and costs no launch; but where the reader asks for an element
several times (below a broadcast, through several index maps, for each tile of a product), it is computed each time. Which is
less depends on the sizes and on the machine, so it is computed, not ruled.

When: asked by the passes of fusion, and by those of layout, wherever work could be done twice, or by fewer cores.

Model. A kernel takes as long as the slower of its arithmetic and its traffic (the roofline)::

    time(kernel) = max(sum of evaluations * instructions / (lanes * pipes * cores), sum of bytes / rate)

- *evaluations*: how often an element's formula is run, all index maps together; at least once an element.
- *instructions*: vector instructions of an op's formula (``INSTRUCTIONS``); functions of f64 run an element at a time.
- *bytes*: what crosses the kernel's border, each value once. *rate* is that of the nearest cache that keeps the value
  between two kernels (half of the second level, and of the third), or of memory: see :attr:`Target.memory_rate`.
- *launch*: a call, and waking and waiting for the other cores.

Everything is in cycles of the whole machine; ``CLOCK`` makes seconds of them, for remarks only. All of it follows from the target:
nothing is measured when a model is compiled, so the same model and target give the same program.

The price of each value that was let in is remembered, and the next one pays only if what was spent before is covered too, so a
chain of cheap steps is cut where together they cost as much as a cut: at most twice the best choice, as for a skier who rents
until the rent has paid for skis. Symbolic sizes are looked at where all are least and where all are largest (``LARGE`` where
there is no bound), and the choice is the one that is less wrong at its worse end.

Numerics: none, only choices.
Reference: Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009; Karlin et al., "Competitive snoopy caching",
Algorithmica 3, 1988 (rent or buy).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graphopt.ir import dims, types
from graphopt.ir.dims import Dim, Range
from graphopt.ir.graph import Node, Value
from graphopt.ir.ops import Trait
from graphopt.ir.opset.window import WINDOWS
from graphopt.ir.work import bytes_moved, flops
from graphopt.target import Target

LAUNCH = 8_000  # cycles: 0.7 us for the call, the rest for waking and joining a pool (an estimate)
CLOCK = 3.5e9  # cycles a second, about, in remarks
LARGE = 4096  # a symbolic size without a bound

# Vector instructions an element; pointwise ops that are not named take one. Those computed in f64 take two vectors an operand.
INSTRUCTIONS: Mapping[str, int] = {
    "div": 8, "reciprocal": 8, "sqrt": 8, "rsqrt": 16, "exp": 16, "exp2": 16, "expm1": 18, "elu": 20, "log": 20,
    "log2": 22, "log10": 24, "log1p": 34, "sigmoid": 26, "silu": 26, "tanh": 30, "erf": 30, "gelu": 36, "softplus": 60, "mish": 100,
    "sin": 120, "cos": 120, "tan": 140, "asin": 50, "acos": 55, "atan": 65, "atan2": 80, "sinh": 50, "cosh": 50,
    "asinh": 85, "acosh": 75, "atanh": 90, "erfc": 95, "pow": 140, "hardsigmoid": 10, "hardswish": 10,
    "fmod": 70, "remainder": 75, "floor_div": 85, "trunc_div": 8, "isnan": 1,
    "take": 8, "gather": 8, "concat": 2, "pad": 2, "quantize": 8, "dequantize": 3,
}  # fmt: skip
# Functions that f64 has from the C library alone: they are called for one element after the other.
CALLED_IN_F64 = frozenset((
    "exp", "exp2", "expm1", "elu", "log", "log2", "log10", "log1p", "sigmoid", "silu", "tanh", "erf", "gelu", "softplus", "mish",
    "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "asinh", "acosh", "atanh", "erfc", "pow",
    "fmod", "remainder", "floor_div",
))  # fmt: skip
CALL = 40  # instructions of such a call

ANY = Target("cpu", "any", cores=2)  # where a pass runs without a target


@dataclass(frozen=True)
class Price:
    """What it takes to do a node's work within its reader, and what that saves: cycles where sizes are least and largest."""

    costs: tuple[float, float]
    saves: tuple[float, float]

    @property
    def pays(self) -> bool:
        """Whether fusing is the less wrong choice at its worse end."""
        lost = [c - s for c, s in zip(self.costs, self.saves, strict=True)]
        return max(lost) <= max(-x for x in lost)

    @property
    def text(self) -> str:
        """In words, of the end that speaks louder."""
        costs, saves = max(zip(self.costs, self.saves, strict=True), key=lambda p: abs(p[0] - p[1]))
        return f"costs {_seconds(costs)}, saves {_seconds(saves)}"


@dataclass(frozen=True)
class Load:
    """A kernel's cycles of arithmetic and of traffic, where sizes are least and largest."""

    work: tuple[float, float] = (0.0, 0.0)
    traffic: tuple[float, float] = (0.0, 0.0)

    def __add__(self, other: Load) -> Load:
        return Load(_sum(self.work, other.work), _sum(self.traffic, other.traffic))

    def __sub__(self, other: Load) -> Load:
        return self + Load(_scaled(other.work, -1), _scaled(other.traffic, -1))

    @property
    def time(self) -> tuple[float, float]:
        low, high = (max(w, t) for w, t in zip(self.work, self.traffic, strict=True))
        return low, high


class CostModel:
    """Cycles of work and of traffic on a target, for a graph's sizes.

    Args:
        target: None for a common machine of two cores.
        symbols: ranges of the symbolic sizes.
    """

    def __init__(self, target: Target | None, symbols: Mapping[str, Range]) -> None:
        self.for_cpu = target is None or target.kind == "cpu"
        self.target = target if target is not None and self.for_cpu else ANY
        self._ends = [{n: r.lo for n, r in symbols.items()}, {n: _largest(r) for n, r in symbols.items()}]
        self._known: dict[Dim, tuple[float, float]] = {}

    # --- amounts --------------------------------------------------------------------------------------------------------

    def amount(self, d: Dim) -> tuple[float, float]:
        """A size, where all symbols are least and where they are largest."""
        if isinstance(d, int):
            return d, d
        if d not in self._known:
            low, high = (float(dims.evaluate(d, ends)) for ends in self._ends)
            self._known[d] = (low, high)
        return self._known[d]

    def larger(self, a: Dim, b: Dim) -> Dim:
        return a if self.amount(a)[1] >= self.amount(b)[1] else b

    def work(self, node: Node, evaluations: Dim | None = None, lanes: int | None = None) -> Load:
        """Arithmetic of a node.

        Args:
            evaluations: how often its formula is run; once an element unless given.
            lanes: elements that are computed side by side; as many as vectors hold unless given.
        """
        size = max((r.dtype.itemsize for r in node.results), default=4)
        wide = lanes or self.target.lanes(max(4, size))
        count = self.amount(_own(node) if evaluations is None else evaluations)
        called = node.op.name in CALLED_IN_F64 and node.results[0].dtype == types.f64
        steps = CALL if called else instructions(node) / wide
        products = _scaled(self.amount(flops(node)), 1 / (self.target.flops_per_cycle * self.target.cores))
        return Load(_sum(_scaled(count, steps / (self.target.pipes * self.target.cores)), products))

    def traffic(self, values: Iterable[Value]) -> Load:
        """Reading or writing values once."""
        total = (0.0, 0.0)
        for v in values:
            total = _sum(total, self.moved(v.type.nbytes()))
        return Load(traffic=total)

    def moved(self, nbytes: Dim) -> tuple[float, float]:
        """Cycles of reading or writing so many bytes once."""
        low, high = (n / (self._rate(n) * self.target.cores) for n in self.amount(nbytes))
        return low, high

    def _rate(self, nbytes: float) -> float:
        """Bytes a cycle and core of something that was written or read by the kernel before."""
        t = self.target
        if nbytes <= t.cache[1] * t.cores / 2:
            return 8 * t.memory_rate
        return 2 * t.memory_rate if nbytes <= t.cache[2] / 2 else t.memory_rate

    # --- how often an element is computed ---------------------------------------------------------------------------------

    def reads(self, user: Node, index: int, count: Dim) -> Dim:
        """Elements of operand ``index`` that a user reads to compute ``count`` of its own, repetitions included."""
        x, name = user.operands[index], user.op.name
        if name in ("matmul", "conv"):
            return dims.mul(x.type.numel, self.tiles(user, index))
        if name in WINDOWS:
            return dims.numel([user.result.type.numel, *user.attrs.get("kernel", ())])
        if name == "put" and index == 1:  # once for each stretch that the index selects
            return user.operands[2].type.numel
        if user.op.has(Trait.POINTWISE) or name in ("take", "gather", "broadcast_to"):
            return count
        if user.op.has(Trait.VIEW):
            return count
        return x.type.numel if dims.same(count, user.results[0].type.numel) else count

    def tiles(self, product: Node, index: int) -> Dim:
        """How often a product's kernel goes through a factor: once for each tile along the other one."""
        rows, vectors = self.target.tile
        columns = vectors * self.target.lanes(4)
        if product.op.name == "conv":
            return -(-int(product.result.shape[-1]) // columns) if index == 0 else 1
        size, step = (product.result.shape[-1], columns) if index == 0 else (product.result.shape[-2], rows)
        return -(-size // step) if isinstance(size, int) else dims.floordiv(dims.add(size, step - 1), step)

    # --- decisions -----------------------------------------------------------------------------------------------------

    def alone(self, node: Node) -> Load:
        """A node as a kernel of its own."""
        return self.work(node) + self.traffic((*_read(node), *node.results))

    def join(self, reader: Load, node: Node, evaluations: Dim, spent: tuple[float, float], lanes: int | None = None) -> tuple[Price, Load]:
        """Computing a node within its reader.

        Args:
            reader: the reader's kernel, that reads the node's result.
            spent: what was paid for earlier members of the same region.

        Returns:
            The price, with what was spent before; and the reader's load with the node in it.
        """
        inside = reader - self.traffic(node.results) + self.traffic(_read(node)) + self.work(node, evaluations, lanes)
        more = _sum(inside.time, _scaled(reader.time, -1))
        costs = _sum(spent, _least(more, 0.0))
        return Price(costs, _sum(self.alone(node).time, (LAUNCH, LAUNCH))), inside

    def one_after_another(self, reader: Load, node: Node, rows: Dim) -> Price:
        """A reduction over few rows together with what reads it: rows are spread over the cores, one row is not."""
        both = reader + self.work(node) + self.traffic(_read(node))
        cores = self.target.cores
        low, high = (t * cores / max(1.0, min(cores, r)) for t, r in zip(both.time, self.amount(rows), strict=True))
        apart = _sum(reader.time, self.alone(node).time)
        return Price(_sum((low, high), _scaled(apart, -1)), (LAUNCH, LAUNCH))

    def is_bound_by_memory(self, product: Node) -> bool:
        """Whether a product waits for its factors rather than for its arithmetic: flops a byte below the machine's balance."""
        (few, many), moved = self.amount(flops(product)), self.amount(bytes_moved(product))
        return few < self.target.balance * moved[0] and many < self.target.balance * moved[1]

    def prepares_rows(self, product: Node) -> bool:
        """Whether a product's kernel first rewrites its left factor, so that two products of one factor do it twice: f32 as thirds."""
        depth = product.operands[0].shape[-1]
        return self.target.f32_thirds and product.operands[0].dtype == types.f32 and isinstance(depth, int) and depth % 32 == 0

    def is_less(self, a: Iterable[Value], b: Iterable[Value]) -> bool:
        """Whether values are fewer bytes than others, where sizes are largest."""
        first, second = (sum(self.amount(v.type.nbytes())[1] for v in values) for values in (a, b))
        return first < second


def instructions(node: Node) -> int:
    """Vector instructions for an element of a node's result."""
    if node.op.has(Trait.VIEW, Trait.CREATION):
        return 0
    if node.op.name in ("fmod", "remainder", "floor_div") and not node.results[0].dtype.is_float:
        return INSTRUCTIONS["div"]
    return INSTRUCTIONS.get(node.op.name, 1)


def is_long(node: Node) -> bool:
    """Whether a function takes so long that its results are worth a table, as the cosines of positions are."""
    return instructions(node) >= CALL


def describe(node: Node, evaluations: Dim, price: Price) -> str:
    """Why a node is not computed in its reader: how often it would be, and what that costs."""
    times = "again and again"
    own = node.results[0].type.numel
    if isinstance(evaluations, int) and isinstance(own, int) and own:
        n = evaluations / own
        times = f"{n:.0f}x" if n >= 10 or n == int(n) else f"{n:.1f}x"
    return f"it would recompute {node.op.name} {times} over {size_text(node.results[0].type.nbytes())}, {price.text}"


def size_text(n: Dim) -> str:
    """A number of bytes, readably."""
    if not isinstance(n, int):
        return f"{dims.format_dim(n)} bytes"
    for unit, step in (("MB", 1 << 20), ("KB", 1 << 10)):
        if n >= step:
            return f"{n / step:.1f} {unit}"
    return f"{n} bytes"


def _own(node: Node) -> Dim:
    """Evaluations of a node as a kernel of its own: an element of the result, or one that is reduced."""
    return node.results[0].type.numel if node.op.has(Trait.POINTWISE) or not node.operands else node.operands[0].type.numel


def _read(node: Node) -> list[Value]:
    """What a node reads from memory; constants are part of its code."""
    return [v for v in dict.fromkeys(node.operands) if v.producer is None or not v.producer.op.has(Trait.CREATION)]


def _largest(r: Range) -> int:
    return r.hi if r.hi is not None else max(r.lo, LARGE)


def _sum(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] + b[0], a[1] + b[1]


def _scaled(a: tuple[float, float], by: float) -> tuple[float, float]:
    return a[0] * by, a[1] * by


def _least(a: tuple[float, float], floor: float) -> tuple[float, float]:
    return max(a[0], floor), max(a[1], floor)


def _seconds(cycles: float) -> str:
    s = cycles / CLOCK
    return f"{s * 1e3:.2g} ms" if abs(s) >= 1e-4 else f"{s * 1e6:.2g} us"
