"""Whether the machine was quiet: the processor time that other processes took, read from Linux's ``/proc``.

A time that was taken while something else ran is no measurement. What is read: the busy time of all processors against the
time of this process and its descendants; time that a hypervisor took away; context switches that were forced upon the
descendants. Where there is no ``/proc`` nothing is known, and the report says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
OTHERS_LIMIT = 0.08  # processors that others may keep busy: two background daemons, not a compiler
STOLEN_LIMIT = 0.03  # processors that the hypervisor may take away
SWITCHES_LIMIT = 60.0  # forced context switches a second: beyond the scheduler's own housekeeping


@dataclass(frozen=True)
class Snapshot:
    """Counters since the machine and the processes started, in seconds of processor time.

    Attributes:
        busy: of all processors, all processes; ``stolen``: taken by the hypervisor.
        own: of this process and its descendants.
        switches: context switches forced upon the descendants (not this process, which only waits).
        at: when, in seconds of a monotonic clock.
    """

    busy: float
    stolen: float
    own: float
    switches: int
    at: float


@dataclass(frozen=True)
class Load:
    """What happened beside the measurement during ``seconds``.

    Attributes:
        others, stolen: processors, on average, that other processes and the hypervisor had.
        switches: forced context switches of the measured processes, a second.
    """

    seconds: float
    others: float
    stolen: float
    switches: float

    def complaints(self, when: str) -> list[str]:
        """Why times taken under this load claim nothing; empty on a quiet machine."""
        out = []
        if self.others > OTHERS_LIMIT:
            out.append(f"other processes kept {self.others:.2f} processors busy {when} (limit {OTHERS_LIMIT})")
        if self.stolen > STOLEN_LIMIT:
            out.append(f"the hypervisor took {self.stolen:.2f} processors away {when} (limit {STOLEN_LIMIT})")
        if self.switches > SWITCHES_LIMIT:
            out.append(f"{self.switches:.0f} forced context switches a second {when} (limit {SWITCHES_LIMIT:.0f})")
        return out


def snapshot(proc: Path = PROC, pid: int | None = None) -> Snapshot | None:
    """The counters now; None where they cannot be read."""
    try:
        fields = [float(x) for x in (proc / "stat").read_text().splitlines()[0].split()[1:9]]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    user, nice, system, _idle, _wait, irq, softirq, stolen = fields
    root = os.getpid() if pid is None else pid
    family = descendants(_processes(proc), root)
    own = sum(seconds for _, seconds in family.values())
    switches = sum(_switches(proc / str(p)) for p in family if p != root)
    return Snapshot((user + nice + system + irq + softirq) / ticks, stolen / ticks, own / ticks, switches, time.monotonic())


def between(first: Snapshot, last: Snapshot) -> Load:
    """The load from one snapshot to a later one. Counters of processes that ended are lost: own time is what remains."""
    seconds = max(last.at - first.at, 1e-9)
    others = (last.busy - first.busy) - (last.own - first.own)
    return Load(seconds, max(0.0, others / seconds), max(0.0, (last.stolen - first.stolen) / seconds),
                max(0.0, (last.switches - first.switches) / seconds))  # fmt: skip


def watch(seconds: float, proc: Path = PROC) -> Load | None:
    """The load while this process sleeps."""
    first = snapshot(proc)
    time.sleep(seconds)
    last = snapshot(proc)
    return between(first, last) if first and last else None


def descendants(processes: dict[int, tuple[int, float]], root: int) -> dict[int, tuple[int, float]]:
    """A process and everything that it started, of pid -> (parent, ticks)."""
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in processes.items():
        children.setdefault(parent, []).append(pid)
    found, pending = {}, [root]
    while pending:
        pid = pending.pop()
        if pid in processes and pid not in found:
            found[pid] = processes[pid]
            pending += children.get(pid, [])
    return found


def _processes(proc: Path) -> dict[int, tuple[int, float]]:
    """pid -> (parent, clock ticks of it, and of its children that ended)."""
    found = {}
    for folder in proc.iterdir():
        if folder.name.isdigit():
            try:
                rest = (folder / "stat").read_text().rpartition(")")[2].split()
                found[int(folder.name)] = (int(rest[1]), sum(float(x) for x in rest[11:15]))
            except (OSError, ValueError, IndexError):
                continue  # it ended while we looked
    return found


def _switches(process: Path) -> int:
    return sum(_switches_of(task / "status") for task in _tasks(process))


def _tasks(process: Path) -> Iterable[Path]:
    try:
        return list((process / "task").iterdir())
    except OSError:
        return []


def _switches_of(status: Path) -> int:
    try:
        line = next(x for x in status.read_text().splitlines() if x.startswith("nonvoluntary_ctxt_switches"))
        return int(line.split()[1])
    except (OSError, ValueError, IndexError, StopIteration):
        return 0
