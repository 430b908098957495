"""The tuner's loop: bad candidates are never chosen, the budget is kept, Ctrl-C loses nothing, and a run can be gone on with."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from graphopt.autotune.measure import Built, Case, Incumbent, Subject, Trial
from graphopt.autotune.records import Measured, Status
from graphopt.autotune.runner import ProcessRunner
from graphopt.autotune.scheduler import ByGain
from graphopt.autotune.search import Search
from graphopt.autotune.space import Schedule, SearchSpace
from graphopt.autotune.tasks import MOST_LOST, Progress, Scheduler, Task
from graphopt.autotune.tuner import Budget, Event, Outcome, Standing, Tried, Tuner, round_size
from graphopt.target import Target
from tests.autotune.busy import timing
from tests.autotune.fake_kernels import BAD, LOADER, FakeBuilder, schedule, space, subject

TARGET = Target("cpu", "x86_64")
QUICK = timing(floor=0.002, recheck=0.004, patience=3.0)
Records = list[tuple[Trial, int]]


@pytest.fixture(scope="module")
def runner() -> Iterator[ProcessRunner]:
    runner = ProcessRunner(LOADER, threads=1, timing=QUICK)
    yield runner
    runner.close()


class Setup:
    """A tuner over fake kernels, and what it wrote down."""

    def __init__(self, runner: ProcessRunner, spaces: SearchSpace, *, batch: int = 4, known: Standing | None = None, done: int = 0,
                 tried: tuple[tuple[Schedule, Measured], ...] = (), listener: Callable[[Event], None] | None = None,
                 scheduler: Scheduler | None = None) -> None:  # fmt: skip
        self.records: Records = []
        self.builder = FakeBuilder()
        task = Task(subject(), "x + y", spaces.default())
        self.tuner = Tuner(
            [task], search=lambda t: Search(t.workload, TARGET, [spaces], seed=0, known=tried), builder=self.builder, runner=runner,
            record=lambda t, trial, n: self.records.append((trial, n)), batch=batch, known={0: known} if known else None, done=done,
            listener=listener, scheduler=scheduler,
        )  # fmt: skip

    def run(self, budget: Budget) -> tuple[Outcome, Progress]:
        outcome = self.tuner.run(budget)
        return outcome, outcome.progress[0]


def test_no_bad_candidate_is_ever_chosen_and_all_are_tried(runner: ProcessRunner) -> None:
    setup = Setup(runner, space("slow", *BAD, "good"))
    outcome, p = setup.run(Budget())
    assert outcome.why == "done" and outcome.trials == len(BAD) + 2
    assert p.incumbent is not None and p.incumbent.schedule == schedule("good")
    assert p.gain is not None and p.gain > 5
    for trial, _ in setup.records:
        kernel = trial.schedule["kernel"]
        assert trial.measured.status.value == BAD.get(kernel, "ok"), kernel
        assert not (trial.won and kernel in BAD)
    assert [n for _, n in setup.records] == list(range(1, len(BAD) + 3))


def test_a_bad_default_leaves_the_task_to_the_next_that_is_right(runner: ProcessRunner) -> None:
    _, p = Setup(runner, space("crashes", "good")).run(Budget())
    assert p.incumbent is not None and p.incumbent.schedule == schedule("good")
    assert p.default is not None and not p.default.ok and p.gain is None


class LosingRunner(ProcessRunner):
    """The machine is lost the first times that a kernel is tried."""

    def __init__(self, kernel: str, times: int) -> None:
        super().__init__(LOADER, threads=1, timing=QUICK)
        self.kernel, self.left = kernel, times

    def measure(self, subject: Subject, candidates: Sequence[Built], incumbent: Incumbent | None) -> Iterator[Trial]:
        for built in candidates:
            if built.entry == self.kernel and self.left:
                self.left -= 1
                yield Trial(built, Measured(Status.LOST, reason="the session ended"))
                continue
            for trial in super().measure(subject, [built], incumbent):
                if trial.won:
                    incumbent = Incumbent(built, trial.measured.seconds or 0.0)
                yield trial


@pytest.mark.parametrize("n", [1, 3])
def test_a_default_that_was_lost_is_tried_again(n: int) -> None:
    runner = LosingRunner("good", 2)
    try:
        _, p = Setup(runner, space("good", "slow", "slower", n=n)).run(Budget(trials=9 + 2))
    finally:
        runner.close()
    assert p.default is not None and p.default.ok
    assert p.incumbent is not None and p.incumbent.schedule["kernel"] == "good"
    assert p.statuses["lost"] == 2


def test_a_default_that_is_tried_again_is_in_no_others_place() -> None:
    runner = LosingRunner("good", 2)
    setup = Setup(runner, space("good", "slow", "slower", n=3), batch=2)
    try:
        outcome, p = setup.run(Budget())
    finally:
        runner.close()
    assert outcome.why == "done" and p.exhausted
    assert len({t.schedule for t, _ in setup.records}) == 9, "every schedule that there is was tried"


def test_a_task_without_room_for_its_inputs_is_left_out_and_the_others_are_tuned(runner: ProcessRunner) -> None:
    def no_room(seed: int) -> Case:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB")

    setup = Setup(runner, space("good", n=4))
    (other,) = setup.tuner.progress
    first = replace(other, task=Task(replace(subject(), case=no_room), "large", schedule("good")))
    first.search = Search(first.task.workload, TARGET, [space("good", n=4)], seed=0)
    setup.tuner.progress = [first, other]
    outcome = setup.tuner.run(Budget())
    assert outcome.why == "done" and (first.trials, other.trials) == (0, 4)
    assert "could not be made" in first.left_out and "allocate 1 TB" in first.left_out and not other.left_out


class Disturbing(LosingRunner):
    """Other processes are in the way the first times that a kernel is tried."""

    def measure(self, subject: Subject, candidates: Sequence[Built], incumbent: Incumbent | None) -> Iterator[Trial]:
        for trial in super().measure(subject, candidates, incumbent):
            lost = trial.measured.status is Status.LOST
            yield Trial(trial.built, Measured(Status.DISTURBED, reason="threads waited")) if lost else trial


@pytest.mark.parametrize("times", [1, MOST_LOST])
def test_nothing_is_tried_until_the_default_was_timed(times: int) -> None:
    """What is timed alone, while the default was disturbed, would count as the fastest."""
    runner = Disturbing("good", times)
    try:
        setup = Setup(runner, space("good", "slow", n=2))
        outcome, p = setup.run(Budget())
    finally:
        runner.close()
    first = [(t.schedule["kernel"], t.measured.status.value) for t, _ in setup.records][:times]
    assert outcome.why == "done" and first == [("good", "disturbed")] * times
    if times < MOST_LOST:
        assert p.statuses == {"disturbed": times, "ok": 4} and p.incumbent is not None and p.incumbent.schedule["kernel"] == "good"
        assert p.default is not None and p.default.ok and not p.left_out
    else:
        assert p.trials == times and p.incumbent is None and "could not be timed: threads waited" in p.left_out


def test_a_default_that_is_always_lost_is_given_up() -> None:
    runner = LosingRunner("good", 100)
    try:
        outcome, p = Setup(runner, space("good", "slow")).run(Budget())
    finally:
        runner.close()
    assert outcome.why == "done" and p.statuses == {"lost": MOST_LOST, "ok": 1}


def test_the_number_of_trials_is_kept(runner: ProcessRunner) -> None:
    outcome, p = Setup(runner, space("good", n=100)).run(Budget(trials=6))
    assert (outcome.why, outcome.trials, p.trials) == ("trials", 6, 6)


def test_the_seconds_are_kept_up_to_one_trial_and_one_build(runner: ProcessRunner) -> None:
    outcome, _ = Setup(runner, space("good", n=4000)).run(Budget(seconds=0.5))
    assert outcome.why == "budget" and outcome.trials > 0
    assert outcome.trials < 4000


def test_every_trial_is_written_down_before_it_is_told(runner: ProcessRunner) -> None:
    seen: list[int] = []
    setup = Setup(runner, space("good", n=8), listener=lambda e: seen.append(len(setup.records)) if isinstance(e, Tried) else None)
    setup.run(Budget())
    assert seen == list(range(1, 9))


def test_an_interrupt_ends_it_and_what_was_tried_is_kept(runner: ProcessRunner) -> None:
    setup = Setup(runner, space("slow", n=4000))
    ended = threading.Event()

    def interrupt() -> None:
        """Again after a while: Python drops an interrupt that comes while an object is finalized."""
        wait = 0.6
        while not ended.wait(wait):
            os.kill(os.getpid(), signal.SIGINT)
            wait = 10.0

    killer = threading.Thread(target=interrupt, daemon=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background has it ignored
    killer.start()
    try:
        outcome, p = setup.run(Budget(seconds=120))
    finally:
        ended.set()
        killer.join()
        signal.signal(signal.SIGINT, before)
    assert outcome.why == "interrupted"
    assert outcome.trials == len(setup.records) == p.trials


def test_a_run_is_gone_on_with(runner: ProcessRunner) -> None:
    first = Setup(runner, space("slow", "good", n=6))
    _, p = first.run(Budget(trials=5))
    assert p.incumbent is not None
    tried = tuple((t.schedule, t.measured) for t, _ in first.records)
    standing = Standing(p.incumbent.schedule, p.incumbent.seconds, p.default)
    second = Setup(runner, space("slow", "good", n=6), known=standing, done=5, tried=tried)
    outcome, q = second.run(Budget(trials=9))
    assert (outcome.why, outcome.trials) == ("trials", 4)
    assert [n for _, n in second.records] == [6, 7, 8, 9]
    assert not {t.schedule for t, _ in first.records} & {t.schedule for t, _ in second.records}
    assert q.default == p.default and q.best is not None and q.best <= p.incumbent.seconds


def test_what_an_earlier_part_found_is_told_though_nothing_is_tried(runner: ProcessRunner) -> None:
    default = Measured(Status.OK, 3e-5)
    known = Standing(space("good").default(), 1e-5, default, 8)
    outcome, p = Setup(runner, space("good", n=6), known=known, done=8).run(Budget(trials=8))
    assert (outcome.trials, p.trials, p.earlier, p.default, p.best, p.incumbent) == (0, 0, 8, default, 1e-5, None)
    assert p.gain == pytest.approx(3.0)


def test_an_incumbent_that_cannot_be_built_again_is_forgotten(runner: ProcessRunner) -> None:
    gone = schedule("good", 5)
    known = Standing(gone, 1e-9, Measured(Status.OK, 3e-5), 8)
    setup = Setup(runner, space("good", n=5), known=known, done=8)
    build = setup.builder.build
    setup.builder.build = lambda w, some: (  # type: ignore[method-assign]
        [replace(b, failure="no such sketch") if b.schedule == gone else b for b in build(w, some)]
    )  # fmt: skip
    outcome, p = setup.run(Budget(trials=10))
    assert outcome.trials == 2 and p.best is not None and p.best > 1e-9
    assert p.incumbent is not None and p.incumbent.built.schedule != gone
    assert [t.measured.gain is None for t, _ in setup.records] == [True, False], "a chain of its own"


def test_a_task_at_its_roofline_gets_one_batch(runner: ProcessRunner) -> None:
    spaces = space("slow", n=100)
    setup = Setup(runner, spaces, scheduler=ByGain(near=4.0))
    p = setup.tuner.progress[0]
    p.task = Task(replace(subject(), least=1e-3), "x + y", spaces.default())  # as long as it waits
    outcome, _ = setup.run(Budget())
    assert (outcome.why, outcome.trials) == ("done", 4)


@pytest.mark.parametrize(("tried", "batch", "size"), [(0, 16, 8), (31, 16, 8), (32, 16, 16), (0, 4, 4), (500, 4, 4)])
def test_the_first_rounds_are_small(tried: int, batch: int, size: int) -> None:
    assert round_size(tried, batch) == size
