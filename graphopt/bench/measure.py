"""Runs a benchmark: a process for each system, all alive at once, each told in turn to make some calls while the others sleep.

A round visits every system: 20 ms of silence, so that the last one's threads stop spinning; a call that is not timed; then the
timed ones. The order turns by one each round. Rounds go on while they differ too much for a ratio to be claimed, up to a limit.
Compile times are those of processes of their own, with an empty cache and then a filled one; the second of them is the process
that is measured.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.bench import load
from graphopt.bench.limits import Limits
from graphopt.bench.results import OURS, UNCERTAINTY_LIMIT, ModelResult, SystemResult
from graphopt.bench.session import Session
from graphopt.bench.stats import LOOKS, Times, ratio_of_medians
from graphopt.bench.system import SystemFailure
from graphopt.bench.systems import FLOAT, system
from graphopt.bench.work import Work

Tell = Callable[[str], None]
"""Told what is being done; called between measurements, never during one."""

SILENCE = 0.02  # seconds: threads of OpenMP and of the runtimes spin for some milliseconds after a call
LIMITS_SLICE = 0.05  # seconds for each of the machine's limits in a round
SLICE = 0.1  # seconds of timed calls that one turn of a system should take
PATIENCE = 2 ** (LOOKS - 1)  # times the rounds asked for, at most, while a ratio is uncertain
CALLS = (2, 200)  # the least and the most timed calls of a turn


@dataclass(frozen=True)
class Settings:
    """Attributes:
        systems: names, in the order of the table.
        ours: the one of them that the others are compared with.
        threads: of each system.
        rounds: turns of each system, at least.
        compile_times: measure cold and warm compile times; otherwise the user's own caches are used.
        environment: of the processes.
        watch: seconds for which the machine is watched before each model.
    """

    systems: tuple[str, ...]
    threads: int
    rounds: int = 12
    compile_times: bool = True
    ours: str = OURS
    environment: Mapping[str, str] = field(default_factory=dict)
    watch: float = 0.5


def measure_limits(session: Session, settings: Settings, before: Limits | None = None) -> Limits:
    """What the machine reaches, or reached before. Raises SystemFailure if the kernels cannot be built."""
    found = Limits(**session.ask("limits", threads=settings.threads))
    return found.best(before) if before else found


def measure(model: str, settings: Settings, tell: Tell, meter: Session | None = None) -> ModelResult:
    """All systems on one model; ``meter``, a process of its own, measures the machine's limits in turns with them."""
    result = ModelResult(label(model), ours=settings.ours)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graphopt-bench-")))
        tell("f64 reference")
        reference = _reference(model, folder, settings)
        ready: dict[str, Session] = {}
        for name in settings.systems:
            found = result.systems[name] = SystemResult(name)
            missing = system(name).missing()
            if missing:
                found.failed = missing
                continue
            try:
                ready[name] = _prepared(found, model, folder, reference, settings, tell, stack, result)
            except SystemFailure as failure:
                found.failed = str(failure)
        if not ready:
            return result
        tell("measure")
        result.before = load.watch(settings.watch)
        first = load.snapshot()
        samples = _rounds(result, ready, settings, tell, meter)
        last = load.snapshot()
        result.during = load.between(first, last) if first and last else None
        for name, session in ready.items():
            found = result.systems[name]
            if samples[name] and not found.failed:
                found.times = Times(tuple(samples[name]))
                tell(f"memory of {system(name).title}")
                found.memory = _asked(found, session, "memory").get("peak")
    return result


def label(model: str) -> str:
    """A short name for reports: ``file.py:factory`` without its folders."""
    place, colon, name = model.rpartition(":")
    return f"{Path(place).name}:{name}" if colon else model


def _reference(model: str, folder: Path, settings: Settings) -> str:
    """The file of the results of an f64 run; empty if the model cannot be run in f64."""
    file = str(folder / "reference.pt")
    with Session(settings.environment) as session:
        try:
            session.ask("reference", model=model, file=file)
        except SystemFailure:
            return ""
    return file


def _prepared(found: SystemResult, model: str, folder: Path, reference: str, settings: Settings, tell: Tell, stack: ExitStack,
              result: ModelResult) -> Session:  # fmt: skip
    """A process in which the model is ready; what it took is written into the results."""
    chosen = system(found.name)
    own, cache = folder / found.name, folder / f"{found.name}-cache"
    own.mkdir()
    converted: dict[str, Any] = {"seconds": 0.0, "notes": []}
    environment, cache_dir = dict(settings.environment), ""
    if settings.compile_times and chosen.cached:
        cache.mkdir()
        environment["TORCHINDUCTOR_CACHE_DIR"], cache_dir = str(cache), str(cache)
    request: dict[str, Any] = {
        "system": found.name, "model": model, "threads": settings.threads, "folder": str(own), "reference": reference,
        "cache_dir": cache_dir if chosen.is_graphopt else "",
    }  # fmt: skip
    if settings.compile_times and chosen.cached:
        tell(f"{chosen.title}: compile, empty cache")
        with Session(environment) as cold:
            answer = cold.ask("prepare", **request)
            found.cold = answer["seconds"] - answer["capture_seconds"]
    elif chosen.convert:
        tell(f"{chosen.title}: convert")
        with Session(environment) as converter:
            converted = converter.ask("convert", **{k: request[k] for k in ("system", "model", "threads", "folder")})
    tell(f"{chosen.title}: " + ("compile, filled cache" if chosen.cached and settings.compile_times else "prepare"))
    session = stack.enter_context(Session(environment))
    answer = session.ask("prepare", **request)
    seconds = answer["seconds"] - answer["capture_seconds"]
    found.capture, found.error = answer["capture_seconds"] + converted["seconds"], answer["error"]
    found.compile_memory, found.notes = answer["compile_peak"], answer["notes"] + converted["notes"]
    if chosen.cached:
        found.warm = seconds if settings.compile_times else None
    elif found.name != "eager":
        found.cold = seconds
    if answer["work"]:
        found.work = Work(**answer["work"])
        if found.name in (OURS, FLOAT.name):
            result.work = found.work
    return session


def _rounds(result: ModelResult, ready: Mapping[str, Session], settings: Settings, tell: Tell,
            meter: Session | None) -> dict[str, list[tuple[float, ...]]]:  # fmt: skip
    """Seconds of all timed calls of each system, by turns."""
    limits: list[Limits] = []
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in ready}
    calls = {}
    for name, session in ready.items():
        time.sleep(SILENCE)
        probe = _asked(result.systems[name], session, "run", calls=2).get("seconds", [SLICE])
        calls[name] = max(CALLS[0], min(CALLS[1], round(SLICE / max(min(probe), 1e-9))))
    looks = [settings.rounds * 2**k for k in range(LOOKS)]
    for r in range(PATIENCE * settings.rounds):
        if r in looks and not _uncertain(result, samples):
            break
        tell(f"measure, round {r + 1} of {settings.rounds}" if r < settings.rounds else f"measure, round {r + 1}: they differ")
        for name in _turned(list(ready), r):
            if not result.systems[name].failed:
                time.sleep(SILENCE)
                if seconds := _asked(result.systems[name], ready[name], "run", calls=calls[name]).get("seconds"):
                    samples[name].append(tuple(seconds))
        if meter:
            time.sleep(SILENCE)
            try:
                limits.append(Limits(**meter.ask("limits", threads=settings.threads, slice_seconds=LIMITS_SLICE)))
            except SystemFailure:
                meter = None  # the limits that were measured before count
    result.limits = Limits.middle(limits) if limits else None
    return samples


def _uncertain(result: ModelResult, samples: Mapping[str, list[tuple[float, ...]]]) -> bool:
    """Whether a ratio could not be claimed yet."""
    times = {name: Times(tuple(turns)) for name, turns in samples.items() if turns and not result.systems[name].failed}
    ours = times.pop(result.ours, None)
    return ours is not None and any(ratio_of_medians(t, ours).uncertainty > UNCERTAINTY_LIMIT for t in times.values())


def _asked(found: SystemResult, session: Session, what: str, **arguments: Any) -> dict[str, Any]:
    """The answer to a request; empty, and the system marked as failed, if there is none."""
    try:
        return session.ask(what, **arguments)
    except SystemFailure as failure:
        found.failed = str(failure)
        return {}


def _turned(names: Sequence[str], by: int) -> list[str]:
    by %= max(len(names), 1)
    return [*names[by:], *names[:by]]
