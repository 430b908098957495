"""Recorded calls: what a graph reads and writes lies where it lay. On CPU tensors, by the recorder that makes its steps again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from graphopt.backends.eager import LibraryCall
from graphopt.graphed import MOST, Graphed, record_calls, unrecordable
from graphopt.ir import Graph, evaluate, parse_graph
from graphopt.lower import lower
from graphopt.program import Program
from graphopt.recorders import CannotRecord, CpuRecorder, CudaRecorder
from graphopt.report import Report
from graphopt.target import Target

CPU = torch.device("cpu")


def graphed(text: str | Graph, recorder: Any = None) -> tuple[Graph, Program, Report]:
    """A program of library calls that is recorded."""
    graph = parse_graph(text) if isinstance(text, str) else text
    lowered = lower(graph, Target("cpu", "x86_64"), None, "the test asks for it", asked=True)
    program, report = Program(lowered, [], lambda node: LibraryCall(node, CPU), CPU), Report("test", "cpu")
    program.graphed = Graphed(program, lowered, recorder or CpuRecorder(), report)
    return graph, program, report


def said(report: Report, kind: str = "missed") -> str:
    return "\n".join(r.message for r in report.remarks if r.kind == kind)


PAIR = """graph @g(%x: f32[B, 8], weight %w: f32[8, 4], %y: f32[B, 4]) -> (f32[B, 4], f32[4, B; 1, 4]) where 0 <= B {
  %0: f32[8, 4] = exp(%w)
  %1: f32[B, 4] = matmul(%x, %0)
  %2: f32[B, 4] = add(%1, %y)
  %3: f32[4, B] = transpose(%1) {perm = [1, 0]}
  return %2, %3
}"""


def pair(n: int = 3) -> list[torch.Tensor]:
    return [torch.randn(n, 8), torch.randn(8, 4), torch.randn(n, 4)]


def right(graph: Graph, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    for mine, want in zip(outputs, evaluate(graph, inputs), strict=True):
        torch.testing.assert_close(mine, want)


def test_the_third_call_is_a_replay_and_no_call_changes_what_another_returned() -> None:
    graph, program, report = graphed(PAIR)
    w, calls = torch.randn(8, 4), []
    for _ in range(6):
        x, _, y = pair()
        calls.append(([x.clone(), w, y.clone()], program([x, w, y])))
        x.zero_()  # the caller's own again
        y.zero_()
    assert report.graphs is not None
    assert (report.graphs.recorded, report.graphs.replayed, report.graphs.launched) == (1, 4, 2)
    for inputs, outputs in calls:
        right(graph, inputs, outputs)
        assert outputs[1].stride() == (1, 4)
    memory = [x.data_ptr() for _, outputs in calls for x in outputs]
    assert len(set(memory)) == len(memory)
    for x in calls[-1][1]:
        x.fill_(7.0)  # what was returned is no memory of the recording
    x, _, y = pair()
    right(graph, [x, w, y], program([x, w, y]))
    assert report.graphs.replayed == 5 and not report.graphs.stopped and "recorded" in said(report, "passed")
    assert (report.memory["graphs"] or 0) >= sum(t.nbytes for t in (x, y))


def test_each_combination_of_sizes_has_a_recording_of_its_own() -> None:
    graph, program, report = graphed(PAIR)
    w = torch.randn(8, 4)
    for n in (3, 5, 1, 3, 5, 0, 3, 5, 0, 3):
        x, _, y = pair(n)
        right(graph, [x, w, y], program([x, w, y]))
    assert report.graphs is not None and (report.graphs.recorded, report.graphs.replayed) == (3, 3)
    assert "B = 3" in said(report, "passed") and "B = 1" not in said(report, "passed")


def test_there_is_a_bound_on_recordings() -> None:
    graph, program, report = graphed(PAIR)
    w = torch.randn(8, 4)
    for n in range(MOST + 4):
        for _ in range(3):
            x, _, y = pair(n)
            right(graph, [x, w, y], program([x, w, y]))
    assert report.graphs is not None and (report.graphs.recorded, report.graphs.replayed) == (MOST, MOST)
    assert said(report).count(f"no more than {MOST} are recorded") == 1
    w.mul_(2)  # all recordings go with the state of the weights that they were made for
    for _ in range(3):
        x, _, y = pair(2)
        right(graph, [x, w, y], program([x, w, y]))
    assert report.graphs.recorded == MOST + 1


def test_sizes_that_never_come_again_are_said() -> None:
    _, program, report = graphed(PAIR)
    w = torch.randn(8, 4)
    for n in range(40):
        x, _, y = pair(n)
        program([x, w, y])
    assert report.graphs is not None and not report.graphs.recorded and "none of the first calls" in said(report)


def test_weights_are_read_where_they_are() -> None:
    graph, program, report = graphed("""graph @g(%x: f32[4], weight %w: f32[4], weight %v: f32[4]) -> f32[4] {
      %0: f32[4] = exp(%w)
      %1: f32[4] = mul(%x, %0)
      %2: f32[4] = add(%1, %v)
      return %2
    }""")
    w, v = torch.randn(4), torch.randn(4)

    def run(times: int = 3) -> None:
        for _ in range(times):
            x = torch.randn(4)
            right(graph, [x, w, v], program([x, w, v]))

    run()
    v.add_(1)  # read as it is, where it is
    run(2)
    assert report.graphs is not None and (report.graphs.recorded, report.graphs.replayed) == (1, 3)
    w.add_(1)  # staged
    run()
    v.data = torch.randn(4)  # elsewhere
    run()
    w = torch.randn(4)
    run()
    assert report.graphs.recorded == 4


def test_inputs_of_all_layouts() -> None:
    graph, program, report = graphed(PAIR)
    w = torch.randn(8, 4)
    layouts: list[Callable[[], tuple[torch.Tensor, torch.Tensor]]] = [
        lambda: (torch.randn(8, 3).t(), torch.randn(3, 1).expand(3, 4)),
        lambda: (torch.randn(6, 16)[::2, ::2], torch.randn(4).expand(3, 4)),
        lambda: (torch.randn(1).expand(3, 8), torch.randn(12).as_strided((3, 4), (1, 2))),
    ]
    for make in layouts:
        for _ in range(3):
            x, y = make()
            right(graph, [x, w, y], program([x, w, y]))
    assert report.graphs is not None and report.graphs.recorded == 3 and not report.graphs.stopped
    x = torch.randn(3, 8)
    right(graph, [x, w, x[:, :4]], program([x, w, x[:, :4]]))  # one is a part of the other one
    right(graph, [x, w, x[:, :4]], program([x, w, x[:, :4]]))
    right(graph, [x, w, x[:, :4]], program([x, w, x[:, :4]]))


def test_inference_mode_and_the_other() -> None:
    graph, program, report = graphed(PAIR)
    w = torch.randn(8, 4)
    for k in range(8):
        with torch.inference_mode(k % 3 != 0):
            x, _, y = pair()
            outputs = program([x, w, y])
        assert outputs[0].is_inference() == (k % 3 != 0)
        right(graph, [x, w, y], outputs)
    assert report.graphs is not None and report.graphs.replayed == 6


def test_threads_get_what_a_single_one_gets() -> None:
    graph, program, report = graphed(PAIR)
    w, wrong = torch.randn(8, 4), list[str]()

    def work() -> None:
        kept = []
        for k in range(40):
            x, _, y = pair(3 + k % 2)
            kept.append(([x, w, y], program([x, w, y])))
        for inputs, outputs in kept:
            try:
                right(graph, inputs, outputs)
            except AssertionError as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and report.graphs is not None and report.graphs.recorded == 2
    assert report.graphs.replayed + report.graphs.launched == 160


def test_random_numbers_are_drawn_at_each_replay() -> None:
    text = """graph @g(%x: f32[1000]) -> f32[1000] {
      %0: f32[1000] = aten(%x) {target = "aten.bernoulli.p", args = [$0, 0.5], kwargs = [], effect = "random", layouts = []}
      %1: f32[1000] = mul(%x, %0)
      return %1
    }"""
    _, program, report = graphed(text)
    _, plain, _ = graphed(text, Never())
    x = torch.ones(1000)
    torch.manual_seed(0)
    got = [program([x])[0] for _ in range(5)]
    torch.manual_seed(0)
    for mine, want in zip(got, [plain([x])[0] for _ in range(5)], strict=True):
        assert torch.equal(mine, want)
    assert report.graphs is not None and report.graphs.replayed == 3 and not torch.equal(got[3], got[4])


class Never(CpuRecorder):
    """Can never record now."""

    def why_not_now(self) -> str | None:
        return "the test wants it so"


def test_a_call_that_cannot_be_replayed_now_is_launched() -> None:
    graph, program, report = graphed(PAIR, Never())
    inputs = pair()
    for _ in range(4):
        right(graph, inputs, program(inputs))
    assert report.graphs is not None and report.graphs.launched == 4 and said(report) == "not replayed: the test wants it so"


class Broken(CpuRecorder):
    """Fails while it records, after all was run."""

    def record(self, run: Any, written: Any) -> Any:
        super().record(run, written)
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


def test_a_recording_that_fails_is_said_and_the_call_is_right() -> None:
    graph, program, report = graphed(PAIR, Broken())
    w = torch.randn(8, 4)
    for _ in range(4):
        x, _, y = pair()
        right(graph, [x, w, y], program([x, w, y]))
    assert report.graphs is not None and not report.graphs.replayed
    assert report.graphs.stopped == "recording failed: operation not permitted when stream is capturing"
    assert "each call is launched" in said(report) and "recording failed" in report.summary()


def aten(target: str, args: str, result: str, operand: str = "f32[6]", effect: str = "none") -> str:
    layout = f'args = {args}, kwargs = [], effect = "{effect}", layouts = []'
    return f"""graph @g(%x: {operand}) -> {result} {{
      %0: {result} = aten(%x) {{target = "{target}", {layout}}}
      return %0
    }}"""


@torch.library.custom_op("graphed_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.mark.parametrize(("text", "reason"), [
    (aten("aten.masked_select.default", "[$0, $0]", "f32[6]"), "masked_select.default waits for the device"),
    (aten("graphed_test.twice.default", "[$0]", "f32[6]"), "no operator of PyTorch's"),
    (aten("aten.cumsum.default", "[$0, 0]", "f32[6]", effect="mutates"), "has effects beside its results"),
    ("graph @g(%x: f32[6]) -> f32[2, 3] {\n  %0: f32[2, 3] = reshape(%x) {shape = [2, 3]}\n  return %0\n}", "it launches nothing"),
])  # fmt: skip
def test_what_is_known_not_to_be_recordable(text: str, reason: str) -> None:
    lowered = lower(parse_graph(text), Target("cpu", "x86_64"), None, "", asked=True)
    found = unrecordable(lowered)
    assert found is not None and reason in found
    _, _, report = graphed(text)
    assert report.graphs is not None and reason in report.graphs.stopped and reason in said(report)


def test_what_waits_ends_a_recording_and_changes_nothing() -> None:
    """As the capture of a CUDA graph does, of what no table knew."""
    cache, x = torch.zeros(4), torch.ones(4)

    def run() -> list[torch.Tensor]:
        cache.add_(x)
        return [x * float(cache.sum().item())]

    state = torch.get_rng_state()
    with pytest.raises(CannotRecord, match="waits for the device"):
        CpuRecorder().record(run, [cache])
    assert torch.equal(cache, torch.zeros(4)) and torch.equal(torch.get_rng_state(), state)


def test_recording_computes_nothing_and_a_replay_all() -> None:
    cache, x = torch.zeros(4), torch.ones(4)

    def run() -> list[torch.Tensor]:
        cache.add_(x)
        return [cache * 2]

    recording = CpuRecorder().record(run, [cache])
    assert torch.equal(cache, torch.zeros(4)) and recording.nbytes == 16
    for k in (1, 2):
        recording.replay()
        assert torch.equal(cache, torch.full((4,), float(k))) and torch.equal(recording.outputs[0], cache * 2)
    x.fill_(10)
    recording.replay()
    assert torch.equal(cache, torch.full((4,), 12.0))


def test_on_the_cpu_nothing_is_recorded() -> None:
    graph = parse_graph(PAIR)
    lowered = lower(graph, Target("cpu", "x86_64"), None, "", asked=True)
    program, report = Program(lowered, [], lambda node: LibraryCall(node, CPU), CPU), Report("test", "cpu")
    record_calls(program, lowered, report, CPU, interpreted=False)
    assert program.graphed is None and "the model is on cpu" in said(report)


_OUTER: list[Program] = []


@torch.library.custom_op("graphed_test::again", mutates_args=())
def again(x: torch.Tensor) -> torch.Tensor:
    if not _OUTER:
        return x + 1
    program = _OUTER.pop()
    return program([x])[0] + 1


def test_a_call_within_its_own_call() -> None:
    _, program, report = graphed(aten("graphed_test.again.default", "[$0]", "f32[6]"))
    assert report.graphs is not None
    report.graphs.stopped = ""  # it is refused
    for depth in (0, 1, 2, 1):
        _OUTER[:] = [program] * depth
        torch.testing.assert_close(program([torch.ones(6)])[0], torch.full((6,), 2.0 + depth))


class FakeStream:
    def __init__(self) -> None:
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)


class FakeTensor:
    def __init__(self) -> None:
        self.streams: list[FakeStream] = []

    def record_stream(self, stream: FakeStream) -> None:
        self.streams.append(stream)


def test_replays_on_several_streams_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, x = FakeStream(), FakeStream(), FakeTensor()
    recorder, used = CudaRecorder(torch.device("cuda:0")), [a, a, b, b, a]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: used.pop(0))
    static, streams = [x], set[Any]()
    for _ in range(5):
        recorder.in_order(static, streams)
    assert a.waited == [b] and b.waited == [a] and x.streams == [a, b]
    used[:], other = [a], FakeTensor()
    recorder.in_order([other], set())  # of another recording
    assert other.streams == [a]


def test_inputs_that_are_no_strided_tensors_are_not_copied() -> None:
    graph, program, report = graphed(PAIR)
    x, w, y = pair()
    for _ in range(3):
        program([x.to_sparse(), w, y])
    assert report.graphs is not None and not report.graphs.recorded and "is no strided tensor" in said(report)
    for _ in range(3):
        right(graph, [x, w, y], program([x, w, y]))
    assert report.graphs.replayed == 1


