"""Attention: naive PyTorch, scaled_dot_product_attention, Inductor and graphopt's kernel, in turns, beside the machine's limits.

    python benchmarks/attention.py [--cases prefill,models,window,decode,memory] [--lengths 512,2048] [--systems naive,sdpa,graphopt]
                                   [--runs 7] [--json attention.json] [--plot attention.png]

Times are medians in ms of f32 on ``--threads`` threads. ``naive`` is ``softmax(q k^T scale + mask) v`` in eager PyTorch, ``inductor``
the same under torch.compile with freezing, ``compiled`` the same under graphopt's, calls included, ``graphopt`` its kernel alone,
``expanded`` graphopt's two products and softmax, ``int8`` and ``int4`` its kernels for decoding over caches of such integers. What is
compiled makes its mask itself; to the others it is given. ``--prepare`` only builds the kernels, so that a later run is short.
Keys and values of one token lie in large pages and in ordinary ones, and each is held against what can be read from such pages.
``--memory`` measures memory alone, of all ``--systems``: how it grows with ``--lengths``, two heads of 64, causal. At the end the bars
are listed, met or not.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

SYSTEMS = ("naive", "sdpa", "inductor", "expanded", "compiled", "graphopt", "int8", "int4")
BITS = {"graphopt": 32, "int8": 8, "int4": 4}  # of an element of keys and values, for each kernel of graphopt's
GROWTH = (1024, 2048, 4096, 8192)  # tokens at which memory is measured
Call = Callable[[], Any]


@dataclass
class Case:
    """One attention of a batch of 1, ``heads`` over ``shared`` heads of keys; ``large``: keys and values lie in large pages."""

    group: str
    heads: int
    shared: int
    queries: int
    keys: int
    size: int
    causal: bool = False
    window: int | None = None
    large: bool = False
    ms: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        more = (" causal" if self.causal else "") + (f" window {self.window}" if self.window else "")
        more += ", large pages" if self.large else ""
        return f"{self.group}: {self.heads} x {self.queries} x {self.size} over {self.shared} x {self.keys}{more}"

    @property
    def ours(self) -> float | None:
        """Milliseconds of naive code that graphopt has compiled; of its kernel, where that was not measured, or for one token."""
        kernel = self.ms.get("graphopt")
        return kernel if self.group == "decode" else self.ms.get("compiled", kernel)

    @property
    def flops(self) -> float:
        """Of the scores that are seen."""
        from graphopt.ir.opset.attention import seen_pairs

        attrs = {"causal": self.causal, "window": self.window, "offset": self.keys - self.queries}
        return 4.0 * self.heads * self.size * float(seen_pairs(attrs, self.queries, self.keys))

    @property
    def read(self) -> float:
        """Bytes of keys and values."""
        return 8.0 * self.shared * self.keys * self.size


def cases(groups: list[str], lengths: list[int]) -> list[Case]:
    """The cases of some groups; fewer heads where sequences are long."""
    out: list[Case] = []
    if "models" in groups:
        out += [Case("BERT", 12, 12, 128, 128, 64), Case("ViT", 12, 12, 197, 197, 64), Case("GPT-2", 12, 12, 128, 128, 64, True),
                Case("Llama", 12, 4, 128, 128, 64, True), Case("T5", 8, 8, 128, 128, 64)]  # fmt: skip
    if "prefill" in groups:
        for n in lengths:
            for size in (64, 128):
                heads = max(1, (8 if n <= 2048 else 4 if n <= 4096 else 2) * 64 // size)
                out += [Case("prefill", heads, heads, n, n, size, causal) for causal in (False, True)]
    if "window" in groups:
        out += [Case("window", 2, 2, 8192, 8192, 64, True), Case("window", 2, 2, 8192, 8192, 64, True, 512)]
    if "decode" in groups:
        out += [Case("decode", h, g, 1, 8192, size, large=large)
                for large in (True, False) for h, g, size in ((8, 8, 64), (32, 8, 64), (8, 8, 128))]  # fmt: skip
    return out


def kernel_of(case: Case, bits: int = 32) -> Any:
    """graphopt's kernel for a case, from the cache or built now; of fewer bits than 32, over integers with a scale a token."""
    from graphopt.autotune.space import Workload
    from graphopt.backends.tvm.backend import TvmBackend
    from graphopt.backends.tvm.build import KernelBuilder, load_kernel
    from graphopt.ir.text import parse_graph
    from graphopt.target import detect

    result = f"f32[1, {case.heads}, {case.queries}, {case.size}]"
    keys = f"f32[1, {case.shared}, {case.keys}, {case.size}]"
    attrs = f"scale = {case.size**-0.5}" + (f", causal = true, offset = {case.keys - case.queries}" if case.causal else "")
    attrs += f", window = {case.window}" if case.window else ""
    if bits == 32:
        given, made = f"%k: {keys}, %v: {keys}", ""
    else:
        scales, small = f"f32[1, {case.shared}, {case.keys}, 1]", keys.replace("f32", "i8" if bits == 8 else "u8")
        held = small if bits == 8 else f"u8[1, {case.shared}, {case.keys}, {case.size // 2}]"
        given = ", ".join(f"%{x}q: {held}, %{x}s: {scales}" for x in "kv")
        made = " %z: u8[] = constant() {value = 8, dtype = u8}\n" if bits == 4 else ""
        for x in "kv":
            made += f" %{x}i: {small} = unpack_bits(%{x}q) {{bits = 4, axis = 3, dtype = u8}}\n" if bits == 4 else ""
            made += f" %{x}: {keys} = dequantize({f'%{x}i, %{x}s, %z' if bits == 4 else f'%{x}q, %{x}s'})\n"
    graph = parse_graph(f"graph @g(%q: {result}, {given}) -> {result} {{\n{made}"
                        f" %0: {result} = attention(%q, %k, %v) {{{attrs}}}\n return %0\n}}")  # fmt: skip
    w, target = Workload.of(graph, "attention"), detect()
    schedule = TvmBackend().templates(w, target)[0].space(w, target).default()
    folder = Path.home() / ".cache" / "graphopt"
    folder.mkdir(parents=True, exist_ok=True)
    (path,) = KernelBuilder().build_many([(w, schedule)], target, folder)
    return load_kernel(path, w, schedule)  # type: ignore[arg-type]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, rate: float = 0.0) -> torch.Tensor:
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf"))
    w = torch.softmax(s, -1)
    return (F.dropout(w, rate) if rate else w) @ v


def seen(case: Case) -> torch.Tensor:
    """Which keys each query sees."""
    i, j = torch.arange(case.queries)[:, None] + case.keys - case.queries, torch.arange(case.keys)
    return (j <= i) & (j > i - (case.window or case.keys + 1))


def rounded(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys or values as integers of so many bits (of 4, two a byte, 8 standing for zero), the scale of each token, and what they mean."""
    scale = x.abs().amax(-1, keepdim=True) / ((1 << (bits - 1)) - 1)
    q = (x / scale).round().to(torch.int8)
    return (q if bits == 8 else ((q + 8)[..., ::2] | (q + 8)[..., 1::2] << 4).to(torch.uint8)), scale, q * scale


def large(x: torch.Tensor) -> torch.Tensor:
    """A copy in large pages."""
    from graphopt.pages import Pages

    return Pages().empty(x.shape, x.dtype).copy_(x)


def calls(case: Case, systems: list[str], small: bool = False) -> dict[str, Call]:
    """What to time, each seen to give SDPA's result. Keys of decoding are many copies, so that they come from memory.

    With ``small``, results are not compared, and there is no mask but for ``naive``.
    """
    generator = torch.Generator().manual_seed(0)
    copies = max(1, int(2.5e8 / case.read)) if case.group == "decode" else 1
    q = torch.randn(1, case.heads, case.queries, case.size, generator=generator)
    kv = [tuple(torch.randn(1, case.shared, case.keys, case.size, generator=generator) for _ in range(2)) for _ in range(copies)]
    mask = None
    if (case.causal or case.window) and not (small and "naive" not in systems):
        mask = seen(case)
    out = torch.empty_like(q)
    torch._dynamo.reset()  # one function of another size a case: no code for sizes in general, no limit on how often
    plain = case.causal and case.window is None and case.queries == case.keys

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, None if plain else mask, is_causal=plain, enable_gqa=case.heads != case.shared)

    def one(system: str) -> Callable[..., torch.Tensor]:
        if system == "sdpa":
            return sdpa
        if system in BITS:
            kernel = kernel_of(case, BITS[system])

            def run(q: torch.Tensor, *kv: torch.Tensor) -> torch.Tensor:
                kernel(q, *kv, out)
                return out

            return run
        if system == "expanded":
            from graphopt.passes.expand import Expand

            apart = Expand(keep=tuple(n for n in Expand.keep if n != "attention"))
            return torch.compile(sdpa, backend="graphopt", options={"pipeline": {"replace": {"expand": apart}}})  # type: ignore[call-overload, no-any-return]

        if system == "naive":
            return lambda q, k, v: naive(q, k, v, mask)

        def spelled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return naive(q, k, v, seen(case) if case.causal or case.window else None)

        if system == "compiled":
            return torch.compile(spelled, backend="graphopt", dynamic=False)  # type: ignore[no-any-return]
        return torch.compile(spelled, options={"freezing": True}, dynamic=False)  # type: ignore[call-overload, no-any-return]

    found: dict[str, Call] = {}
    want = None if small else sdpa(q, *kv[0])
    for system in systems:
        bits = BITS.get(system, 32)
        if bits != 32 and case.group != "decode":
            continue
        f = one(system)
        if want is None:
            found[system] = lambda f=f: f(q, *kv[0])  # type: ignore[misc]
            continue
        given, wanted = kv, want
        if bits != 32:
            given = [(*rounded(k, bits)[:2], *rounded(v, bits)[:2]) for k, v in kv]
            wanted = sdpa(q, rounded(kv[0][0], bits)[2], rounded(kv[0][1], bits)[2])
        got = f(q, *given[0])
        error = float((got - wanted).abs().max() / wanted.abs().max())
        if case.large:
            given = [tuple(large(x) for x in pair) for pair in given]
        if not error < 1e-4:
            raise SystemExit(f"{case.name}: {system} differs from SDPA by {error}")
        found[system] = lambda f=f, given=given: [f(q, *pair) for pair in given]  # type: ignore[misc]
    if case.group == "decode":
        case.ms["copies"] = copies
    return found


def measure(case: Case, systems: list[str], runs: int) -> None:
    """Medians of runs in turns; a short turn begins with a run that is not timed."""
    ready = calls(case, systems)
    times: dict[str, list[float]] = {s: [] for s in ready}
    copies = case.ms.pop("copies", 1.0)
    for _ in range(runs + 1):
        for system, call in ready.items():
            if times[system] and times[system][-1] < 0.02:
                call()  # after another system's turn, whose threads and caches it finds
            start = time.perf_counter()
            call()
            times[system].append(time.perf_counter() - start)
    case.ms = {s: 1e3 * statistics.median(t[1:]) / copies for s, t in times.items()}


def memory(lengths: Sequence[int], systems: list[str]) -> tuple[Table, dict[str, float]]:
    """The most memory that queries, keys, values, the result and whatever a system takes besides were resident in, and its growth:
    the exponent of the length, by system."""
    from graphopt.bench.memory import peak, reset_peak, settle

    table = Table("tokens", *systems, title="attention, causal, 2 heads of 64: MB at most")
    found: dict[str, list[float]] = {s: [] for s in systems}
    for n in lengths:
        case = Case("memory", 2, 2, n, n, 64, True)
        for system in systems:
            call = calls(case, [system], small=True)[system]  # whatever is built or loaded once is there
            del call
            before = settle()
            reset_peak()
            call = calls(case, [system], small=True)[system]
            call()
            found[system].append((peak() - before) / 1e6)
            del call
        table.add_row(str(n), *(f"{found[s][-1]:.1f}" for s in systems))
    logs = [math.log(n) for n in lengths]
    slopes = [statistics.linear_regression(logs, [math.log(x) for x in found[s]]).slope for s in systems]
    table.add_row("exponent", *(f"{x:.2f}" for x in slopes))
    return table, dict(zip(systems, slopes, strict=True))


def bars(found: list[Case], exponent: float | None, limits: Callable[[Case], Any]) -> list[tuple[str, float, bool]]:
    """What was aimed at: in words, the figure of the worst case, and whether it is met. Nothing of what was not measured."""

    def least(what: str, bar: float, figures: Iterable[float]) -> list[tuple[str, float, bool]]:
        got = list(figures)
        return [(f"{what}: at least {bar}", min(got), min(got) >= bar)] if got else []

    def over(system: str, some: Iterable[Case]) -> list[float]:
        return [c.ms[system] / c.ours for c in some if system in c.ms and c.ours]

    square = [c for c in found if c.group == "prefill"]
    local = {c.window: c.ours for c in found if c.group == "window" and c.ours}
    one = [c for c in found if c.group == "decode" and "graphopt" in c.ms]
    out = least("eager's time over ours, 2,048 tokens and more", 2.0, over("naive", [c for c in square if c.keys >= 2048]))
    out += least("SDPA's time over ours, everywhere", 1.0, over("sdpa", found))
    out += least("SDPA's time over ours, causal", 1.5, over("sdpa", [c for c in square if c.causal]))
    out += least("full causal time over that of a window of 512", 4.0, [local[None] / local[512]] if {None, 512} <= local.keys() else [])
    for pages in (True, False):
        shares = [1e3 * c.read / limits(c).bytes / c.ms["graphopt"] for c in one if c.large is pages]
        what = f"share of read bandwidth over keys and values, one token, {'large' if pages else 'ordinary'} pages"
        out += least(what, 0.85, shares)
    out += least("speed over 8-bit keys and values beside f32", 2.5, [c.ms["graphopt"] / c.ms["int8"] for c in one if "int8" in c.ms])
    if exponent is not None:
        out.append(("exponent of memory by length: below 1.15", exponent, exponent < 1.15))
    return out


def show(found: list[Case], systems: list[str], limits: Callable[[Case], Any]) -> Table:
    table = Table("case", *systems, "of SDPA", "of the limit", title="attention, f32, ms")
    for c in found:
        mine = c.ours or float("nan")
        least = 1e3 * limits(c).least_seconds(c.flops, c.read)
        ratio = f"{c.ms['sdpa'] / mine:.2f}x" if "sdpa" in c.ms and c.ours else ""
        table.add_row(c.name, *(f"{c.ms[s]:.2f}" if s in c.ms else "" for s in systems), ratio, f"{least / mine:.0%}")
    return table


def plot(found: list[Case], file: Path) -> None:
    """Times as shares of SDPA's, a group of bars a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.45 * len(found)))
    systems = [s for s in SYSTEMS if any(s in c.ms for c in found)]
    for n, system in enumerate(systems):
        places = [k + (n - len(systems) / 2) * 0.8 / len(systems) for k, c in enumerate(found) if system in c.ms]
        axes.barh(places, [c.ms["sdpa"] / c.ms[system] for c in found if system in c.ms], 0.8 / len(systems), label=system)
    axes.axvline(1.0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(found)), [c.name for c in found], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("speed, SDPA = 1")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="models,prefill,window,decode,memory")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    parser.add_argument("--systems", default=",".join(s for s in SYSTEMS if s != "expanded"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    systems, groups, lengths = given.systems.split(","), given.cases.split(","), [int(n) for n in given.lengths.split(",")]
    found, exponent = cases(groups, lengths), None
    if unknown := [s for s in systems if s not in SYSTEMS]:
        sys.exit(f"unknown: {', '.join(unknown)}; systems are {', '.join(SYSTEMS)}")
    if given.prepare:
        for case in found:
            for system in systems:
                if system == "graphopt" or (system in BITS and case.group == "decode"):
                    kernel_of(case, BITS[system])
        return
    if given.memory:
        torch.set_num_threads(given.threads)
        with torch.no_grad():
            Console(width=160).print(memory(lengths, systems)[0])
        return
    from graphopt.bench.limits import LimitMeter

    torch.set_num_threads(given.threads)
    meter = LimitMeter(given.threads)
    measured = {pages: meter.measure(large=pages) for pages in (True, False)}
    with torch.no_grad():
        if "memory" in groups and "graphopt" in systems:
            table, slopes = memory(GROWTH, ["graphopt"])
            exponent = slopes["graphopt"]
            Console(width=160).print(table)
        for case in found:
            measure(case, systems, given.runs)
    measured = {pages: before.best(meter.measure(large=pages)) for pages, before in measured.items()}

    def limits(case: Case) -> Any:
        return measured[case.large]

    Console(width=160).print(show(found, systems, limits))
    flops, (wide, small) = max(m.flops for m in measured.values()), (measured[pages].bytes / 1e9 for pages in (True, False))
    print(f"{flops / 1e9:.0f} GFLOP/s, {wide:.1f} GB/s read from large pages, {small:.1f} from ordinary ones, torch {torch.__version__}, "
          f"{given.threads} threads")  # fmt: skip
    judged = bars(found, exponent, limits)
    for what, figure, is_met in judged:
        print(f"{what}: {figure:.2f}: {'met' if is_met else 'not met'}")
    if given.json:
        held = [{"bar": what, "figure": figure, "met": is_met} for what, figure, is_met in judged]
        known = {"large pages" if pages else "ordinary pages": asdict(m) for pages, m in measured.items()}
        whole = {"limits": known, "cases": [asdict(c) for c in found], "bars": held}
        given.json.write_text(json.dumps(whole, indent=1))
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
