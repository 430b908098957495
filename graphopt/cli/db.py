"""``graphopt db``: look into tuning databases, put them together, take them elsewhere, and make them smaller."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from graphopt.autotune import DEFAULT_NAME
from graphopt.autotune.database import Database, Versions, begun_with
from graphopt.autotune.prune import Prune, outdated, superfluous
from graphopt.autotune.records import TuningRecord
from graphopt.autotune.space import Workload
from graphopt.errors import GraphoptError, UsageError, counted
from graphopt.options import default_cache_dir
from graphopt.profile import describe_region
from graphopt.tuning import all_versions

HELP = """Look into the tuning database, put databases together, take records elsewhere.

\b
graphopt db ls                             what was tuned, for which device, and how much faster it is
graphopt db show 3f2a                      a workload: its code, its best schedule, its fastest trials
graphopt db export best.jsonl --best       JSON lines, always in the same order
graphopt db import best.jsonl              all of them, or on an error none
graphopt db merge other.db                 take over what another database knows
graphopt db prune --keep 50 --failed       make it smaller; nothing that a compilation uses is ever removed
"""

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

Db = Annotated[Path | None, typer.Option("--db", help="The tuning database; tuning.db in the cache folder unless given.")]


def _open(path: Path | None, *, new: bool = False) -> Database:
    """The database. Raises UsageError if there is none, unless it may be new."""
    path = path or default_cache_dir() / DEFAULT_NAME
    if not new and not path.exists():
        raise UsageError(f"there is no tuning database {path}; graphopt tune makes one, and --db names another")
    return Database(path)


def _console() -> Console:
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    return console


# --- looking -----------------------------------------------------------------------------------------------------------


@app.command("ls")
def ls(db: Db = None) -> None:
    """List what was tuned: a line for each workload, device, number of threads and version."""
    database = _open(db)
    groups = _groups(database.records())
    best = _best(database, groups)
    table = Table("workload", "computes", "device", "threads", "trials", "failed", "best us", "gain", "last", box=None, pad_edge=False)
    other, now = False, all_versions()
    for group, records in sorted(groups.items(), key=lambda item: _newest(item[1]), reverse=True):
        lead, failed = best.get(group), sum(not r.measured.ok for r in records)
        old = outdated(records[0].versions, now)
        other = other or old
        seconds, gain = ("", "") if lead is None else (f"{(lead.measured.seconds or 0) * 1e6:.1f}", _gain(lead, records))
        first, last = records[0], _newest(records)[:10] + ("*" if old else "")
        table.add_row(first.workload.key[:8], _computes(first.workload), first.device.partition(" (")[0], str(first.threads),
                      str(len(records)), str(failed or ""), seconds, gain, last)  # fmt: skip
    console = _console()
    console.print(table)
    trials = sum(len(r) for r in groups.values())
    console.print(f"{counted(trials, 'trial')} in {database.path}, {database.path.stat().st_size / 1024:.0f} KiB")
    if other:
        console.print("*: made by another version of graphopt, TVM or Triton; used as a seed, and measured again")


@app.command("show")
def show(
    workload: Annotated[str, typer.Argument(help="The first digits of a workload's key, as ls prints it.")],
    limit: Annotated[int, typer.Option(min=1, help="Trials that are shown, the fastest first.")] = 10,
    db: Db = None,
) -> None:
    """Show a workload: its code, the schedule that compilations use, its fastest trials, and what became of the others."""
    database = _open(db)
    w = _workload(database, workload)
    groups = _groups(database.records(w))
    best = _best(database, groups)
    console = _console()
    console.print(f"{w.kind} {w.key}: {_computes(w)}", soft_wrap=True)
    console.print(w.text.rstrip(), markup=False, soft_wrap=True)
    for group, records in groups.items():
        lead, r = best.get(group), records[0]
        made = ", ".join(f"{k} {v}" for k, v in r.versions)
        console.print(f"\n{r.device}, {counted(r.threads, 'thread')} ({made})", soft_wrap=True)
        ended = Counter(r.measured.status.value for r in records)
        console.print("trials: " + ", ".join(f"{n} {status}" for status, n in ended.most_common()))
        if lead is not None:
            console.print(f"used: {lead.schedule.to_json()} {_gain(lead, records)}", markup=False, soft_wrap=True)
        fastest = sorted((r for r in records if r.measured.ok), key=lambda r: (r.measured.seconds or 0, r.trial))[:limit]
        table = Table("us", "spread", "error", "run", "trial", "schedule", box=None, pad_edge=False)
        for r in fastest:
            m = r.measured
            knobs = " ".join(f"{k}={v}" for k, v in r.schedule.knobs)
            table.add_row(f"{(m.seconds or 0) * 1e6:.1f}", f"{m.spread or 0:.0%}", f"{m.error or 0:.1e}", r.run, str(r.trial),
                          f"{r.schedule.template}/{r.schedule.sketch} {knobs}")  # fmt: skip
        console.print(table)
        for why, n in Counter(r.measured.reason for r in records if r.measured.reason).most_common(5):
            console.print(f"{n} x {why}", markup=False, soft_wrap=True)


Group = tuple[str, str, int, Versions]


def _computes(w: Workload) -> str:
    """What a workload computes; its kind alone if another version made it, with operations that this one does not have."""
    try:
        return describe_region(w.graph)
    except GraphoptError:
        return f"{w.kind} (of another version)"


def _groups(records: Iterable[TuningRecord]) -> dict[Group, list[TuningRecord]]:
    """Records that may be compared, together."""
    out: dict[Group, list[TuningRecord]] = {}
    for r in records:
        out.setdefault(_group(r), []).append(r)
    return out


def _group(r: TuningRecord) -> Group:
    return r.workload.key, r.target, r.threads, r.versions


def _best(database: Database, groups: dict[Group, list[TuningRecord]]) -> dict[Group, TuningRecord]:
    """The leader of each group that has one."""
    found = database.elsewhere(dict.fromkeys(records[0].workload for records in groups.values()))
    return {_group(r): r for records in found.values() for r in records}


def _newest(records: Iterable[TuningRecord]) -> str:
    return max(r.when for r in records)


def _gain(lead: TuningRecord, records: Sequence[TuningRecord]) -> str:
    """Over what the leader's run began with."""
    first = begun_with(lead, records)
    if first is None or not first.measured.seconds or not lead.measured.seconds:
        return ""
    return f"{first.measured.seconds / lead.measured.seconds:.2f}x"


def _workload(database: Database, prefix: str) -> Workload:
    """The workload whose key begins so. Raises UsageError if there is none, or several."""
    found = dict.fromkeys(r.workload for r in database.records() if r.workload.key.startswith(prefix.lower()))
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise UsageError(f"workload {prefix!r}: there is none in {database.path}; graphopt db ls prints their keys")
    which = "; ".join(f"{w.key[:8]} {_computes(w)}" for w in list(found)[:4])
    raise UsageError(f"workload {prefix!r}: which of these? {which}")


# --- taking elsewhere --------------------------------------------------------------------------------------------------


@app.command("export")
def export(
    file: Annotated[Path | None, typer.Argument(help="Where to; standard output if not given.", show_default=False)] = None,
    best: Annotated[bool, typer.Option("--best", help="Only what compilations use: the best record of each workload.")] = False,
    workload: Annotated[str | None, typer.Option(help="Only one workload: the first digits of its key.")] = None,
    db: Db = None,
) -> None:
    """Write records as JSON lines: one a line, keys sorted, always in the same order, so that two exports can be compared."""
    database = _open(db)
    records = database.records(_workload(database, workload) if workload else None)
    if best:
        records = list(_best(database, _groups(records)).values())
    lines = "".join(f"{r.to_json()}\n" for r in sorted(records, key=_order))
    if file is None:
        sys.stdout.write(lines)
        return
    _write(file, lines)
    typer.echo(f"{counted(len(records), 'record')} written to {file}", err=True)


def _order(r: TuningRecord) -> tuple[str, str, int, str, str, int, str]:
    return r.workload.key, r.target, r.threads, str(r.versions), r.run, r.trial, r.key


def _write(file: Path, text: str) -> None:
    """Write a file whole, or not at all. Raises UsageError."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_text(text)
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UsageError(f"{file} cannot be written: {error.strerror}") from error


@app.command("import")
def import_(files: Annotated[list[str], typer.Argument(help="Files of JSON lines; - for standard input.")], db: Db = None) -> None:
    """Add exported records: all of them, or on an error none. Those that are there already are left alone."""
    database = _open(db, new=True)
    records = [r for name in files for r in _read(name)]
    _told(database.add(records), len(records), database)


def _read(name: str) -> Iterator[TuningRecord]:
    """Records of a file of JSON lines. Raises UsageError that names file and line."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield TuningRecord.from_json(line)
            except UsageError as error:
                raise UsageError(f"{name}:{number}: {error}; nothing was imported") from None


@app.command("merge")
def merge(others: Annotated[list[Path], typer.Argument(help="Where to take records from; they stay as they are.")], db: Db = None) -> None:
    """Take over the records of other databases. Those that are there already are left alone."""
    database = _open(db, new=True)
    records: list[TuningRecord] = []
    for other in others:
        if not other.exists():
            raise UsageError(f"there is no tuning database {other}")
        records += Database(other).records()
    _told(database.add(records), len(records), database)


def _told(added: int, given: int, database: Database) -> None:
    typer.echo(f"{counted(added, 'new record')} in {database.path}, {given - added} were there already")


# --- making it smaller -------------------------------------------------------------------------------------------------


@app.command("prune")
def prune(
    keep: Annotated[int | None, typer.Option(min=1, help="Remove all but the N fastest trials of each workload.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Remove failed trials; the tuner may then try the same again.")] = False,
    older: Annotated[str | None, typer.Option(help="Remove trials that are older: 90d, 12h.")] = None,
    other_versions: Annotated[bool, typer.Option("--other-versions", help="Remove what other versions made, the best included.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    db: Db = None,
) -> None:
    """Remove records. The best of each workload, which compilations use, always stays; one of another version goes only
    with --other-versions."""
    if keep is None and not failed and older is None and not other_versions:
        raise UsageError("what may go? --keep N, --failed, --older 90d, --other-versions; with --dry-run it is only told")
    if other_versions and not all_versions():
        raise UsageError("--other-versions: there is neither TVM nor Triton here, so nothing is of this version")
    what = Prune(keep, failed, _moment(older) if older else "", all_versions() if other_versions else None)
    database = _open(db)
    records = database.records()
    going = superfluous(records, what)
    if not dry_run:
        database.remove(r.key for r in going)
    verb = "would be removed" if dry_run else "removed"
    typer.echo(f"{counted(len(going), 'record')} {verb} of {len(records)} in {database.path}")


def _moment(age: str) -> str:
    """A moment so long ago. Raises UsageError."""
    found = re.fullmatch(r"(\d+)([dh])", age)
    if found is None:
        raise UsageError(f"--older {age!r} is no age; write 90d or 12h")
    ago = timedelta(**{{"d": "days", "h": "hours"}[found[2]]: int(found[1])})
    try:
        return f"{datetime.now(timezone.utc) - ago:%Y-%m-%dT%H:%M:%SZ}"
    except OverflowError:
        raise UsageError(f"--older {age!r} is before all time") from None
