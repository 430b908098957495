"""Which records of a tuning database may go, so that nothing else changes: what compilations use, and what is known to be bad.

The leader of each group of comparable records stays whatever is asked, and so do the trial that its gain is told over and those that
make it the leader: where the rest would elect another one, the group is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from graphopt.autotune.database import Versions, begun_with, leader
from graphopt.autotune.records import TuningRecord

PACKAGES = ("tvm", "triton")  # of backends: whose records they are


@dataclass(frozen=True)
class Prune:
    """What may go: whatever one of these names.

    Attributes:
        keep: of each group all but so many of the fastest trials.
        failed: trials that failed, of schedules that never went well: they may be tried, and fail, again.
        before: trials from before a moment (UTC, ISO 8601).
        versions: if given, those that count, one a backend: all records of others, leaders included, may go; they only serve as seeds.
            What a backend made of which nothing is said (it is not installed) stays.
    """

    keep: int | None = None
    failed: bool = False
    before: str = ""
    versions: Sequence[Versions] | None = None


def outdated(made: Versions, now: Sequence[Versions]) -> bool:
    """Whether records of these versions do not count any more: their backend has others now."""
    package = [p for p in PACKAGES if p in dict(made)]
    others = [dict(v) for v in now if any(p in dict(v) for p in package)]
    return bool(others) and dict(made) not in others


def superfluous(records: Iterable[TuningRecord], what: Prune) -> list[TuningRecord]:
    """The records that may go, in the order of the database."""
    out: list[TuningRecord] = []
    ordered = sorted(records, key=lambda r: (_group(r), r.when, r.run, r.trial, r.key))
    for _, group in groupby(ordered, _group):
        out += _of_group(list(group), what)
    return out


def _group(r: TuningRecord) -> tuple[str, str, int, Versions]:
    return r.workload.key, r.target, r.threads, r.versions


def _of_group(group: Sequence[TuningRecord], what: Prune) -> list[TuningRecord]:
    """Those of records that may be compared, in the order in which they were measured."""
    if what.versions is not None and outdated(group[0].versions, what.versions):
        return list(group)
    lead = leader([(r.schedule, r.measured, r.run) for r in group])
    used = () if lead is None else (group[lead], begun_with(group[lead], group))
    sound = dict.fromkeys(r.schedule for r in group if r.measured.ok)
    fastest = sorted((r for r in group if r.measured.ok), key=lambda r: r.measured.seconds or 0.0)
    kept = dict.fromkeys(r.key for r in (fastest if what.keep is None else fastest[: what.keep]))
    going = [
        r for r in group if r not in used and (
            (what.failed and not r.measured.ok and r.schedule not in sound)
            or (what.keep is not None and r.measured.ok and r.key not in kept)
            or r.when < what.before)
    ]  # fmt: skip
    gone = dict.fromkeys(r.key for r in going)
    rest = [r for r in group if r.key not in gone]
    after = leader([(r.schedule, r.measured, r.run) for r in rest])
    same = after is None if lead is None else after is not None and rest[after].key == group[lead].key
    return going if same else []
