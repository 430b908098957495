"""What may go from a tuning database: never what compilations use, nor what is known to be bad."""

from __future__ import annotations

from dataclasses import replace

from db_check import NOW, OLD, record
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.autotune.database import leader
from graphopt.autotune.prune import Prune, superfluous
from graphopt.autotune.records import Status, TuningRecord


def going(records: list[TuningRecord], **what: object) -> list[int]:
    return sorted(r.trial for r in superfluous(records, Prune(**what)))  # type: ignore[arg-type]


def test_all_but_the_fastest_go_and_the_best_stays_with_what_it_is_faster_than() -> None:
    run = [record(1, 9e-6), record(2, 5e-6, 1.8), record(3, 4.9e-6, 1.0), record(4, 7e-6, 0.7), record(5, 8e-6, 0.6)]
    assert going(run, keep=2) == [4, 5]
    assert going(run, keep=1) == [4, 5], "the fastest by the clock is not the best, which won in turns; both stay"
    other = [record(6, 8e-6, run="run-2"), record(7, 6e-6, 1.3, run="run-2")]
    assert going([*run, *other], keep=1) == [4, 5, 6, 7], "of another run than that of the best"


def test_each_workload_device_and_version_counts_for_itself() -> None:
    records = [record(1), record(2, rows=16), record(3, target="another"), record(4, threads=1), record(5, versions=OLD)]
    assert going(records, keep=1) == []


def test_failures_go_unless_the_schedule_went_well_once() -> None:
    records = [record(1, 9e-6), record(2, status=Status.CRASHED), record(3, 5e-6, 2.0, unroll=7),
               record(4, status=Status.WRONG, unroll=7, when="2026-02-01T00:00:00Z")]  # fmt: skip
    assert going(records, failed=True) == [2]


def test_old_trials_go_but_not_the_best() -> None:
    old = "2025-12-31T00:00:00Z"
    records = [record(1, 9e-6, when=old), record(2, 5e-6, 1.8, when=old), record(3, 9e-6, 0.5, when=old), record(4, 9e-6, 0.5)]
    assert going(records, before="2026-01-01T00:00:00Z") == [3]


def test_other_versions_go_whole() -> None:
    records = [record(1), record(2, versions=OLD), record(3, 2e-6, versions=OLD)]
    assert going(records, versions=[NOW]) == [2, 3]
    assert going(records, versions=[tuple(reversed(NOW))]) == [2, 3]


def test_versions_are_of_a_backend_by_its_package_whatever_else_they_name() -> None:
    more = (*NOW, ("tvm-ffi", "0.1.0"))
    assert going([record(1), record(2, versions=more)], versions=[more]) == [1], "of another graphopt, which named fewer"
    triton = (("graphopt", "0.1.0"), ("triton", "3.0.0"))
    assert going([record(1, versions=triton)], versions=[NOW]) == [], "a backend of which nothing is said"
    assert going([record(1, versions=triton)], versions=[NOW, (*triton, ("triton backend source", "0"))]) == [1]


trial = st.builds(
    record, trial=st.integers(0, 99), seconds=st.sampled_from([1e-6, 2e-6, 3e-6]), gain=st.sampled_from([None, 0.5, 1.0, 1.5]),
    unroll=st.integers(0, 5), status=st.sampled_from([Status.OK, Status.OK, Status.WRONG]), run=st.sampled_from(["a", "b"]),
    when=st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]),
)  # fmt: skip


@given(st.lists(trial, unique_by=lambda r: r.key, max_size=12), st.integers(1, 3), st.booleans(), st.sampled_from(["", "2026-01-02"]))
@settings(max_examples=300, deadline=None)
def test_the_best_record_is_the_same_afterwards(records: list[TuningRecord], keep: int, failed: bool, before: str) -> None:
    records = sorted(records, key=lambda r: (r.when, r.run, r.trial, r.key))

    def best(some: list[TuningRecord]) -> TuningRecord | None:
        found = leader([(r.schedule, r.measured, r.run) for r in some])
        return None if found is None else some[found]

    gone = {r.key for r in superfluous(records, Prune(keep, failed, before))}
    assert best([r for r in records if r.key not in gone]) == best(records), [replace(r) for r in records]
