"""The picture of a tuning run: drawn from any outcome, and refused before anything is tuned where it cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from graphopt.autotune.measure import Built, Incumbent, Subject
from graphopt.autotune.records import Measured, Status
from graphopt.autotune.space import Schedule, Workload
from graphopt.autotune.tasks import Progress, Task
from graphopt.autotune.tuner import Outcome
from graphopt.bench.limits import Limits
from graphopt.cli.tune_plot import check_plot, plot
from graphopt.errors import UsageError
from graphopt.tuning_tasks import Tasks
from tests.autotune.test_scheduler import NoSearch

pytest.importorskip("matplotlib")
LIMITS = Limits(433e9, 30e9, 2, 1 << 30)


def outcome(n: int, seed: int = 0) -> tuple[Outcome, Tasks]:
    """A run of n tasks, some without arithmetic, some whose weights stay in a cache, one never tried, one whose default fails."""
    rng, found, progress = Random(seed), Tasks(), []
    for i in range(n):
        flops = 10 ** rng.uniform(6, 9) if i % 4 else 0.0
        read = flops / 10 ** rng.uniform(0, 3) if i % 3 else 0.0
        least = max(flops / LIMITS.flops, read / LIMITS.bytes, 1e-6)
        default = least * rng.uniform(1.2, 4)
        subject = Subject(Workload("matmul", str(i)), lambda seed: pytest.fail("no case is needed"), least=least)
        name = f"matmul 32x{1024 + i} * 1024x4096; add, gelu"
        task = Task(subject, name, Schedule.make("t"), 1, default, default * 1.3, flops, read)
        p = Progress(task, NoSearch())
        if i != 4:
            p.default = Measured(Status.OK, default) if i != 5 else Measured(Status.CRASHED)
            at, best = rng.uniform(1, 20), default
            p.curve.append((at, best))
            while at < 90 and best > 1.1 * least:
                p.curve.append((at, best))
                at, best = at + rng.expovariate(0.1), max(least, best * rng.uniform(0.85, 0.999))
            p.incumbent = Incumbent(Built(task.default), p.curve[-1][1])
        progress.append(p)
        found.tasks.append(task)
        found.share.append(2.0 ** -(i + 1))
    return Outcome("budget", progress, 100.0, 400), found


@pytest.mark.parametrize(("n", "limits"), [(1, LIMITS), (4, None), (16, LIMITS), (4, replace(LIMITS, tiles=5e12))])
def test_a_picture_is_drawn(n: int, limits: Limits | None, tmp_path: Path) -> None:
    file = tmp_path / "out.png"
    check_plot(file)
    run, found = outcome(n)
    plot(run, found, limits, "bert", file)
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 20_000


def test_nothing_was_tried(tmp_path: Path) -> None:
    run, found = outcome(3)
    for p in run.progress:
        p.default, p.curve, p.incumbent = None, [], None
    plot(run, found, LIMITS, "mlp", tmp_path / "out.svg")
    assert "<svg" in (tmp_path / "out.svg").read_text()


@pytest.mark.parametrize(("name", "word"), [("out", "no suffix"), ("out.xyz", "no format"), ("nowhere/out.png", "no folder"),
                                            ("folder.png", "is a folder; write .*folder.png/out.png")])  # fmt: skip
def test_a_picture_that_cannot_be_is_refused(name: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match=word):
        check_plot(tmp_path / name)
