"""Updates by index under Triton's interpreter: every sketch, update, dtype and axis, repeated positions; compiled for every target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_scatter import DTYPES, numbers, put, scatter
from test_triton_kernels import draws
from test_triton_offline import TARGETS, judge
from torch import nn
from triton_check import SM_90, runner, templates

from graphopt import clear_reports, reports
from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.triton.backend import TritonBackend
from graphopt.backends.triton.build import load_source
from graphopt.backends.triton.offline import compile_offline
from graphopt.ir.interpreter import evaluate
from graphopt.ir.opset.scatter import UPDATES
from graphopt.ir.text import parse_graph
from graphopt.target import Target
from graphopt.testing.kernels import check

SHAPES = ((9,), (6, 37), (37, 6), (3, 8, 21))
OWNED = Schedule.make("scatter", "owned", rows=4, columns=16, block=16, pieces=1, warps=1)
IN_TURN = Schedule.make("scatter", "owned", rows=4, columns=16, block=1, pieces=1, warps=1)
ORDERED = Schedule.make("scatter", "ordered", block=32, warps=1)
ATOMIC = Schedule.make("scatter", "atomic", block=32, warps=1)
SKETCHES = {"owned": OWNED, "in turn": IN_TURN, "ordered": ORDERED}


def agree(text: str, s: Schedule | None, seed: int = 0) -> None:
    graph = parse_graph(text)
    check(graph, runner(graph, "scatter", s), numbers(graph, seed))


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("update", UPDATES)
def test_put(update: str, sketch: str) -> None:
    """No, one and two axes of the index, more positions than rows."""
    cases = [("f32", s, i, a) for s in SHAPES for a in range(len(s)) for i in ((), (4,), (3, 5)) if len(s) < 3 or i == (3, 5)]
    cases += [(d, (6, 37), (9,), a) for d in DTYPES for a in (0, 1) if d != "b1" or update in ("set", "add")]
    for seed, case in enumerate(cases):
        agree(put(*case, update), SKETCHES[sketch], seed)


@pytest.mark.parametrize("sketch", ["owned", "ordered"])
@pytest.mark.parametrize("update", UPDATES)
def test_scatter(update: str, sketch: str) -> None:
    """The index is shorter than the tensor in other axes, and longer or shorter in its own."""
    cases = [
        ("f32", s, tuple(n + 3 if k == a else max(1, n - shorter) for k, n in enumerate(s)), a)
        for s in SHAPES
        for a in range(len(s))
        for shorter in (0, 2)
    ]
    cases += [(d, (6, 20), (5, 18), a) for d in DTYPES for a in (0, 1) if d != "b1" or update in ("set", "add")]
    for seed, case in enumerate(cases):
        agree(scatter(*case, update), SKETCHES[sketch], seed)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("update", [u for u in UPDATES if u != "set"])
def test_pieces_of_the_positions(update: str, block: int) -> None:
    """The last piece is shorter, and one may be empty; of any number of positions, too; a tensor that is the same everywhere."""
    s = Schedule.make("scatter", "owned", rows=4, columns=16, block=block, pieces=4, warps=1)
    for dtype in DTYPES if update == "add" else ("f32", "bf16", "i64", "u8"):
        agree(put(dtype, (6, 37), (41,), 0, update), s)
        agree(scatter(dtype, (6, 37), (5, 43), 1, update), Schedule.make("scatter", "owned", **{**dict(s.knobs), "block": 1}))
    graph = parse_graph(
        "graph @g(%i: i64[M], %s: f32[M, 5]) -> f32[7, 5]\nwhere 1 <= M {\n %c: f32[] = constant() {value = 2.0, dtype = f32}\n"
        f' %x: f32[7, 5] = broadcast_to(%c) {{shape = [7, 5]}}\n %0: f32[7, 5] = put(%x, %i, %s) {{update = "{update}"}}\n return %0\n}}'
    )
    run, r = runner(graph, "scatter", s), torch.Generator().manual_seed(0)
    for m in (2, 16, 17, 70):
        check(graph, run, [torch.randint(0, 7, (m,), generator=r), torch.randn(m, 5, generator=r)], {"M": m}, factor=4.0, slack=2.0)


@pytest.mark.parametrize("update", ["add", "max", "min"])
@pytest.mark.parametrize("dtype", ["i32", "i64"])
def test_integers_in_any_order(dtype: str, update: str) -> None:
    for seed, axis in enumerate((0, 1)):
        agree(put(dtype, (6, 37), (9,), axis, update), ATOMIC, seed)
        agree(scatter(dtype, (6, 37), (5, 40) if axis else (9, 30), axis, update), ATOMIC, seed)


@pytest.mark.parametrize("text", [put("f32", (5, 40), (30,), 0, "add"), scatter("f32", (40, 30), (35, 80), 1, "add"),
                                  put("i64", (50,), (200,), 0, "add"), put("bf16", (30, 21), (7,), 1, "max")])  # fmt: skip
def test_default_and_sampled_schedules(text: str) -> None:
    agree(text, None)
    for s in draws(parse_graph(text), "scatter", 2):
        agree(text, s)


def test_sums_are_in_the_order_of_the_index() -> None:
    """Bit for bit what adding one after another gives."""
    graph = parse_graph(put("f32", (5, 7), (40,), 0, "add"))
    x, i, source = numbers(graph, 0)
    source = torch.randn(40, 7, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(40).remainder(9)[:, None]
    want = x.clone()
    for at, row in zip(i.tolist(), source, strict=True):
        want[at] += row
    for s in SKETCHES.values():
        (got,) = runner(graph, "scatter", s)([x, i, source], None)
        assert torch.equal(got, want)


def test_a_nan_comes_through() -> None:
    for update in ("add", "max", "min"):
        graph = parse_graph(put("f32", (5, 7), (9,), 0, update))
        x, i, source = numbers(graph, 0)
        x[2, 3], source[4, 5] = float("nan"), float("nan")
        for s in SKETCHES.values():
            check(graph, runner(graph, "scatter", s), [x, i, source])


@pytest.mark.parametrize("sketch", SKETCHES)
def test_work_before_the_update(sketch: str) -> None:
    graph = parse_graph(
        'graph @g(%x: bf16[8, 40], %i: i64[5], %s: bf16[5, 40]) -> bf16[8, 40] {\n %0: bf16[8, 40] = neg(%x)\n %1: bf16[5, 40] = exp(%s)\n'
        ' %w: i64[5] = wrap_index(%i) {size = 8}\n %2: bf16[8, 40] = put(%0, %w, %1) {axis = 0, update = "add"}\n return %2\n}'
    )
    inputs = [torch.randn(8, 40).bfloat16(), torch.tensor([3, -5, 0, 7, 3]), torch.randn(5, 40).bfloat16()]
    check(graph, runner(graph, "scatter", SKETCHES[sketch]), inputs, factor=4.0, slack=2.0)


@pytest.mark.parametrize("sketch", [None, *SKETCHES])
def test_symbolic_sizes(sketch: str | None) -> None:
    where = "where 1 <= N, 1 <= M, 1 <= C"
    texts = [
        f"graph @g(%x: f32[N, C], %i: i64[M], %s: f32[M, C]) -> f32[N, C]\n{where} {{\n"
        f' %0: f32[N, C] = put(%x, %i, %s) {{axis = 0, update = "{update}"}}\n return %0\n}}'
        for update in ("set", "add")
    ]
    texts.append(
        f"graph @g(%x: f32[C, N], %i: i64[C, M], %s: f32[C, M]) -> f32[C, N]\n{where} {{\n"
        ' %0: f32[C, N] = scatter(%x, %i, %s) {axis = 1, update = "add"}\n return %0\n}'
    )
    for graph in map(parse_graph, texts):
        run = runner(graph, "scatter", None if sketch is None else SKETCHES[sketch])
        for n, m, c in ((1, 1, 1), (5, 9, 70), (40, 3, 16)):
            bindings = {"N": n, "M": m, "C": c}
            check(graph, run, numbers(graph, n, **bindings), bindings)


@pytest.mark.parametrize("s", [None, *SKETCHES.values()], ids=["default", *SKETCHES])
@pytest.mark.parametrize("update", ["set", "add"])
def test_in_place(update: str, s: Schedule | None) -> None:
    """A region of the kind ``update`` writes the operand's own memory."""
    graph = parse_graph(put("f32", (2, 3, 50, 8), (4,), 2, update))
    w, (template, *_) = templates(graph, "update")
    kernel = load_source(template.emit(w, s or template.space(w, SM_90).default(), SM_90), interpret=True)
    x, i, source = torch.randn(2, 3, 50, 8), torch.tensor([7, 31, 7, 49]), torch.randn(2, 3, 4, 8)
    (expected,) = evaluate(graph, [x, i, source])
    kernel(x, i, source, x)
    assert torch.equal(x, expected)


CACHE = put("bf16", (8, 8, 4096, 128), (1,), 2, "set")
EMBEDDING = (
    "graph @g(%i: i64[16, 512], %s: f32[16, 512, 768]) -> f32[30522, 768] {\n %c: f32[] = constant() {value = 0.0, dtype = f32}\n"
    " %x: f32[30522, 768] = broadcast_to(%c) {shape = [30522, 768]}\n"
    ' %0: f32[30522, 768] = put(%x, %i, %s) {axis = 0, update = "add"}\n return %0\n}'
)
ANY_SIZE = (
    "graph @g(%x: bf16[T, 512], %i: i64[M], %s: bf16[M, 512]) -> bf16[T, 512]\nwhere 1 <= T, 1 <= M {\n"
    ' %0: bf16[T, 512] = put(%x, %i, %s) {axis = 0, update = "add"}\n return %0\n}'
)
LARGE = {
    "cache": ("update", CACHE, "ordered"),
    "copied cache": ("scatter", CACHE, "owned"),
    "embedding": ("scatter", EMBEDDING, "owned"),
    "sums of any size": ("scatter", ANY_SIZE, "owned"),
    "one of each row": ("scatter", scatter("f32", (2048, 32000), (2048, 1), 1, "set"), "owned"),
    "counts": ("scatter", put("i64", (4096,), (1 << 20,), 0, "add"), "atomic"),
    "sums in place": ("update", put("f32", (4096, 256), (3,), 0, "add"), "ordered"),
    "few sums of many": ("scatter", put("f32", (32, 128), (100_000,), 0, "add"), "owned"),
}


@pytest.mark.parametrize("name", LARGE)
def test_defaults(name: str) -> None:
    kind, text, sketch = LARGE[name]
    t = Target.from_name("cuda:sm_90")
    w, (template, *_) = templates(parse_graph(text), kind, t)
    space = template.space(w, t)
    default = space.check(space.default())
    assert default.sketch == sketch
    if sketch == "owned":
        assert default["pieces"] == (32 if name == "few sums of many" else 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LARGE)
def test_machine_code(name: str, target: str) -> None:
    kind, text, _ = LARGE[name]
    judge(parse_graph(text), kind, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LARGE)
def test_machine_code_of_all_sketches(name: str, target: str) -> None:
    kind, text, _ = LARGE[name]
    t = Target.from_name(target)
    w, (template, *_) = templates(parse_graph(text), kind, t)
    for space in template.spaces(w, t):
        c = compile_offline(template.emit(w, space.default(), t), t)
        assert c.spills == 0 and c.shared <= t.shared_memory, space.default()


def test_atomic_operations_are_for_integers_alone() -> None:
    """Sums of floats have an order, and so the same bits each time."""
    cases = ("f32", "add", False), ("i64", "add", True), ("i64", "set", False), ("i32", "max", True), ("u8", "add", False)
    for dtype, update, found in cases:
        w, (template, *_) = templates(parse_graph(put(dtype, (50, 8), (20,), 0, update)), "scatter")
        sketches = [s for space in template.spaces(w, SM_90) for s in space.sketches]
        assert ("atomic" in sketches) is found, (dtype, update)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("graph @g(%x: f32[5, 4], %i: i64[3], %s: f32[3, 4]) -> (f32[5, 4], f32[3, 4]) {\n %1: f32[3, 4] = exp(%s)\n"
         " %0: f32[5, 4] = put(%x, %i, %1)\n return %0, %1\n}", "an output beside the updated tensor"),
        ("graph @g(%x: f32[5, 4], %i: i64[3], %s: f32[3, 4]) -> f32[5, 4] {\n %0: f32[5, 4] = put(%x, %i, %s)\n"
         " %1: f32[5, 4] = put(%0, %i, %s)\n return %1\n}", "not exactly one update by index"),
        ("graph @g(%x: f32[5, 4], %i: i64[0], %s: f32[0, 4]) -> f32[5, 4] {\n %0: f32[5, 4] = put(%x, %i, %s)\n return %0\n}",
         "an update without elements"),
    ],
)  # fmt: skip
def test_what_has_no_template_says_so(text: str, reason: str) -> None:
    w = Workload.of(parse_graph(text), "scatter")
    assert not TritonBackend().templates(w, SM_90)
    assert TritonBackend().reason(w, SM_90) == reason


# --- programs ----------------------------------------------------------------------------------------------------------------

OPTIONS = {"backend": "triton", "target": "cuda:sm_90:4", "strict": True}


def compiled(fn: Callable[..., object]) -> Callable[..., object]:
    torch._dynamo.reset()
    clear_reports()
    return torch.compile(fn, backend="graphopt", options=OPTIONS)


def test_a_cache_is_written_in_place() -> None:
    def step(cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(2, at, k)
        return (cache * 2).sum(2)

    given = torch.randn(1, 3, 64, 40), torch.tensor([5]), torch.randn(1, 3, 1, 40)
    mine, plain = ([x.clone() for x in given] for _ in range(2))
    with torch.no_grad():
        got, want = compiled(step)(*mine), step(*plain)
    torch.testing.assert_close(got, want)
    assert torch.equal(mine[0], plain[0])
    (kernel,) = [k for k in reports()[-1].kernels if k.kind == "update"]
    assert '"sketch": "ordered"' in Path(kernel.path).read_text()


def test_the_gradient_of_an_embedding() -> None:
    torch.manual_seed(0)
    layer, tokens = nn.Embedding(20, 12, padding_idx=3), torch.randint(0, 20, (4, 9))

    def step(tokens: torch.Tensor) -> torch.Tensor:
        return layer(tokens).tanh().sum()

    compiled(step)(tokens).backward()
    got, layer.weight.grad = layer.weight.grad, None
    step(tokens).backward()
    torch.testing.assert_close(got, layer.weight.grad)
    assert any("put(" in r.text_after for r in reports())


def test_as_models_write_them() -> None:
    """Several indices and reductions by index."""

    def fn(x: torch.Tensor, i: torch.Tensor, j: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = x.index_put((i, j), s[:, 0], accumulate=True)
        b = x.scatter_add(1, j[:, None].expand(3, 4), s[:, :4])
        c = x.scatter_reduce(0, i[:, None].expand(3, 5), s[:, :5], "mean", include_self=False)
        return a, b, c, x.index_add(0, i, s, alpha=2)

    given = torch.randn(7, 5), torch.tensor([6, 0, 6]), torch.tensor([4, 1, 1]), torch.randn(3, 5)
    with torch.no_grad():
        for got, want in zip(compiled(fn)(*given), fn(*given), strict=True):
            torch.testing.assert_close(got, want)
