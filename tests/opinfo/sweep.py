"""The OpInfo sweep: every operator, in worker processes, so that a crash or a hang costs one operator and is reported.

    python -m tests.opinfo.sweep --dtype float32 --samples 3 --shard 0/4 [--backend graphopt] [--ops 'nn.functional.*,add']
        [--options '{"backend": "eager"}'] [--json FILE]

An operator fails when a sample does not give eager's result, and does under ``aot_eager``. Exit status 1 if any fails.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.opinfo.harness import Outcome, operators, run

ROOT = Path(__file__).parents[2]


class Worker:
    """A process that runs operators by name, one JSON line an outcome."""

    def __init__(self, dtype: str, samples: int, backend: str, options: str) -> None:
        request = ["--worker", "--dtype", dtype, "--samples", str(samples), "--backend", backend, "--options", options]
        command = [sys.executable, "-m", "tests.opinfo.sweep", *request]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip
        self.buffer = b""

    def read(self, timeout: float) -> Any:
        """One record; ``timeout`` or ``crash`` in its place."""
        assert self.process.stdout is not None
        end = time.monotonic() + timeout
        while b"\n" not in self.buffer:
            if not select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                return "timeout"
            chunk = os.read(self.process.stdout.fileno(), 65536)
            if not chunk:
                return "crash"
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def outcomes(self, name: str, timeout: float) -> tuple[list[Outcome], bool]:
        """The outcomes of an operator, and whether the worker is still good."""
        assert self.process.stdin is not None
        found: list[Outcome] = []
        try:
            self.process.stdin.write(name.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return [Outcome(name, -1, "crash", "the worker is gone")], False
        while True:
            record = self.read(timeout)
            if isinstance(record, str):
                return [*found, Outcome(name, len(found), record)], False
            if "done" in record:
                return found, True
            found.append(Outcome(**record))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def serve(dtype: str, samples: int, backend: str, options: dict[str, Any]) -> None:
    """The worker's side."""
    out = os.fdopen(os.dup(1), "w", buffering=1)  # operators may print: the protocol has its own stream
    os.dup2(2, 1)
    torch.set_num_threads(1)
    known = operators(getattr(torch, dtype))
    for line in sys.stdin:
        name = line.strip()
        for outcome in run(name, known[name], getattr(torch, dtype), samples, backend, options or None):
            out.write(json.dumps(asdict(outcome)) + "\n")
        out.write(json.dumps({"done": name}) + "\n")


def outcomes_of(names: list[str], dtype: str, samples: int, backend: str, options: str = "", timeout: float = 120.0) -> list[Outcome]:
    """Run operators one after another, replacing the worker when it dies or hangs."""
    found: list[Outcome] = []
    worker: Worker | None = None
    for name in names:
        worker = worker or Worker(dtype, samples, backend, options)
        outcomes, good = worker.outcomes(name, timeout)
        found += outcomes
        if not good:
            worker.stop()
            worker = None
    if worker is not None:
        worker.stop()
    return found


def sweep(dtype: str, samples: int, shard: tuple[int, int] = (0, 1), backend: str = "graphopt",
          patterns: str = "*", options: str = "") -> tuple[list[Outcome], list[Outcome]]:  # fmt: skip
    """All outcomes of a shard, and those that fail here but not under ``aot_eager``."""
    wanted = patterns.split(",")
    names = [n for n in operators(getattr(torch, dtype)) if any(fnmatch.fnmatchcase(n, p) for p in wanted)][shard[0] :: shard[1]]
    found = outcomes_of(names, dtype, samples, backend, options)
    suspects = [o for o in found if not o.passed]
    reference = outcomes_of(list(dict.fromkeys(o.op for o in suspects)), dtype, samples, "aot_eager")
    fails_too = {(o.op, o.sample) for o in reference if not o.passed}
    return found, [o for o in suspects if (o.op, o.sample) not in fails_too]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--backend", default="graphopt")
    parser.add_argument("--ops", default="*")
    parser.add_argument("--options", default="", help="of the backend, as JSON")
    parser.add_argument("--json", default="")
    parser.add_argument("--worker", action="store_true")
    a = parser.parse_args()
    if a.worker:
        serve(a.dtype, a.samples, a.backend, json.loads(a.options or "{}"))
        return 0
    index, count = map(int, a.shard.split("/"))
    start = time.monotonic()
    found, failures = sweep(a.dtype, a.samples, (index, count), a.backend, a.ops, a.options)
    tally = dict(collections.Counter(o.status for o in found))
    print(f"{a.backend} {a.dtype} shard {a.shard}: {tally}, {len(failures)} failures, {time.monotonic() - start:.0f} s")
    for outcome in failures:
        print(f"  {outcome}")
    if a.json:
        Path(a.json).write_text(json.dumps([asdict(o) for o in found], indent=0))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
