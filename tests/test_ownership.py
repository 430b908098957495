"""Weights that the compiled model owns: in memory once, errors that say what happened, the same results."""

from __future__ import annotations

import copy
import gc
import linecache
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.backends.eager import LibraryCall
from graphopt.errors import UsageError
from graphopt.ir import parse_graph
from graphopt.lower import lower
from graphopt.ownership import OwnershipError, give_back_memory
from graphopt.program import Program
from graphopt.target import Target

CPU = torch.device("cpu")

GRAPH = """graph @g(%x: f32[3, 8], weight %a: f32[4, 8], weight %b: f32[4], weight %c: f32[4, 8], weight %d: f32[4, 4]) -> f32[3, 4] {
  %0: f32[8, 4] = transpose(%a) {perm = [1, 0]}
  %1: f32[8, 4] = exp(%0)
  %2: f32[3, 4] = matmul(%x, %1)
  %3: f32[8, 4] = transpose(%c) {perm = [1, 0]}
  %4: f32[3, 4] = matmul(%x, %3)
  %5: f32[4, 4] = exp(%d)
  %6: f32[3, 4] = matmul(%4, %5)
  %7: f32[3, 4] = matmul(%6, %d)
  %8: f32[3, 4] = add(%7, %2)
  %9: f32[3, 4] = add(%8, %b)
  return %9
}"""


def test_a_weight_is_released_as_soon_as_it_is_staged() -> None:
    """%a is only staged; %b is read by the program; %c is staged as a view of itself; %d is both staged and read."""
    graph = parse_graph(GRAPH)
    lowered = lower(graph, Target("cpu", "x86_64"), None, "the test asks for it", asked=True)
    program = Program(lowered, [], lambda node: LibraryCall(node, CPU), CPU)
    x, a, b, c, d = inputs = [torch.randn(v.shape) for v in graph.inputs]  # type: ignore[arg-type]
    expected = program(inputs)[0]
    gone = []
    kept = program.weights.own([inputs[i] for i in program.weights.positions], gone.append)
    assert gone == [1] and 1 not in kept and 3 not in kept and kept[4].data_ptr() == d.data_ptr()
    assert torch.equal(program([x, torch.empty(0), b, torch.empty(0), d])[0], expected)
    assert program.weights.owned_bytes == 4 * (a.numel() + c.numel() + d.numel())


def test_early_release_frees_memory_before_the_next_weight_is_staged() -> None:
    graph = parse_graph("""graph @g(%x: f32[3, 8], weight %a: f32[8, 8], weight %b: f32[8, 8]) -> f32[3, 8] {
      %0: f32[8, 8] = exp(%a)
      %1: f32[3, 8] = matmul(%x, %0)
      %2: f32[8, 8] = exp(%b)
      %3: f32[3, 8] = matmul(%1, %2)
      return %3
    }""")
    lowered = lower(graph, Target("cpu", "x86_64"), None, "the test asks for it", asked=True)
    program = Program(lowered, [], lambda node: LibraryCall(node, CPU), CPU)
    weights = [torch.randn(8, 8), torch.randn(8, 8)]
    first, second = weakref.ref(weights[0]), weakref.ref(weights[1])
    alive: list[tuple[int, bool, bool]] = []
    program.weights.own(weights, lambda i: alive.append((i, first() is not None, second() is not None)))
    assert alive == [(1, False, True), (2, False, False)] and not weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.two.weight = self.one.weight
        self.norm = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.two(torch.relu(self.one(x))))


@pytest.fixture(scope="module")
def owned() -> tuple[nn.Module, graphopt.CompiledModel, torch.Tensor, torch.Tensor]:
    pytest.importorskip("tvm_ffi")
    model, x = Tied().eval(), torch.randn(32, 64)
    expected = graphopt.compile(model, (x,))(x)
    return model, graphopt.compile(model, (x,), own_weights=True), x, expected


def test_owned_weights_give_the_same_bits(owned: Any) -> None:
    model, compiled, x, expected = owned
    assert torch.equal(compiled(x), expected)
    assert compiled.given_up and "owns" in repr(compiled)
    assert model.one.weight is model.two.weight and model.one.weight.shape == (64, 64)
    assert "given" in type(model.one.weight).__name__.lower() and model.one.bias.shape == (64,)
    names = [n for n, _ in model.named_parameters()]
    assert names == [n for n, _ in Tied().named_parameters()]
    del model
    gc.collect()
    assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: m(x), lambda m, x: m.state_dict(), lambda m, x: copy.deepcopy(m), lambda m, x: pickle.dumps(m),
        lambda m, x: m.double(), lambda m, x: m.one.weight + 1,
        lambda m, x: m.one.weight.data, lambda m, x: m.one.weight.numpy(), lambda m, x: m.one.weight[0],
    ],
)  # fmt: skip
def test_what_was_given_up_says_so(owned: Any, use: Callable[[nn.Module, torch.Tensor], object]) -> None:
    model, _, x, _ = owned
    with pytest.raises(OwnershipError, match=r"weight was given up to the compiled Tied.*own_weights"):
        use(model, x)
    assert "given up" not in repr(model.one.weight) and "owned by the compiled Tied" in repr(model.one.weight)


def test_loading_into_what_was_given_up_says_so() -> None:
    model = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48))})
    inner, x = model["inner"].eval(), torch.randn(8, 64)
    state, before = {k: v.clone() for k, v in inner.state_dict().items()}, inner(x)
    compiled = graphopt.compile(inner, (x,), own_weights=True)
    for kwargs in ({}, {"strict": False}):
        with pytest.raises(OwnershipError, match=r"0\.weight.*assign=True"):
            inner.load_state_dict(state, **kwargs)
    with pytest.raises(OwnershipError, match=r"2\.weight"):
        inner[2].load_state_dict({"weight": state["2.weight"]}, strict=False)
    with pytest.raises(OwnershipError, match=r"0\.weight"):
        model.load_state_dict({f"inner.{k}": v for k, v in state.items()})
    inner.load_state_dict({"0.bias": state["0.bias"]}, strict=False)  # it stayed
    inner.load_state_dict(state, assign=True)
    torch.testing.assert_close(inner(x), before)
    torch.testing.assert_close(compiled(x), before)


def test_the_memory_of_a_packed_weight_is_freed(owned: Any) -> None:
    model, x = Tied().eval(), torch.randn(32, 64)
    weight = weakref.ref(model.one.weight)
    compiled = graphopt.compile(model, (x,), own_weights=True)
    assert weight() is None
    memory = compiled.report.memory
    assert memory["weights"] == 4 * 64 * 4 and memory["staged"] is not None and memory["staged"] >= 64 * 64 * 4


def test_a_tied_embedding_is_in_memory_once() -> None:
    pytest.importorskip("tvm_ffi")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=301, n_positions=64, n_embd=64, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 301, (1, 16))
    with torch.no_grad():
        want = graphopt.compile(model, (ids,))(ids).logits
        weight = weakref.ref(model.lm_head.weight)
        compiled = graphopt.compile(model, (ids,), own_weights=True, strict=True)
        assert weight() is None and "lm_head.weight" in compiled.given_up
        assert torch.equal(compiled(ids).logits, want)


def test_refresh_and_options(owned: Any) -> None:
    _, compiled, x, _ = owned
    with pytest.raises(OwnershipError, match="cannot be packed again"):
        compiled.refresh()
    with pytest.raises(UsageError, match="freeze"):
        graphopt.compile(Tied(), (x,), own_weights=True, freeze=False)
    with pytest.raises(Exception, match=r"needs graphopt\.compile"):
        torch.compile(Tied(), backend="graphopt", options={"own_weights": True})(x)


def test_state_that_a_model_updates_stays_its_own() -> None:
    pytest.importorskip("tvm_ffi")

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return self.fc(x) + self.calls

    model, x = Counting().eval(), torch.randn(4, 64)
    with torch.no_grad():
        want = [model(x), model(x)]
        model.calls.zero_()
        compiled = graphopt.compile(model, (x,), own_weights=True)
        for y in want:
            torch.testing.assert_close(compiled(x), y)
    assert model.calls == 2


def test_another_type_of_a_weight_that_stayed_does_not_reach_the_kernels() -> None:
    pytest.importorskip("tvm_ffi")
    model, x = nn.Sequential(nn.Embedding(50, 32), nn.LayerNorm(32)).eval(), torch.arange(7)
    with torch.no_grad():
        want = model(x)
        compiled = graphopt.compile(model, (x,), own_weights=True)
        model.half()  # kernels would read beyond its memory
        torch.testing.assert_close(compiled(x), want)


def test_a_compiled_model_describes_itself_and_is_not_copied() -> None:
    compiled = graphopt.compile(nn.Linear(4, 4), (torch.randn(2, 4),), backend="eager")
    assert repr(compiled).startswith("CompiledModel(Linear for ") and "library calls" in repr(compiled)
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(UsageError, match="cannot be"):
            copying(compiled)  # type: ignore[operator]


def test_lines_of_files_are_let_go_and_those_without_a_file_stay(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text("a = 1\n")
    assert linecache.getline(str(file), 1) == "a = 1\n"
    cell = "<cell 1>"
    linecache.cache[cell] = (6, None, ["b = 2\n"], cell)
    try:
        give_back_memory()
        assert str(file) not in linecache.cache and linecache.getline(cell, 1) == "b = 2\n"
        assert linecache.getline(str(file), 1) == "a = 1\n"
    finally:
        linecache.cache.pop(cell)
