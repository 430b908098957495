"""The program: lowered steps give the interpreter's results, with planned memory, from several threads, in eager's strides."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from graphopt.backends.eager import LibraryCall
from graphopt.guards import InputError, InputGuard, alike
from graphopt.ir import Graph, evaluate, parse_graph
from graphopt.lower import lower
from graphopt.memory import Lifetime, plan
from graphopt.program import Arenas, Program, _Arena
from graphopt.program_writer import check_index
from graphopt.tape import Tapes
from graphopt.target import Target

CPU = torch.device("cpu")


def library_program(graph: Graph) -> Program:
    lowered = lower(graph, Target("cpu", "x86_64"), None, "the test asks for it", asked=True)
    return Program(lowered, [], lambda node: LibraryCall(node, CPU), CPU)


def check(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    program = library_program(graph)
    got = program(inputs)
    for mine, reference, strides in zip(got, evaluate(graph, inputs), graph.output_strides, strict=True):
        torch.testing.assert_close(mine, reference)
        if strides is not None:
            assert mine.stride() == tuple(strides)
    return got


MLP = """graph @mlp(%x: f32[B, 8], weight %w: f32[4, 8], weight %b: f32[4]) -> (f32[B, 4], f32[4, B; 1, 4])
where 0 <= B {
  %0: f32[8, 4] = transpose(%w) {perm = [1, 0]}
  %1: f32[8, 4] = exp(%0)
  %2: f32[B, 4] = matmul(%x, %1)
  %3: f32[B, 4] = add(%2, %b)
  %4: f32[4, B] = transpose(%3) {perm = [1, 0]}
  return %3, %4
}"""


@pytest.mark.parametrize("size", [0, 1, 5])
def test_symbolic_sizes_and_strided_outputs(size: int) -> None:
    check(parse_graph(MLP), [torch.randn(size, 8), torch.randn(4, 8), torch.randn(4)])


def test_staged_values_follow_their_weights() -> None:
    graph = parse_graph(MLP)
    program = library_program(graph)
    x, w, b = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    program([x, w, b])
    program([x, w, b])
    assert program.staged is not None and program.staged.computed == 1
    changes = [lambda: w.mul_(2), lambda: b.add_(1), lambda: setattr(w, "data", torch.randn(4, 8))]
    for change in changes:
        change()
        torch.testing.assert_close(program([x, w, b])[0], evaluate(graph, [x, w, b])[0])
    assert program.staged.computed == 3  # b is no part of a staged value
    before = w._version
    w.data.mul_(2)  # leaves the version counter alone
    assert w._version == before
    torch.testing.assert_close(program([x, w, b])[0], evaluate(graph, [x, w, b])[0])
    assert program.staged.computed == 4
    other = torch.randn(4, 8)
    torch.testing.assert_close(program([x, other, b])[0], evaluate(graph, [x, other, b])[0])
    program([x, w, b])
    assert program.staged.computed == 5  # going back to a known set of weights computes nothing


def test_stale_staged_values_are_freed_at_once() -> None:
    graph = parse_graph(MLP)
    program = library_program(graph)
    x, w, b = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    program([x, w, b])
    staged = weakref.ref(program.weights([x, w, b])[0][0])
    gc.disable()
    try:
        w.mul_(2)
        program([x, w, b])
        assert staged() is None
    finally:
        gc.enable()


def test_an_arena_stays_with_its_stream() -> None:
    """Kernels may still work on it when the call has returned."""
    stream = ["first"]
    arenas, alone = Arenas(lambda: stream[0]), Arenas()
    arena = _Arena([], Tapes([]))
    for pool in (arenas, alone):
        pool.free().append(arena)
    stream[0] = "second"
    assert not arenas.free() and alone.free() == [arena]
    stream[0] = "first"
    assert arenas.free() == [arena]


def test_inference_tensors_are_never_cached() -> None:
    graph = parse_graph(MLP)
    with torch.inference_mode():
        x, w, b = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
        program = library_program(graph)
        program([x, w, b])
        w.mul_(3)
        torch.testing.assert_close(program([x, w, b])[0], evaluate(graph, [x, w, b])[0])


def test_outputs_have_memory_of_their_own() -> None:
    graph = parse_graph("""graph @g(%x: f32[4], weight %w: f32[4]) -> (f32[4], f32[4], f32[4], f32[2, 2]) {
      %0: f32[4] = exp(%w)
      %1: f32[4] = mul(%x, %0)
      %2: f32[2, 2] = reshape(%1) {shape = [2, 2]}
      return %x, %0, %1, %2
    }""")
    x, w = torch.randn(4), torch.randn(4)
    program = library_program(graph)
    first = program([x, w])
    pointers = [t.data_ptr() for t in first]
    assert len(set(pointers)) == 4 and x.data_ptr() not in pointers
    for t in first:
        t.fill_(7.0)
    torch.testing.assert_close(program([x, w])[1], w.exp())


@pytest.mark.parametrize("perm", [[0, 1], [1, 0]])
def test_a_reshape_of_an_input_is_copied_once_whether_it_is_a_view_or_not(perm: list[int]) -> None:
    shape = [(4, 6)[p] for p in perm]
    graph = parse_graph(f"""graph @g(%x: f32[4, 6]) -> f32[24] {{
      %0: f32{shape} = transpose(%x) {{perm = {perm}}}
      %1: f32[24] = reshape(%0) {{shape = [24]}}
      return %1
    }}""")
    program, x = library_program(graph), torch.randn(4, 6)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        (got,) = program([x])
    assert torch.equal(got, evaluate(graph, [x])[0]) and got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert sum(e.count for e in seen.key_averages() if e.key == "aten::copy_") == 1


def test_threads_get_the_same_bits() -> None:
    graph = parse_graph(MLP)
    program = library_program(graph)
    inputs = [torch.randn(16, 8), torch.randn(4, 8), torch.randn(4)]
    expected = program(inputs)[0]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(50):
            if not torch.equal(program(inputs)[0], expected):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_index_check_raises_what_eager_raises() -> None:
    check_index(torch.tensor([0, 3]), 0, 4, IndexError)
    check_index(torch.empty(0, dtype=torch.int64), 0, 0, IndexError)
    for bad in ([4], [-1]):
        with pytest.raises(IndexError):
            check_index(torch.tensor(bad), 0, 4, IndexError)
    check_index(torch.tensor([-4]), -4, 4, IndexError)


def test_plan_shares_memory_only_between_disjoint_lifetimes() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 500, (60, 3), generator=generator).tolist()
    lives = [Lifetime(size, start % 40, start % 40 + length % 9) for size, start, length in numbers]
    result = plan(lives)
    for i, a in enumerate(lives):
        assert result.offsets[i] % 64 == 0 and result.offsets[i] + a.size <= result.peak
        for j, b in enumerate(lives[:i]):
            if a.start <= b.end and b.start <= a.end:
                assert result.offsets[i] + a.size <= result.offsets[j] or result.offsets[j] + b.size <= result.offsets[i]
    assert result.peak < result.total


def test_inputs_are_what_the_program_was_compiled_for() -> None:
    graph = parse_graph("""graph @g(%x: f32[B, 4], weight %w: f32[4], %t: f32[2, 3; 1, 2]) -> f32[B, 4]
    where 1 <= B {
      %0: f32[B, 4] = mul(%x, %w)
      return %0
    }""")
    guard = InputGuard(dict(enumerate(graph.inputs)), CPU)
    x, w, t = torch.randn(3, 4), torch.randn(4), torch.randn(3, 2).t()
    assert guard([x, w, t])[0] is x
    assert guard([x, w, t])[1] is w
    strided = torch.randn(4, 3).t()
    laid_out = guard([strided, w, t.contiguous()])
    assert laid_out[0].is_contiguous() and torch.equal(laid_out[0], strided)
    assert laid_out[2].stride() == (1, 2)
    for wrong in ([x.double(), w, t], [x, torch.randn(5), t], [x[0], w, t], [x, w.to("meta"), t]):
        with pytest.raises(InputError, match="compiled for"):
            guard(wrong)
    w.data = torch.randn(7)  # the same object with another shape
    with pytest.raises(InputError, match="w is"):
        guard([x, w, t])


def test_the_tensors_of_the_first_call_are_not_kept() -> None:
    x = torch.randn(3)
    check, gone = alike([x]), weakref.ref(x)
    assert check is not None and check(torch.randn(3)) and not check(torch.randn(4)) and not check(3)
    del x
    assert gone() is None
    assert not check(torch.nested.nested_tensor([torch.randn(3)])) and not check(torch.randn(3).to_sparse())
    for others in ([], [torch.eye(3).to_sparse_csr()], [torch.nested.nested_tensor([torch.randn(3)])]):
        assert alike(others) is None


def test_inputs_like_those_that_were_right_are_taken_and_no_others() -> None:
    graph = parse_graph("""
    graph @g(%x: f32[3, 4], %z: c64[2]) -> f32[3, 4] {
      return %x
    }""")
    guard = InputGuard(dict(enumerate(graph.inputs)), CPU)
    x, z = torch.randn(3, 4), torch.randn(2, dtype=torch.complex64)
    first = [x, z]
    assert guard(first) is first
    slow, guard.check = guard.check, None  # type: ignore[method-assign, assignment]
    assert guard([torch.randn(3, 4), z])[1] is z  # not looked at one by one
    guard.check = slow  # type: ignore[method-assign]
    with torch.inference_mode():
        apart = torch.randn(3, 4)
    for given_like in (torch.randn(3, 4, requires_grad=True), torch.nn.Parameter(x), apart, torch.randn(1, 3, 4)[0]):
        given = [given_like, z]
        assert guard(given) is given
    negated, conjugated = torch._neg_view(x), z.conj()
    for hidden in ([negated, z], [x, conjugated], [torch.randn(6, 4)[::2], z], [torch.randn(4, 3).t(), z]):
        laid_out = guard(hidden)
        assert all(torch.equal(a, b) and a.is_contiguous() and not (a.is_neg() or a.is_conj()) for a, b in zip(laid_out, hidden))
    for wrong in ([x.half(), z], [x[:2], z], [x, z.real], [x, torch.zeros(2)]):
        with pytest.raises(InputError, match="compiled for"):
            guard(wrong)
    assert guard(first) is first
