"""Records are written as one line of JSON and read back as they were."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.autotune.records import Measured, Status, TuningRecord
from graphopt.autotune.space import Schedule, Workload
from graphopt.errors import UsageError

RECORD = TuningRecord(
    Workload("pointwise", "graph @g(%0: f32[8]) -> f32[8] {\n  return %0\n}\n"), "0123456789abcdef", "cpu:x86_64 (a processor, 2 cores)", 2,
    Schedule.make("nest", lanes=16, tile=(4, 2), parallel=True, split="rows"), Measured(Status.OK, 1e-6, 0.02, 0.5, 1.25),
    (("tvm", "0.27.0"), ("graphopt", "0.1.0")), "run-1", 7, "2026-01-31T12:00:00Z",
)  # fmt: skip

words = st.text(max_size=8)
knobs = st.dictionaries(words, st.one_of(st.integers(), st.booleans(), words, st.lists(st.integers(), max_size=4).map(tuple)), max_size=4)
schedules = st.builds(lambda t, s, k: Schedule(t, s, tuple(sorted(k.items()))), words, words, knobs)
numbers = st.none() | st.floats()
measured = st.one_of(
    st.builds(Measured, st.just(Status.OK), st.floats(1e-9, 1e3), numbers, numbers, numbers, words),
    st.builds(Measured, st.sampled_from([s for s in Status if s is not Status.OK]), st.none(), st.none(), numbers, st.none(), words),
)
moments = st.datetimes(datetime(1000, 1, 1)).map(lambda d: f"{d:%Y-%m-%dT%H:%M:%SZ}")
records = st.builds(
    TuningRecord, st.builds(Workload, words, words), words, words, st.integers(1, 256), schedules, measured,
    st.dictionaries(words, words, max_size=3).map(lambda d: tuple(d.items())), words, st.integers(0, 10**6), moments,
)  # fmt: skip


@given(records)
def test_a_record_survives_its_json(record: TuningRecord) -> None:
    text = record.to_json()
    assert "\n" not in text
    again = TuningRecord.from_json(text)
    assert again.to_json() == text
    assert again == record and again.key == record.key


@given(measured)
def test_what_was_measured_survives_its_json(m: Measured) -> None:
    assert Measured.from_json(m.to_json()).to_json() == m.to_json()


def test_types_of_knobs_are_kept() -> None:
    knobs = dict(TuningRecord.from_json(RECORD.to_json()).schedule.knobs)
    assert [(type(knobs[n]), knobs[n]) for n in ("lanes", "parallel", "split", "tile")] == [
        (int, 16), (bool, True), (str, "rows"), (tuple, (4, 2)),
    ]  # fmt: skip


def test_versions_are_sorted_whatever_order_they_came_in() -> None:
    assert replace(RECORD, versions=RECORD.versions[::-1]).to_json() == RECORD.to_json()
    assert RECORD.versions[0][0] == "graphopt"


def test_an_error_that_is_no_number_counts_as_infinite() -> None:
    assert Measured(Status.WRONG, error=math.nan).error == math.inf
    assert Measured.from_json(Measured(Status.WRONG, error=math.nan).to_json()).error == math.inf


def test_output_that_is_no_text_can_be_a_reason() -> None:
    reason = b"segmentation fault \xff".decode(errors="surrogateescape")
    assert Measured(Status.CRASHED, reason=reason).reason.encode() == b"segmentation fault \\udcff"


@pytest.mark.parametrize("seconds", [None, 0.0, -1.0, math.inf, math.nan])
def test_what_is_ok_was_timed(seconds: float | None) -> None:
    with pytest.raises(ValueError, match="was timed"):
        Measured(Status.OK, seconds)


def changed(**fields: object) -> str:
    return json.dumps(json.loads(RECORD.to_json()) | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a line of JSON"),
        ("[]", "object was expected, not list"),
        ("{}", "has no workload"),
        (changed(extra=1), "no field extra"),
        (changed(threads="two"), "threads of a tuning record is 'two'"),
        (changed(threads=True), "threads of a tuning record is True"),
        (changed(threads=0), "threads = 0"),
        (changed(trial=1 << 63), "trial = 9223372036854775808"),
        (changed(workload={"kind": "pointwise"}), "a workload has no text"),
        (changed(schedule={"template": "nest", "sketch": "default", "knobs": {"a": 1.5}}), "knob a is 1.5"),
        (changed(measured={"status": "fine"}), "'fine' is not a valid Status"),
        (changed(measured={"status": "ok"}), "was timed"),
        (changed(measured={"status": "wrong", "sped": 1.0}), "sped"),
        (changed(versions={"tvm": 3}), "tvm of versions is 3"),
        (changed(when=""), "when of a tuning record is '', which is no moment"),
        (changed(when="2026-1-1T0:0:0Z"), "no moment such as"),
    ],
)
def test_malformed_records_are_refused_in_words(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TuningRecord.from_json(text)
