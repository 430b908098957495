"""What ``graphopt tune`` says while it runs, and at the end of kernels that are no faster."""

from __future__ import annotations

import io

from rich.console import Console

from graphopt.autotune.measure import Built, Incumbent, Subject, Trial
from graphopt.autotune.records import Measured, Status
from graphopt.autotune.space import Schedule, Workload
from graphopt.autotune.tasks import Progress, Task
from graphopt.autotune.tuner import Budget, Outcome, RoundBegins, Tried
from graphopt.cli.tune_view import View, beyond, disturbances, libraries, ranking, refusals, show_plan, standstill
from graphopt.tuning_tasks import Tasks
from tests.autotune.test_scheduler import NoSearch


def task(name: str, least: float = 0.0) -> Task:
    subject = Subject(Workload("matmul", name), lambda seed: None, least=least)  # type: ignore[arg-type, return-value]
    return Task(subject, name, Schedule.make("t"), seconds=2e-4)


def trial(seconds: float, won: bool, **knobs: int) -> Trial:
    return Trial(Built(Schedule.make("t", **knobs)), Measured(Status.OK, seconds), won)


def test_a_line_tells_of_the_task_at_hand() -> None:
    found = Tasks([task("small"), task("large")], [0.2, 0.8], [1e-3])
    view = View(found, Budget(seconds=60.0), Console(file=io.StringIO()))
    view.listen(RoundBegins(1, 8))
    assert view.line().endswith("60 s left, 0 trials, 0 failed; 1.00 -> 1.00 ms (estimate); now large (80%, 0 trials)")
    view.listen(Tried(1, trial(2e-4, True)))
    view.listen(Tried(1, trial(1e-4, True, n=1)))
    assert "2 trials (" in view.line() and " a second)" in view.line()
    assert view.line().endswith("1.00 -> 0.90 ms (estimate); now large (80%, 2 trials, best 100.0 us, 2.00x)")


class Ranked(NoSearch):
    def __init__(self, *batches: tuple[list[float], list[float]]) -> None:
        self.predictions = list(batches)


def test_how_good_the_cost_model_was_is_said() -> None:
    first = Progress(task("first"), Ranked(([3.0, 2.0, 1.0], [1e-3, 2e-3, 3e-3]), ([1.0, 2.0], [1e-3, 2e-3])))
    second = Progress(task("second"), Ranked(([1.0, 2.0], [1e-3, 1e-3])))  # which is faster nobody knows
    outcome = Outcome("budget", [first, second], 1.0, 7)
    assert ranking(outcome) == ["the cost model had 75% of 4 pairs of candidates in order before they were measured"]
    assert ranking(Outcome("budget", [second], 1.0, 2)) == []
    assert ranking(Outcome("budget", [first], 1.0, 5, "xgboost cannot be used")) == ["xgboost cannot be used"]


def test_why_kernels_are_no_faster_is_said() -> None:
    def progress(name: str, best: float, least: float, trials: int, exhausted: bool = False) -> Progress:
        search = NoSearch()
        p = Progress(task(name, least), search, Measured(Status.OK, 2e-4), Incumbent(Built(Schedule.make("t")), best), trials)
        search.exhausted = exhausted
        return p

    all_of_them = [
        progress("near", 2e-4, 1.9e-4, 8), progress("done", 2e-4, 1e-5, 64, True), progress("faster", 1e-4, 1e-5, 80),
        progress("searched", 2e-4, 1e-5, 30), progress("also", 2e-4, 0.0, 90), progress("never tried", 2e-4, 0.0, 0),
    ]  # fmt: skip
    found = Tasks([p.task for p in all_of_them], [0.1, 0.2, 0.3, 0.05, 0.05, 0.3], [1e-3])
    assert standstill(Outcome("budget", all_of_them, 60.0, 272), found) == [
        "1 kernel as before (10% of the time; 8 trials): no more trials, as nothing can be much faster there: within a tenth of the "
        "roofline",
        "1 kernel as before (20% of the time; 64 trials): every schedule that there is was tried, and none is faster",
        "2 kernels as before (10% of the time; 30 to 90 trials): none that was tried is faster",
    ]


def test_a_default_that_is_refused_is_told_of() -> None:
    wrong = Measured(Status.WRONG, reason="3 of 4 elements differ")
    other = Progress(task("other", 0.0), NoSearch(), Measured(Status.OK, 2e-4), Incumbent(Built(Schedule.make("t")), 1e-4), 8)
    refused = Progress(task("refused", 0.0), NoSearch(), wrong, Incumbent(Built(Schedule.make("t")), 3e-4), 8)
    alone = Progress(task("alone", 0.0), NoSearch(), wrong, None, 8)
    outcome = Outcome("budget", [other, refused, alone], 60.0, 24)
    assert refusals(outcome) == [
        "refused: its default schedule is refused (wrong: 3 of 4 elements differ); the fastest of the others counts from now on, also "
        "where it is slower. Please report it",
        "alone: its default schedule is refused (wrong: 3 of 4 elements differ); no other one ran either. Please report it",
    ]
    found = Tasks([p.task for p in outcome.progress], [0.2, 0.3, 0.5], [1e-3])
    assert not any("as before" in line for line in standstill(outcome, found)), "neither is as before"


def test_what_is_faster_than_the_limits_allow_is_named() -> None:
    def progress(name: str, best: float) -> Progress:
        return Progress(task(name, 1e-4), NoSearch(), Measured(Status.OK, 2e-4), Incumbent(Built(Schedule.make("t")), best), 8)

    outcome = Outcome("budget", [progress("near", 0.95e-4), progress("beyond", 0.4e-4)], 60.0, 16)
    (line,) = beyond(outcome)
    assert line.startswith("beyond the roofline: beyond (250%). What it is said to read was in a cache, or")
    assert standstill(outcome, Tasks([p.task for p in outcome.progress], [0.5, 0.5])) == []
    assert beyond(Outcome("budget", outcome.progress[:1], 60.0, 8)) == []


def test_the_plan_says_where_a_short_budget_goes() -> None:
    def plan(budget: float) -> str:
        console = Console(file=io.StringIO(), width=200)
        show_plan(Tasks([task("a"), task("b")], [0.5, 0.5], [4e-4]), None, budget, console)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    assert "52 for all of them; the budget is 10, which goes to where a second promises most" in plan(10.0)
    assert "the budget is 600\n" in plan(600.0)


def test_where_pytorchs_kernels_won_is_said() -> None:
    def progress(name: str, template: str) -> Progress:
        return Progress(task(name), NoSearch(), Measured(Status.OK, 2e-4), Incumbent(Built(Schedule.make(template)), 1e-4), 8)

    mine = [progress("a", "tile"), progress("b", "library")]
    assert libraries(Outcome("budget", mine, 60.0, 16)) == ["PyTorch's kernels were the fastest, and are called from now on: b"]
    assert libraries(Outcome("budget", mine[:1], 60.0, 8)) == []


def test_disturbed_trials_are_counted() -> None:
    def progress(n: int) -> Progress:
        return Progress(task("a"), NoSearch(), statuses={"ok": 3, "disturbed": n})

    (line,) = disturbances(Outcome("budget", [progress(1)], 60.0, 4))
    assert line == "1 trial disturbed by other processes: nobody knows how fast those are"
    assert disturbances(Outcome("budget", [progress(0)], 60.0, 3)) == []
