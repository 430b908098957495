"""What ``graphopt tune`` shows: the plan, the tasks while it runs, and what came of it."""

from __future__ import annotations

import time
from statistics import median

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from graphopt.autotune.library_kernel import TEMPLATE
from graphopt.autotune.records import Status
from graphopt.autotune.scheduler import ByGain
from graphopt.autotune.tuner import Budget, Event, GoesOn, Outcome, RoundBegins, TimingBegins, Tried
from graphopt.before_after import BeforeAfter
from graphopt.bench.limits import Limits
from graphopt.errors import counted
from graphopt.tuning_tasks import Tasks

NEAR = ByGain().near
LINES = 24  # tasks shown at most
REDRAW = 0.25  # seconds between two pictures
LINE_EVERY = 10.0  # seconds between two lines where there is no terminal
TYPICAL_GAIN = 1.1  # expected of a task about which nothing is known, where the roofline allows it
TYPICAL_TRIALS, TYPICAL_TRIAL_SECONDS = 128, 0.2


def microseconds(seconds: float | None) -> str:
    """For people; empty for a time that is not known."""
    return f"{seconds * 1e6:.1f}" if seconds else ""


# --- the plan ----------------------------------------------------------------------------------------------------------


def show_plan(found: Tasks, limits: Limits | None, budget: float, console: Console) -> None:
    """What would be tuned: share of the models' time, distance to the roofline, and what to expect."""
    table = Table("kernel", "calls", "us", "PyTorch us", "share", "roofline", "expected", "seconds", title="Plan", title_justify="left")
    left = wanted_in_all = 0.0
    for task, share in zip(found.tasks, found.share, strict=True):
        gain = expected_gain(task.seconds, task.least)
        wanted = TYPICAL_TRIALS * (TYPICAL_TRIAL_SECONDS + 20 * task.seconds)
        wanted_in_all += wanted
        left += share * (1 - 1 / gain)
        near = f"{task.least / task.seconds:.0%}" if task.least and task.seconds else "?"
        table.add_row(task.name, str(task.calls), microseconds(task.seconds), microseconds(task.library), f"{share:.1%}", near,
                      f"{gain:.2f}x", f"{wanted:.0f}")  # fmt: skip
    if found.tasks:
        console.print(table)
    for what, why in dict.fromkeys(found.left_out):
        console.print(f"not tuned: {what}: {why}", style="dim", highlight=False)
    if found.tasks and sum(found.share) < 0.995 and not found.estimated:
        rest = f"the other {1 - sum(found.share):.0%} of the time: what is not tuned, and between kernels"
        console.print(rest, style="dim", highlight=False)
    if found.estimated and found.tasks:
        console.print("times are estimates, as nothing has run there yet")
    console.print(roofline(limits), highlight=False)
    if found.tasks:
        console.print(f"expected: {1 / (1 - left):.2f}x for the whole; a guess, as nothing is known of a kernel but its distance to the "
                      "roofline", highlight=False)  # fmt: skip
        enough = "" if budget >= wanted_in_all else ", which goes to where a second promises most"
        console.print(f"seconds: what {TYPICAL_TRIALS} trials of a kernel take, {wanted_in_all:.0f} for all of them; the budget is "
                      f"{budget:.0f}{enough}", highlight=False)  # fmt: skip
    else:
        console.print("there is nothing to tune")


def roofline(limits: Limits | None) -> str:
    """The machine's limits, in words."""
    if limits is None:
        return "roofline: the limits are not known, as they were not measured, or other processes were in the way all the time"
    thirds = f" (products from thirds on AMX tiles: {limits.by_thirds / 1e9:.0f})" if limits.by_thirds > limits.flops else ""
    measured = f"{limits.flops / 1e9:.0f} GFLOP/s{thirds}, {limits.bytes / 1e9:.1f} GB/s"
    return f"roofline: {measured}, measured with {counted(limits.threads, 'thread')}"


def expected_gain(seconds: float, least: float) -> float:
    """A modest guess: a tenth, or half of what the roofline leaves if that is less."""
    if not seconds or not least:
        return TYPICAL_GAIN
    return max(1.0, min(TYPICAL_GAIN, 1 + (seconds / least - 1) / 2))


# --- while it runs -----------------------------------------------------------------------------------------------------


class View:
    """The tasks as they stand; a picture on a terminal, lines elsewhere. ``with view: ... listen``."""

    def __init__(self, found: Tasks, budget: Budget, console: Console) -> None:
        self.found, self.budget, self.console = found, budget, console
        self.best: list[float | None] = [None] * len(found.tasks)
        self.default: list[float | None] = [None] * len(found.tasks)
        self.trials = [0] * len(found.tasks)
        self.failed = 0
        self.now, self.doing = 0, ""
        self._start = self._drawn = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def listen(self, event: Event) -> None:
        """Take an event in, and draw if it is time."""
        self.now = event.task
        if not self.doing:  # the first one: what the processes need to start is not the budget's
            self._start = self._drawn = time.monotonic()
        if isinstance(event, RoundBegins):
            self.doing = f"build {event.size}"
        elif isinstance(event, TimingBegins):
            self.doing = "measure"
        elif isinstance(event, GoesOn):
            self.best[event.task], self.default[event.task] = event.seconds, event.default
        else:
            self._tried(event)
        wait = LINE_EVERY if self._live is None else REDRAW if isinstance(event, Tried) else 0.0
        if time.monotonic() - self._drawn >= wait:
            self._drawn = time.monotonic()
            if self._live:
                self._live.update(self.picture(), refresh=True)
            else:
                self.console.print(self.line(), highlight=False, soft_wrap=True)

    def _tried(self, event: Tried) -> None:
        m, i = event.trial.measured, event.task
        self.trials[i] += 1
        self.failed += not m.ok
        if event.trial.schedule == self.found.tasks[i].default and m.ok:
            self.default[i] = m.seconds
        if event.trial.won:
            self.best[i] = m.seconds

    @property
    def estimate(self) -> float:
        """Seconds of a run of all models, if every kernel gains in them what it gained alone, as far as the roofline lets it."""
        saved = 0.0
        for task, best, default in zip(self.found.tasks, self.best, self.default, strict=True):
            if best and default:
                saved += task.calls * max(0.0, task.seconds - max(task.seconds * best / default, task.least))
        return max(0.0, sum(self.found.seconds) - saved)

    @property
    def elapsed(self) -> float:
        """Seconds of the budget that are gone."""
        return time.monotonic() - self._start if self.doing else 0.0

    def line(self) -> str:
        before = sum(self.found.seconds)
        whole = "" if self.found.estimated else f"; {before * 1e3:.2f} -> {self.estimate * 1e3:.2f} ms (estimate)"
        elapsed, tried = self.elapsed, sum(self.trials)
        rate = f" ({tried / elapsed:.1f} a second)" if tried and elapsed else ""
        return f"{elapsed:5.0f} s{self._left()}, {counted(tried, 'trial')}{rate}, {self.failed} failed{whole}; now {self._task()}"

    def _task(self) -> str:
        """The task at hand: its share of the time, trials, and its best so far."""
        i = self.now
        told = [f"{self.found.share[i]:.0%}", counted(self.trials[i], "trial")]
        best, default = self.best[i], self.default[i]
        if best:
            told.append(f"best {microseconds(best)} us" + (f", {default / best:.2f}x" if default else ""))
        return f"{self.found.tasks[i].name} ({', '.join(told)})"

    def _left(self) -> str:
        if self.budget.seconds is None:
            return ""
        return f", {max(0.0, self.budget.seconds - self.elapsed):.0f} s left"

    def picture(self) -> Group:
        table = Table("", "kernel", "share", "trials", "PyTorch us", "default us", "best us", "gain", "roofline", box=None, pad_edge=False)
        for i, (task, share) in enumerate(zip(self.found.tasks, self.found.share, strict=True)):
            if i >= LINES and i != self.now:
                continue
            best, default = self.best[i], self.default[i]
            gain = f"{default / best:.2f}x" if best and default else ""
            near = reached(task.least, best)
            table.add_row(">" if i == self.now else "", task.name, f"{share:.1%}", str(self.trials[i] or ""), microseconds(task.library),
                          microseconds(default), microseconds(best), gain, near)  # fmt: skip
        return Group(table, Text(f"{self.line()}: {self.doing}"))


# --- at the end --------------------------------------------------------------------------------------------------------


def show_result(outcome: Outcome, found: Tasks, limits: Limits | None, console: Console) -> None:
    """What was tried and found."""
    table = Table("kernel", "share", "trials", "failed", "PyTorch us", "default us", "best us", "gain", "roofline",
                  title="Kernels alone, each timed in turns with the best so far", title_justify="left")  # fmt: skip
    for p, share in zip(outcome.progress, found.share, strict=True):
        failed = sum(n for status, n in p.statuses.items() if status != "ok")
        gain = f"{p.gain:.2f}x" if p.gain else ""
        default = p.default.seconds if p.default else None
        table.add_row(p.task.name, f"{share:.1%}", str(p.trials), str(failed or ""), microseconds(p.task.library), microseconds(default),
                      microseconds(p.best), gain, reached(p.task.least, p.best))  # fmt: skip
    console.print(table)
    if limits is not None:
        console.print(roofline(limits), highlight=False)
    told = (*beyond(outcome), *refusals(outcome), *libraries(outcome), *disturbances(outcome), *standstill(outcome, found))
    for text in (*told, *ranking(outcome)):
        console.print(text, highlight=False, soft_wrap=True)
    why = {"budget": "the budget ended", "trials": "all trials were made", "done": "nothing was left to try", "interrupted": "interrupted"}
    rate = f"{outcome.seconds:.1f} s ({outcome.rate:.1f} a second)"
    console.print(f"{counted(outcome.trials, 'trial')} in {rate}; {why[outcome.why]}", highlight=False)


def reached(least: float, seconds: float | None) -> str:
    """How near a kernel is to its roofline; empty if that is not known."""
    return f"{least / seconds:.0%}" if least and seconds else ""


def beyond(outcome: Outcome) -> list[str]:
    """Kernels that are faster than they can be, if the limits are right: a tenth beyond them."""
    fast = [f"{p.task.name} ({p.task.least / p.best:.0%})" for p in outcome.progress if p.best and p.best * NEAR < p.task.least]
    if not fast:
        return []
    what = "it is" if len(fast) == 1 else "they are"
    return [f"beyond the roofline: {', '.join(fast)}. What {what} said to read was in a cache, or the machine was slower when its limits "
            "were measured"]  # fmt: skip


def refusals(outcome: Outcome) -> list[str]:
    """What to know of kernels whose default schedule failed, or that could not be tried."""
    out = []
    for p in outcome.progress:
        if p.refused:
            then = "the fastest of the others counts from now on, also where it is slower" if p.incumbent else "no other one ran either"
            out.append(f"{p.task.name}: its default schedule is refused ({p.refused}); {then}. Please report it")
        if p.left_out:
            out.append(f"{p.task.name}: left out after {counted(p.trials, 'trial')}: {p.left_out}")
    return out


def libraries(outcome: Outcome) -> list[str]:
    """Kernels in whose place PyTorch's were the fastest."""
    won = [p.task.name for p in outcome.progress if p.incumbent and p.incumbent.schedule.template == TEMPLATE]
    return [f"PyTorch's kernels were the fastest, and are called from now on: {', '.join(won)}"] if won else []


def disturbances(outcome: Outcome) -> list[str]:
    """Trials of which no time is known."""
    n = sum(p.statuses.get(Status.DISTURBED.value, 0) for p in outcome.progress)
    return [f"{counted(n, 'trial')} disturbed by other processes: nobody knows how fast those are"] if n else []


def ranking(outcome: Outcome) -> list[str]:
    """How good the cost model was on what it had not seen, in words; or why there is none."""
    if outcome.why_unranked:
        return [outcome.why_unranked]
    pairs, share = outcome.ranked
    return [f"the cost model had {share:.0%} of {counted(pairs, 'pair')} of candidates in order before they were measured"] if pairs else []


def standstill(outcome: Outcome, found: Tasks) -> list[str]:
    """What kept kernels from becoming faster, in words: how many of them, and what share of the models' time they have."""
    near: list[tuple[float, int]] = []
    done: list[tuple[float, int]] = []
    tried: list[tuple[float, int]] = []
    for p, share in zip(outcome.progress, found.share, strict=True):
        if not p.trials or p.refused or p.left_out or (p.gain or 1.0) > 1.0:
            continue
        group = near if p.at_roofline(NEAR) else done if p.exhausted else tried
        group.append((share, p.trials + p.earlier))
    out = []
    for group, what in ((near, "no more trials, as nothing can be much faster there: within a tenth of the roofline"),
                        (done, "every schedule that there is was tried, and none is faster"), (tried, "none that was tried is faster")):
        if group:
            least, most = min(n for _, n in group), max(n for _, n in group)
            each = " each" if len(group) > 1 else ""
            trials = f"{least} to {most} trials" if least < most else counted(most, "trial") + each
            out.append(f"{counted(len(group), 'kernel')} as before ({sum(s for s, _ in group):.0%} of the time; {trials}): {what}")
    return out


def show_model(name: str, m: BeforeAfter | None, console: Console) -> None:
    """A model before and after; None if nothing has changed."""
    if m is None:
        console.print(f"{name}: no schedule was found that is faster than the default ones; nothing changes", highlight=False)
        return
    table = Table("kernel", "calls", "before us", "after us", "gain", title=f"{m.name}: kernels inside the model", title_justify="left")
    for k in m.kernels:
        gain = f"{k.before / k.after:.2f}x" if k.changed else "same schedule"
        table.add_row(k.name, str(k.calls), microseconds(k.before), microseconds(k.after), gain)
    console.print(table)
    before, after = median(m.before), median(m.after)
    ratio, low, high = m.gain
    claim = f"{ratio:.2f}x (95% interval of the median: {low:.2f} to {high:.2f})"
    if low <= 1.0 <= high:
        claim = f"no difference can be told (95% interval of the median: {low:.2f}x to {high:.2f}x)"
    if m.noisy:
        claim = "no ratio is claimed: the times vary too much"
    console.print(f"{m.name}: {before * 1e3:.3f} ms before, {after * 1e3:.3f} ms after, medians of {len(m.before)} runs in turns: {claim}",
                  highlight=False)  # fmt: skip
