"""The tuning database: what is best, what is a seed, and that nothing is found where it does not belong."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from db_check import ELSEWHERE, HERE, NOW, OLD, record, workload
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.autotune.database import Database, leader
from graphopt.autotune.records import Measured, Status, TuningRecord
from graphopt.autotune.similar import distance, sizes, structure
from graphopt.autotune.space import Schedule, Workload

FAILURES = [s for s in Status if s is not Status.OK]


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database(tmp_path / "deep" / "tuning.db")


def unrolls(schedules: list[Schedule]) -> list[int]:
    return [s["unroll"] for s in schedules]


def best(db: Database, **where: object) -> int | None:
    found = db.best(workload(), **({"target": HERE, "threads": 2, "versions": NOW} | where))  # type: ignore[arg-type]
    return None if found is None else found.schedule["unroll"]


# --- records -----------------------------------------------------------------------------------------------------------


def test_without_a_file_everything_is_empty_and_none_is_made(db: Database) -> None:
    assert db.records() == [] and best(db) is None and db.seeds(workload(), HERE, 2, NOW) == []
    assert db.load_model("any") is None and db.models() == []
    assert not db.path.parent.exists()


def test_an_empty_file_is_an_empty_database(db: Database) -> None:
    db.path.parent.mkdir()
    db.path.touch()
    assert db.records() == [] and best(db) is None
    assert db.add([record()]) == 1 and best(db) == 0


def test_records_come_back_as_they_were(db: Database) -> None:
    given = [record(i, status=s) for i, s in enumerate(Status)]
    given.append(replace(record(9), measured=Measured(Status.WRONG, error=float("inf"), reason="it's \"wrong\"\n\0")))
    assert db.add(given) == len(given)
    assert db.records() == given


def test_the_same_record_is_kept_once(db: Database) -> None:
    assert db.add([record(1), record(1), record(2)]) == 2
    assert db.add([record(2), record(3)]) == 1
    assert len(db.records()) == 3


def test_records_of_some_kind_only(db: Database) -> None:
    others = [record(1, target=ELSEWHERE), record(2, threads=1), record(3, versions=OLD), record(4, run="run-2"), record(5, rows=16)]
    db.add([record(0), *others])
    for where, left_out in zip(({"target": HERE}, {"threads": 2}, {"versions": NOW}, {"run": "run-1"}, {"workload": workload()}), others):
        found = db.records(**where)  # type: ignore[arg-type]
        assert len(found) == 5 and left_out not in found


def test_an_error_within_a_transaction_leaves_nothing(db: Database) -> None:
    db.add([record(0)])

    def broken() -> object:
        yield record(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        db.add(broken())  # type: ignore[arg-type]
    assert db.records() == [record(0)]
    assert db.add([record(2)]) == 1  # and no lock stays


# --- the best ----------------------------------------------------------------------------------------------------------


def test_the_fastest_is_the_best_and_only_of_this_device_threads_and_versions(db: Database) -> None:
    strangers = [record(1, 1e-9, target=ELSEWHERE), record(2, 1e-9, threads=1), record(3, 1e-9, versions=OLD), record(4, 1e-9, rows=16)]
    db.add(strangers)
    assert best(db) is None
    db.add([record(5, 3e-6), record(6, 2e-6), record(7, 4e-6)])
    assert best(db) == 6
    assert best(db, target=ELSEWHERE) == 1 and best(db, threads=1) == 2 and best(db, versions=OLD) == 3
    assert best(db, versions=NOW[::-1]) == 6, "the order of versions means nothing"


@pytest.mark.parametrize("status", FAILURES)
def test_what_failed_is_never_the_best(db: Database, status: Status) -> None:
    db.add([record(1, status=status)])
    assert best(db) is None
    db.add([record(2, 5e-6), record(3, status=status)])
    assert best(db) == 2
    db.add([record(4, status=status, unroll=2)])  # the one that was ok, tried once more
    if status is Status.DISTURBED:  # which says nothing of it
        assert best(db) == 2
        return
    assert best(db) is None


def test_many_at_once(db: Database) -> None:
    db.add([record(i, 1e-6 / (1 + i % 3), rows=8 + i // 3) for i in range(1800)])
    found = db.best_of([workload(rows) for rows in range(8, 700)], HERE, 2, NOW)
    assert len(found) == 600 and all(r.workload == w and r.trial % 3 == 2 for w, r in found.items())


def test_removing_the_best_leaves_the_second(db: Database) -> None:
    records = [record(1, 3e-6), record(2, 1e-6), record(3, 2e-6), record(4, rows=16)]
    db.add(records)
    assert db.remove([records[1].key, "no such key"]) == 1
    assert best(db) == 3
    assert db.remove(r.key for r in records) == 3
    assert best(db) is None and db.records() == []


def test_records_are_replaced_all_or_none(db: Database) -> None:
    first, second, third = record(1, 3e-6), record(2, 1e-6), record(3, 2e-6)
    db.add([first, second])

    def some() -> Iterator[TuningRecord]:
        yield third
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        db.replace([second.key], some())
    assert db.records() == [first, second] and best(db) == 2
    assert db.replace([second.key, "no such key"], [third]) == 1
    assert db.records() == [first, third] and best(db) == 3


def ok(seconds: float, gain: float | None = None) -> Measured:
    return Measured(Status.OK, seconds, gain=gain)


A, B, C = (Schedule.make("nest", unroll=u) for u in (1, 2, 3))
WRONG = Measured(Status.WRONG)


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([], None),
        ([(A, WRONG, "1")], None),
        ([(A, ok(3), "1"), (B, ok(2), "1"), (C, ok(2.5), "1")], 1),
        # in alternation B beat A, however slow the machine was by then
        ([(A, ok(3), "1"), (B, ok(5, 1.2), "1")], 1),
        ([(A, ok(3), "1"), (B, ok(2, 0.9), "1")], 0),
        ([(A, ok(3), "1"), (B, ok(5, 1.2), "1"), (C, ok(4, 0.8), "1")], 1),
        # another run had another incumbent: seconds are all there is
        ([(A, ok(3), "1"), (B, ok(5, 1.2), "2")], 0),
        ([(A, ok(3), "1"), (B, ok(2), "2")], 1),
        ([(A, ok(3), "1"), (B, ok(2, 0.8), "2")], 0),
        # unless it measured the leader again
        ([(A, ok(3), "1"), (A, ok(6, 1.0), "2"), (B, ok(5, 1.2), "2")], 2),
        # and what lost to it, or by how little, says nothing then
        ([(A, ok(10), "1"), (B, ok(9.9, 1.01), "1"), (A, ok(10), "2"), (B, ok(12, 0.83), "2"), (C, ok(11, 0.9), "2")], 2),
        # a chain that begins anew, as its incumbent could not be built again, is another one
        ([(A, ok(8), "1"), (B, ok(20), "1"), (C, ok(15, 1.33), "1")], 0),
        # what never won leads no other run
        ([(A, ok(10), "1"), (B, ok(9), "2"), (C, ok(7, 0.99), "2")], 1),
        # the last trial of a schedule is what counts
        ([(A, ok(3), "1"), (A, ok(6), "2"), (B, ok(5), "3")], 2),
        ([(A, ok(3), "1"), (B, ok(5), "1"), (A, WRONG, "2")], 1),
        ([(A, ok(3), "1"), (A, WRONG, "1"), (A, ok(4), "1")], 2),
        # but not where other processes were in the way
        ([(A, ok(3), "1"), (B, ok(2, 1.5), "1"), (B, Measured(Status.DISTURBED), "2"), (A, ok(3), "2")], 1),
    ],
)
def test_the_leader(trials: list[tuple[Schedule, Measured, str]], expected: int | None) -> None:
    assert leader(trials) == expected


def test_the_best_does_not_depend_on_the_order_in_which_records_arrive(tmp_path: Path) -> None:
    records = [record(i, 1e-6 * (5 - i), gain, when=f"2026-01-31T12:00:0{i}Z") for i, gain in enumerate([None, 1.1, 0.9, 1.2])]
    for n, order in enumerate(itertools.islice(itertools.permutations(records), 0, None, 3)):
        db = Database(tmp_path / f"{n}.db")
        for r in order:
            db.add([r])
        assert best(db) == 3


# --- seeds -------------------------------------------------------------------------------------------------------------


def test_seeds_in_order(db: Database) -> None:
    db.add([
        record(1), record(2, versions=OLD), record(3, threads=1), record(4, target=ELSEWHERE), record(5, rows=16), record(6, rows=64),
        record(7, op="exp"), record(8, rows=16, target=ELSEWHERE), record(9, rows=9, status=Status.WRONG), record(10, rows=4, threads=1),
    ])  # fmt: skip
    assert unrolls(db.seeds(workload(), HERE, 2, NOW)) == [2, 3, 4, 5, 10, 6]
    assert unrolls(db.seeds(workload(), HERE, 2, NOW, limit=2)) == [2, 3]
    assert unrolls(db.seeds(workload(op="exp"), ELSEWHERE, 2, NOW)) == [7]
    assert db.seeds(workload(op="tanh"), HERE, 2, NOW) == []


def test_the_same_schedule_is_a_seed_once(db: Database) -> None:
    db.add([record(1, unroll=4, versions=OLD), record(2, unroll=4, target=ELSEWHERE), record(3, unroll=4, rows=16)])
    assert unrolls(db.seeds(workload(), HERE, 2, NOW)) == [4]


MATMUL = """graph @g(%arg0: f32[M, 64; 64, 1], %arg1: f32[64, 96]) -> f32[M, 96]
where 1 <= M <= 64 {
  %0: f32[M, 96] = matmul(%arg0, %arg1)
  %1: f32[M, 2, 48] = reshape(%0) {shape = [M, 2, 48]}
  %2: f32[2, M, 48] = transpose(%1) {perm = [1, 0, 2]}
  %3: f32[2, M, 48] = pow(%2) {exponent = 2.5}
  return %3
}
"""


def test_structure_is_the_text_without_sizes() -> None:
    a = Workload("matmul", MATMUL)
    other = MATMUL
    for old, new in (("64", "128"), ("96", "30"), ("48", "15")):
        other = other.replace(old, new)
    b = Workload("matmul", other)
    assert structure(a) == structure(b) and sizes(a) != sizes(b)
    assert "perm = [1, 0, 2]" in structure(a) and "shape = [M, #, #]" in structure(a) and "where # <= M <= # {" in structure(a)
    assert "f32[M, #; #, #]" in structure(a) and "exponent = 2.5" in structure(a) and "%arg1" in structure(a)
    for changed in (MATMUL.replace("[1, 0, 2]", "[2, 0, 1]"), MATMUL.replace("f32", "f16"), MATMUL.replace("2.5", "3.5")):
        assert structure(Workload("matmul", changed)) != structure(a)
    assert structure(Workload("rowwise", MATMUL)) != structure(a)


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 20))
def test_distance_is_symmetric_and_counts_doublings(a: int, b: int) -> None:
    x, y = workload(a), workload(b)
    assert distance(x, y) == pytest.approx(distance(y, x)) and (distance(x, y) == 0) == (a == b)
    assert distance(x, workload(2 * a)) == pytest.approx(distance(workload(2 * a), workload(4 * a)))


# --- models ------------------------------------------------------------------------------------------------------------


def test_models_are_kept_by_name(db: Database) -> None:
    data = bytes(range(256)) * 1000
    db.save_model("a", b"old")
    db.save_model("a", data)
    db.save_model("b", b"")
    assert db.load_model("a") == data and db.load_model("b") == b"" and db.load_model("c") is None
    assert [(name, size) for name, size, _ in db.models()] == [("a", len(data)), ("b", 0)]


# --- any records at all ------------------------------------------------------------------------------------------------


def test_odd_paths(tmp_path: Path) -> None:
    for name in ("with space", "q?mode=ro#f%41", "ünï", "; DROP TABLE records"):
        db = Database(tmp_path / name / "x.db")
        db.add([record()])
        assert db.path.exists() and Database(db.path).records() == [record()]


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Database(Path("tuning.db")).add([record()])
    assert (tmp_path / "tuning.db").exists()


words = st.text(max_size=8)
small = st.floats(0, 9)
odd = st.builds(
    TuningRecord, st.builds(Workload, words, words), words, words, st.integers(1, 256),
    st.dictionaries(words, st.integers() | st.booleans() | words | st.lists(st.integers(), max_size=3).map(tuple), max_size=3)
    .map(lambda k: Schedule("t", "s", tuple(sorted(k.items())))),
    st.builds(Measured, st.just(Status.OK), st.floats(1e-9, 1e3), st.floats(), st.floats(), st.floats(), words, small, small),
    st.dictionaries(words, words, max_size=2).map(lambda d: tuple(d.items())), words, st.integers(0, (1 << 63) - 1), words,
)  # fmt: skip


@settings(max_examples=50)
@given(st.lists(odd, max_size=5))
def test_any_records_come_back(tmp_path_factory: pytest.TempPathFactory, records: list[TuningRecord]) -> None:
    db = Database(tmp_path_factory.mktemp("any") / "t.db")
    db.add(records)
    assert sorted(r.to_json() for r in db.records()) == sorted({r.to_json() for r in records})
