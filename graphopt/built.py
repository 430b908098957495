"""From steps to loaded kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from graphopt.autotune.space import Schedule, Workload
from graphopt.devices import KernelProvider
from graphopt.errors import BuildError, first_line
from graphopt.lower import KernelStep, LibraryStep, Lowered
from graphopt.options import Options
from graphopt.prepared import Unit
from graphopt.report import KernelInfo
from graphopt.target import Target

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total) while a compilation goes on."""


def build_kernels(units: Sequence[Unit], keys: Iterable[str], target: Target, provider: KernelProvider,
                  options: Options, progress: Progress | None) -> None:  # fmt: skip
    """One loaded kernel a KernelStep; equal workloads share one. A step whose kernel cannot be built becomes a library call."""
    wanted = dict.fromkeys(key for u in units for key in _kernel_users(u.lowered))
    if not wanted:
        return
    cache_dir = options.kernels_dir
    built = provider.load_or_build(list(wanted), target, cache_dir, options.workers, progress)
    artifacts = dict(zip(wanted, built, strict=True))
    if not any(isinstance(a, BuildError) for a in built):
        for model in keys:
            provider.remember(cache_dir, model)
    for unit in units:
        for key, users in _kernel_users(unit.lowered).items():
            artifact = artifacts[key]
            if isinstance(artifact, BuildError):
                unit.report.notes.append(f"a kernel could not be built; please report this: {artifact}")
            else:
                unit.report.kernels.append(_kernel_info(users, artifact))
        for i, s in enumerate(unit.lowered.steps):
            if isinstance(s, KernelStep):
                artifact = artifacts[s.workload, s.schedule]
                if isinstance(artifact, BuildError):
                    unit.lowered.steps[i] = LibraryStep(s.node, f"its kernel could not be built: {first_line(artifact)}")
                else:
                    unit.kernels.append(artifact.kernel)


def _kernel_users(lowered: Lowered) -> dict[tuple[Workload, Schedule], list[KernelStep]]:
    users: dict[tuple[Workload, Schedule], list[KernelStep]] = {}
    for s in lowered.steps:
        if isinstance(s, KernelStep):
            users.setdefault((s.workload, s.schedule), []).append(s)
    return users


def _kernel_info(users: Sequence[KernelStep], artifact: Any) -> KernelInfo:
    body = users[0].node.body
    assert body is not None
    locs = tuple(dict.fromkeys(str(n.loc) for n in body if n.loc))
    ops = tuple(n.op.name for n in body if n.op.name != "constant")
    return KernelInfo(artifact.name, users[0].backend, users[0].workload.kind, len(users), artifact.cache, users[0].schedule.to_json(),
                      locs, ops, str(artifact.path), users[0].tuned)  # fmt: skip
