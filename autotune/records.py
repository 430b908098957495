"""What a tuner learns: Measured (what trying one candidate gave) and TuningRecord (that, with all that it holds for).

Both are written as one line of JSON with sorted keys, so that equal records are equal text, and a folder of exported records
can be compared line by line.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from enum import Enum
from functools import cached_property
from typing import Any

from graphopt.autotune.space import Knob, Schedule, Workload
from graphopt.errors import UsageError


class Status(str, Enum):
    """How trying a candidate ended. Only an ``OK`` one is ever used."""

    OK = "ok"
    BUILD_FAILED = "build-failed"
    CRASHED = "crashed"
    TIMED_OUT = "timed-out"
    WRONG = "wrong"
    LEAKED = "leaked"
    INCREDIBLE = "incredible"
    LOST = "lost"  # the machine that it ran on, with or without its doing
    DISTURBED = "disturbed"  # its threads waited for processors: no time is known

    def __str__(self) -> str:
        return self.value


_FOR_NAN = {"seconds": None, "spread": None, "error": math.inf, "gain": None, "build_seconds": 0.0, "trial_seconds": 0.0}


@dataclass(frozen=True)
class Measured:
    """What trying one candidate gave.

    Attributes:
        status: how it ended.
        seconds: median time of a call; always there if ``OK``.
        spread: (p90 - p10) / median of the calls.
        error: the largest difference to the f64 result, as the gate counts it; ``inf`` where that is no number.
        gain: the incumbent's median / its own, the two timed in alternation.
        reason: in words, why it is not ``OK``.
        build_seconds, trial_seconds: what building it, and all of the trial, cost.
    """

    status: Status
    seconds: float | None = None
    spread: float | None = None
    error: float | None = None
    gain: float | None = None
    reason: str = ""
    build_seconds: float = 0.0
    trial_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.status is Status.OK and not (self.seconds is not None and 0 < self.seconds < math.inf):
            raise ValueError(f"a candidate that is ok was timed; seconds = {self.seconds}")
        for name, for_nan in _FOR_NAN.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _plain(value, for_nan))
        object.__setattr__(self, "reason", self.reason.encode(errors="backslashreplace").decode())  # may quote any program's output

    @property
    def ok(self) -> bool:
        return self.status is Status.OK

    @property
    def says_nothing(self) -> bool:
        """Whether it says nothing of the candidate."""
        return self.status in (Status.LOST, Status.DISTURBED)

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, without the numbers that are not known."""
        numbers = {k: v for k, v in asdict(self).items() if k not in ("status", "reason") and v is not None}
        return {"status": self.status.value, "reason": self.reason, **{k: _number_out(v) for k, v in numbers.items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Measured:
        """The inverse of ``to_dict``. Raises UsageError for what it never writes."""
        try:
            rest: dict[str, Any] = {k: v if k == "reason" else _number_in(v) for k, v in data.items() if k != "status"}
            return Measured(Status(data["status"]), **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{dict(data)!r} is not what trying a candidate gives: {error}") from None

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Measured:
        """The inverse of ``to_json``. Raises UsageError."""
        return Measured.from_dict(_object(text))


@dataclass(frozen=True)
class TuningRecord:
    """One trial, with all that its result depends on.

    Attributes:
        target: fingerprint of the device (``Target.fingerprint``); ``device``: the same for people.
        threads: how many a call of the kernel used.
        versions: (name, version) of all that makes the kernel: graphopt, tvm or triton, hash of the backend's sources; sorted.
        run: id of the tuning run; ``trial``: number in that run.
        when: UTC, ISO 8601, such as ``2026-01-31T12:00:00Z``.
    """

    workload: Workload
    target: str
    device: str
    threads: int
    schedule: Schedule
    measured: Measured
    versions: tuple[tuple[str, str], ...] = ()
    run: str = ""
    trial: int = 0
    when: str = ""

    def __post_init__(self) -> None:
        if self.threads < 1 or not 0 <= self.trial < 1 << 63:
            raise ValueError(f"threads = {self.threads} and trial = {self.trial} cannot be")
        object.__setattr__(self, "versions", tuple(sorted(self.versions)))

    @cached_property
    def key(self) -> str:
        """SHA-256 of the record, 32 hex digits: equal records are one record, wherever they were."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]

    def to_json(self) -> str:
        """One line."""
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        data["workload"] = {"kind": self.workload.kind, "text": self.workload.text}
        data["schedule"] = json.loads(self.schedule.to_json())
        data["measured"] = self.measured.to_dict()
        data["versions"] = dict(self.versions)
        return json.dumps(data, sort_keys=True, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> TuningRecord:
        """The inverse of ``to_json``. Raises UsageError that says what is wrong."""
        data = _object(text)
        _expect(data, _TYPES, "a tuning record")
        _expect(data["workload"], {"kind": str, "text": str}, "a workload")
        _expect(data["versions"], dict.fromkeys(data["versions"], str), "versions")
        data["workload"] = Workload(**data["workload"])
        data["schedule"] = schedule_from(data["schedule"])
        data["measured"] = Measured.from_dict(data["measured"])
        data["versions"] = tuple(data["versions"].items())
        _expect_moment(data["when"])
        try:
            return TuningRecord(**data)
        except ValueError as error:
            raise UsageError(f"not a tuning record: {error}") from None


def schedule_from(data: Mapping[str, Any]) -> Schedule:
    """A schedule from what ``Schedule.to_json`` writes, read as JSON. Raises UsageError for anything else."""
    _expect(data, {"template": str, "sketch": str, "knobs": dict}, "a schedule")
    knobs = {name: _knob(name, value) for name, value in data["knobs"].items()}
    return Schedule(data["template"], data["sketch"], tuple(sorted(knobs.items())))


_MOMENT = "%Y-%m-%dT%H:%M:%SZ"
_TYPES: dict[str, type] = {
    "workload": dict, "target": str, "device": str, "threads": int, "schedule": dict, "measured": dict, "versions": dict,
    "run": str, "trial": int, "when": str,
}  # fmt: skip


def _object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UsageError(f"not a line of JSON: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"a JSON object was expected, not {type(data).__name__}")
    return data


def _expect(data: Mapping[str, Any], kinds: Mapping[str, type], what: str) -> None:
    """Raises UsageError unless the object has exactly these fields, of these types."""
    if missing := [k for k in kinds if k not in data]:
        raise UsageError(f"{what} has no {', '.join(missing)}")
    if unknown := [k for k in data if k not in kinds]:
        raise UsageError(f"{what} has no field {', '.join(unknown)}")
    for name, kind in kinds.items():
        if not isinstance(data[name], kind) or (kind is int and isinstance(data[name], bool)):
            raise UsageError(f"{name} of {what} is {data[name]!r}, which is no {kind.__name__}")


def _expect_moment(text: str) -> None:
    """Raises UsageError unless it is written as :attr:`TuningRecord.when` is: so that later ones are greater texts."""
    try:
        same = datetime.strptime(text, _MOMENT).strftime(_MOMENT) == text
    except ValueError:
        same = False
    if not same:
        raise UsageError(f"when of a tuning record is {text!r}, which is no moment such as 2026-01-31T12:00:00Z")


def _knob(name: str, value: Any) -> Knob:
    if isinstance(value, list) and all(type(v) is int for v in value):
        return tuple(value)
    if isinstance(value, int | str | bool):
        return value
    raise UsageError(f"knob {name} is {value!r}, which no knob can be")


def _plain(value: float, for_nan: float | None) -> float | None:
    """A number that equals itself, and is the same after any journey: neither NaN nor -0.0, and of no other type than float."""
    return for_nan if math.isnan(value) else float(value) + 0.0


def _number_out(value: float) -> float | str:
    """A word for infinity, which JSON does not have."""
    return value if math.isfinite(value) else str(value)


def _number_in(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no number")
    return float(value)
