"""The tuning database: every trial that was ever made, and for each workload the schedule to use.

One row a trial; a trial that failed is as good to know as one that went well. A record is used only where all holds that it was
measured under: device, threads, versions. What was found elsewhere is offered as a seed, to be measured again.

Reference: TVM's MetaSchedule database, which looks up by workload alone and so mixes devices (apache/tvm issue 15549); Triton's
cache of autotuning results, a file for each set of configurations, which a change of the set throws away (triton-lang/triton
issue 9822). Here a trial stands for itself, and its row carries everything that it depends on.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from graphopt.autotune.records import Measured, Status, TuningRecord, schedule_from
from graphopt.autotune.similar import distance, structure
from graphopt.autotune.space import Schedule, Workload
from graphopt.autotune.sqlite import File
from graphopt.errors import DatabaseError, UsageError
from graphopt.files import unwritable

Versions = tuple[tuple[str, str], ...]

_GROUP = ("workload", "target", "threads", "versions")  # within a group, records may be compared
_MEASURED = ("seconds", "spread", "error", "gain", "reason", "build_seconds", "trial_seconds")
_COLUMNS = (*_GROUP, "key", "device", "schedule", "status", *_MEASURED, "run", "trial", "at")
_SELECT = f"SELECT {', '.join(f'r.{c}' for c in _COLUMNS)}, w.kind, w.text FROM records r JOIN workloads w ON w.id = r.workload"
_BEST = "JOIN best b ON b.record = r.id AND b.workload = w.id"
_MANY = 500  # keys in one statement: SQLite takes at least 999 parameters


class Database:
    """Tuning records in an SQLite file. Any number of processes may use it at once.

    Args:
        path: the file; made by the first ``add``. While there is none, everything is empty, for the price of a ``stat``.
        timeout: seconds to wait for other processes that write.

    All methods raise:
        UsageError: the file is no tuning database, or one of a newer graphopt.
        DatabaseError: it is damaged (:class:`~graphopt.autotune.sqlite.Damaged`), or cannot be read or written.
    """

    def __init__(self, path: Path, timeout: float = 30.0) -> None:
        self.path = Path(path)
        self._file = File(self.path, timeout)

    def check_writable(self) -> None:
        """Before anything is measured that could not be kept. Raises DatabaseError; nothing is written."""
        if why := unwritable(self.path):
            raise DatabaseError(f"tuning database {self.path} cannot be written: {why}")

    # --- records -------------------------------------------------------------------------------------------------------

    def add(self, records: Iterable[TuningRecord]) -> int:
        """Add records: all of them, or on an error none. When this returns they are on the disk.

        Returns:
            How many were new; a record that is there already is left alone.
        """
        with self._file.writing() as c:
            added = _insert(c, records)
            for group in dict.fromkeys(added):
                _choose_best(c, group)
            return len(added)

    def remove(self, keys: Iterable[str]) -> int:
        """Remove records by ``TuningRecord.key``; returns how many there were."""
        return self.replace(keys, ())

    def replace(self, keys: Iterable[str], records: Iterable[TuningRecord]) -> int:
        """Remove records by key and add others, both or neither; returns how many were removed."""
        with self._file.writing() as c:
            groups: dict[tuple[Any, ...], None] = {}
            removed = 0
            for key in keys:
                if group := c.execute(f"SELECT {', '.join(_GROUP)} FROM records WHERE key = ?", (key,)).fetchone():
                    c.execute("DELETE FROM records WHERE key = ?", (key,))
                    removed += 1
                    groups[group] = None
            groups.update(dict.fromkeys(_insert(c, records)))
            for group in groups:
                _choose_best(c, group)
            c.execute("DELETE FROM workloads WHERE id NOT IN (SELECT workload FROM records)")
            return removed

    def records(self, workload: Workload | None = None, target: str | None = None, threads: int | None = None,
                versions: Versions | None = None, run: str | None = None) -> list[TuningRecord]:  # fmt: skip
        """Records in the order in which they were measured; of one workload, device fingerprint ... if given."""
        given = {"w.key": workload and workload.key, "r.target": target, "r.threads": threads,
                 "r.versions": None if versions is None else _versions(versions), "r.run": run}  # fmt: skip
        chosen = {k: v for k, v in given.items() if v is not None}
        where = " AND ".join(f"{k} = ?" for k in chosen) or "TRUE"
        return self._select(f"WHERE {where} ORDER BY r.at, r.run, r.trial, r.key", list(chosen.values()))

    # --- what to use ---------------------------------------------------------------------------------------------------

    def best(self, w: Workload, target: str, threads: int, versions: Versions) -> TuningRecord | None:
        """The record to use for a workload on this device, with these threads and versions; see :func:`leader`."""
        return self.best_of([w], target, threads, versions).get(w)

    def best_of(self, workloads: Iterable[Workload], target: str, threads: int, versions: Versions) -> dict[Workload, TuningRecord]:
        """``best`` of many workloads at once."""
        wanted = {w.key: w for w in workloads}
        keys = list(wanted)
        found: list[TuningRecord] = []
        for i in range(0, len(keys), _MANY):
            part = keys[i : i + _MANY]
            marks = ", ".join("?" * len(part))
            found += self._select(f"{_BEST} WHERE w.key IN ({marks}) AND b.target = ? AND b.threads = ? AND b.versions = ?",
                                  [*part, target, threads, _versions(versions)])  # fmt: skip
        return {wanted[r.workload.key]: r for r in found if wanted[r.workload.key] == r.workload}

    def seconds_of(self, trials: Iterable[tuple[Workload, Schedule, str]], target: str, threads: int, versions: Versions
                   ) -> dict[Workload, float]:  # fmt: skip
        """Median seconds of one schedule of each workload, as measured in some run; without those that were not, or failed."""
        wanted = list(trials)
        out: dict[Workload, float] = {}
        with self._file.reading() as c:
            for i in range(0, len(wanted) if c else 0, _MANY // 3):
                part = wanted[i : i + _MANY // 3]
                values = [x for n, (w, s, run) in enumerate(part) for x in (n, w.key, s.to_json(), run)]
                rows = c.execute(  # type: ignore[union-attr]  # no connection, no iteration
                    f"WITH wanted (n, key, schedule, run) AS (VALUES {', '.join(['(?, ?, ?, ?)'] * len(part))}) "
                    "SELECT wanted.n, r.seconds FROM wanted JOIN workloads w ON w.key = wanted.key JOIN records r "
                    "ON r.workload = w.id AND r.schedule = wanted.schedule AND r.run = wanted.run "
                    "WHERE r.target = ? AND r.threads = ? AND r.versions = ? AND r.status = 'ok' ORDER BY r.at, r.trial",
                    [*values, target, threads, _versions(versions)],
                )
                out.update((part[n][0], seconds) for n, seconds in rows)
        return out

    def elsewhere(self, workloads: Iterable[Workload]) -> dict[Workload, list[TuningRecord]]:
        """For each workload the best records of all devices, thread counts and versions, newest first."""
        wanted = {w.key: w for w in workloads}
        keys, out = list(wanted), dict[Workload, list[TuningRecord]]()
        for i in range(0, len(keys), _MANY):
            part = keys[i : i + _MANY]
            marks = ", ".join("?" * len(part))
            for r in self._select(f"{_BEST} WHERE w.key IN ({marks}) ORDER BY r.at DESC, r.key", part):
                out.setdefault(wanted[r.workload.key], []).append(r)
        return out

    def seeds(self, w: Workload, target: str, threads: int, versions: Versions, limit: int = 16) -> list[Schedule]:
        """Schedules worth measuring first; nothing is known of them here, and some may lie outside of the space.

        In this order: the same workload on this device (other versions, then other threads), on other devices, then similar
        workloads on this device, the nearest sizes first (:mod:`graphopt.autotune.similar`).
        """
        same = self.elsewhere([w]).get(w, [])
        here = [r for r in same if r.target == target and (r.threads, r.versions) != (threads, tuple(sorted(versions)))]
        here.sort(key=lambda r: r.threads != threads)  # stable: newest first stays
        there = [r for r in same if r.target != target]
        alike = self._select(f"{_BEST} WHERE w.structure = ? AND b.target = ? ORDER BY r.at DESC, r.key",
                             [structure(w), target])  # fmt: skip
        alike = [r for r in alike if r.workload != w]
        alike.sort(key=lambda r: (distance(w, r.workload), r.threads != threads))
        return list(dict.fromkeys(r.schedule for r in [*here, *there, *alike]))[:limit]

    # --- cost models ---------------------------------------------------------------------------------------------------

    def save_model(self, name: str, data: bytes) -> None:
        """Keep the bytes of a trained cost model under a name, which should tell the device and the version of its features."""
        with self._file.writing() as c:
            now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
            c.execute("INSERT OR REPLACE INTO models VALUES (?, ?, ?)", (name, data, now))

    def load_model(self, name: str) -> bytes | None:
        """What ``save_model`` kept, or None."""
        with self._file.reading() as c:
            row = c.execute("SELECT data FROM models WHERE name = ?", (name,)).fetchone() if c else None
            return None if row is None else bytes(row[0])

    def models(self) -> list[tuple[str, int, str]]:
        """(name, bytes, when) of the models that are kept, by name."""
        with self._file.reading() as c:
            return c.execute("SELECT name, length(data), at FROM models ORDER BY name").fetchall() if c else []

    # --- the rows ------------------------------------------------------------------------------------------------------

    def _select(self, tail: str, parameters: Sequence[Any]) -> list[TuningRecord]:
        with self._file.reading() as c:
            rows = c.execute(f"{_SELECT} {tail}", parameters).fetchall() if c else []
        workloads: dict[Any, Workload] = {}
        out = []
        for row in rows:
            data = dict(zip((*_COLUMNS, "kind", "text"), row, strict=True))
            w = workloads.setdefault(data["workload"], Workload(data["kind"], data["text"]))
            try:
                r = _record(data, w)
                if r.key != data["key"]:
                    raise ValueError(f"record {data['key']} is not what was written")
            except (ValueError, TypeError, UsageError) as error:
                raise self._file.damaged(str(error)) from error
            out.append(r)
        return out


def leader(trials: Sequence[tuple[Schedule, Measured, str]]) -> int | None:
    """Which of the trials of one workload under the same conditions to use: its index, or None.

    Candidates of a run are timed against the run's incumbent in alternation, so within a run the gain decides: seconds that were
    taken minutes apart on a machine that others use say less. A trial without a gain is timed against nothing: the chain of
    incumbents begins with it. Of two chains the later one decides if it has measured what led the earlier one, which may lead no more;
    if not, only the seconds of their leaders are there to go by. What lost never leads, nor does a schedule whose last trial failed; one
    that was disturbed says nothing.

    Args:
        trials: (schedule, what it gave, run), in the order in which they were measured.
    """
    last = {s: i for i, (s, m, _) in enumerate(trials) if m.status is not Status.DISTURBED}
    chains: dict[str, list[list[int]]] = {}  # of each run, in the order in which they were begun
    order: list[list[int]] = []
    for i, (_, m, run) in enumerate(trials):
        of_run = chains.setdefault(run, [])
        if not of_run or (m.ok and m.gain is None):
            of_run.append([])
            order.append(of_run[-1])
        of_run[-1].append(i)
    lead: int | None = None
    for chain in order:
        first: int | None = None
        for i in chain:
            s, m, _ = trials[i]
            if m.ok and trials[last[s]][1].ok and (m.gain is None or m.gain > 1.0):
                first = i
        if first is None:
            continue
        if lead is None or any(trials[i][0] == trials[lead][0] for i in chain) or _seconds(trials[first]) < _seconds(trials[lead]):
            lead = first
    return lead


def begun_with(lead: TuningRecord, records: Iterable[TuningRecord]) -> TuningRecord | None:
    """What the leader of some records is faster than: its run's first trial that went well, of the default schedule, timed alone."""
    return next((r for r in records if r.run == lead.run and r.measured.ok and r.measured.gain is None), None)


def _seconds(trial: tuple[Schedule, Measured, str]) -> float:
    assert trial[1].seconds is not None
    return trial[1].seconds


def _insert(c: sqlite3.Connection, records: Iterable[TuningRecord]) -> list[tuple[Any, ...]]:
    """Add records that are not there; the group of each that was added."""
    groups = []
    marks = ", ".join("?" * len(_COLUMNS))
    for r in records:
        row = _row(r, _workload_id(c, r.workload))
        insert = f"INSERT INTO records ({', '.join(_COLUMNS)}) VALUES ({marks}) ON CONFLICT (key) DO NOTHING"
        if c.execute(insert, [row[k] for k in _COLUMNS]).rowcount:
            groups.append(tuple(row[k] for k in _GROUP))
    return groups


def _choose_best(c: sqlite3.Connection, group: tuple[Any, ...]) -> None:
    """Note the leader of a group of comparable records."""
    where = " AND ".join(f"{k} = ?" for k in _GROUP)
    fields = "id, schedule, status, seconds, gain, run"
    rows = c.execute(f"SELECT {fields} FROM records WHERE {where} ORDER BY at, run, trial, key", group).fetchall()
    trials = [(Schedule(text), Measured(Status(status), seconds, gain=gain), run) for _, text, status, seconds, gain, run in rows]
    lead = leader(trials)  # only the identity of schedules matters, so their text is not parsed
    c.execute(f"DELETE FROM best WHERE {where}", group)
    if lead is not None:
        c.execute(f"INSERT INTO best ({', '.join(_GROUP)}, record) VALUES (?, ?, ?, ?, ?)", (*group, rows[lead][0]))


def _workload_id(c: sqlite3.Connection, w: Workload) -> int:
    c.execute("INSERT OR IGNORE INTO workloads (key, kind, text, structure) VALUES (?, ?, ?, ?)", (w.key, w.kind, w.text, structure(w)))
    return int(c.execute("SELECT id FROM workloads WHERE key = ?", (w.key,)).fetchone()[0])


def _versions(versions: Versions) -> str:
    return json.dumps(dict(sorted(versions)))


def _row(r: TuningRecord, workload: int) -> dict[str, Any]:
    return {
        "workload": workload, "target": r.target, "threads": r.threads, "versions": _versions(r.versions), "key": r.key, "device": r.device,
        "schedule": r.schedule.to_json(), "status": r.measured.status.value, **{k: getattr(r.measured, k) for k in _MEASURED},
        "run": r.run, "trial": r.trial, "at": r.when,
    }  # fmt: skip


def _record(row: Mapping[str, Any], w: Workload) -> TuningRecord:
    measured = Measured(Status(row["status"]), **{k: row[k] for k in _MEASURED})
    versions = tuple(json.loads(row["versions"]).items())
    return TuningRecord(w, row["target"], row["device"], row["threads"], schedule_from(json.loads(row["schedule"])), measured, versions,
                        row["run"], row["trial"], row["at"])  # fmt: skip
