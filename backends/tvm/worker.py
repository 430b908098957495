"""A process that builds kernels: JSON lines in, JSON lines out. Started by :mod:`build`, lives until its input ends.

Request: ``{"kind", "text", "schedule", "target", "cache"}``. Answer: ``{"path", "how", "seconds"}`` or ``{"error"}``.

With ``schedules`` in place of ``schedule``, candidates of a tuner: they are built into one file, which is not kept in the cache. Answer:
``{"built", "seconds"}``, where ``built`` has the path, or the error, of each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.backend import template_named
from graphopt.backends.tvm.cache import KernelCache
from graphopt.backends.tvm.link import link
from graphopt.backends.tvm.template import entry_name
from graphopt.target import Target


def target_to_json(t: Target) -> dict[str, Any]:
    return asdict(t)


def target_from_json(data: dict[str, Any]) -> Target:
    return Target(**{**data, "features": tuple(data["features"]), "cache": tuple(data["cache"])})


def build_one(w: Workload, s: Schedule, t: Target, cache: KernelCache) -> tuple[Path, str]:
    """Emit, compile, link and store one kernel in this process.

    Returns:
        (file, how it was linked: a linker's name, or ``not linked``).
    """
    from graphopt.backends.tvm.gomp import build_launcher
    from graphopt.backends.tvm.lowering import compile_functions

    source = template_named(s.template).emit(w, s, t)
    module = compile_functions({source.name: source.payload}, t)
    cache.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.directory, prefix=".build-") as scratch:
        objects, shared = Path(scratch) / "k.o", Path(scratch) / "k.so"
        module.write_to_file(str(objects))
        how = link(objects, shared, t)
        build_launcher(cache.directory)
        path = cache.put(w, s, t, shared if how else objects, source.text)
    return path, how or "not linked"


def build_together(w: Workload, schedules: Sequence[Schedule], t: Target, folder: Path) -> list[dict[str, str]]:
    """Kernels of one workload in one file of their own: a compiler pipeline, an object file and a link for all.

    Returns:
        ``{"path"}`` or ``{"error"}`` of each.
    """
    from graphopt.backends.tvm.gomp import build_launcher
    from graphopt.backends.tvm.lowering import compile_functions

    functions, answers = {}, list[dict[str, str]]()
    build_launcher(folder)
    handle, file = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    for s in schedules:
        try:
            source = template_named(s.template).write(w, s, t)
            functions[entry_name(w, s)] = source.function(entry_name(w, s))
            answers.append({"path": file})
        except Exception as error:  # one schedule's error is its own
            answers.append({"error": f"{type(error).__name__}: {error}"})
    if functions:
        objects = Path(file).with_suffix(".o")
        try:
            compile_functions(functions, t).write_to_file(str(objects))
        except Exception as error:
            if len(functions) > 1:  # which of them was it?
                return [build_together(w, [s], t, folder)[0] if "path" in a else a for s, a in zip(schedules, answers, strict=True)]
            return [{"error": f"{type(error).__name__}: {error}"} if "path" in a else a for a in answers]
        if link(objects, Path(file), t) is None:
            return [{"path": str(objects)} if "path" in a else a for a in answers]
        objects.unlink()
    return answers


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request; errors become answers."""
    start = time.perf_counter()
    try:
        w, t = Workload(request["kind"], request["text"]), target_from_json(request["target"])
        folder = Path(request["cache"])
        if "schedules" in request:
            built = build_together(w, [Schedule.from_json(s) for s in request["schedules"]], t, folder)
            return {"built": built, "seconds": time.perf_counter() - start}
        path, how = build_one(w, Schedule.from_json(request["schedule"]), t, KernelCache(folder))
    except Exception as error:  # any failure of one kernel is that kernel's answer; the worker goes on
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    return {"path": str(path), "how": how, "seconds": time.perf_counter() - start}


def _end_with(parent: int) -> None:
    """End when the parent is gone, even if another process holds our input open."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(0)


def main(parent: int) -> None:
    """Serve requests from standard input."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import tvm

    torch.set_num_threads(1)
    replies.write(json.dumps({"ready": tvm.__version__}) + "\n")
    replies.flush()
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(os.getppid())
