"""The kernel cache and the build processes."""

from __future__ import annotations

import os

import pytest

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.cache import KernelCache
from graphopt.errors import BuildError
from graphopt.target import detect

TEXT = "graph @g(%arg0: f32[5]) -> f32[5] {\n  %0: f32[5] = neg(%arg0)\n  return %0\n}\n"


def job():
    w = Workload("pointwise", TEXT)
    return w, TvmBackend().templates(w, detect())[0].space(w, detect()).default()


def test_second_build_hits_and_damage_is_rebuilt(builder, tmp_path) -> None:
    w, s = job()
    (path,) = builder.build_many([(w, s)], detect(), tmp_path)
    stamp = os.stat(path).st_mtime_ns
    assert builder.build_many([(w, s)], detect(), tmp_path) == [path] and os.stat(path).st_mtime_ns == stamp
    assert "T.prim_func" in path.with_suffix(".txt").read_text()
    path.write_bytes(b"damaged")
    assert KernelCache(tmp_path).find(w, s, detect()) is None
    builder.build_many([(w, s)], detect(), tmp_path)
    assert KernelCache(tmp_path).find(w, s, detect()) == path


def test_a_miss_names_the_ingredient(builder, tmp_path) -> None:
    w, s = job()
    builder.build_many([(w, s)], detect(), tmp_path)
    other = Schedule.make(s.template, s.sketch, **{**dict(s.knobs), "unroll": 2})
    assert KernelCache(tmp_path).why_missing(w, other, detect()) == "schedule differs"


def test_a_crash_costs_one_kernel(builder, tmp_path) -> None:
    w, s = job()
    bad = (w, Schedule.make("nest", lanes=-3, unroll=1, chunk=1, parallel=False))
    results = builder.build_many([bad, (w, s)], detect(), tmp_path, errors="return")
    assert isinstance(results[0], BuildError) and "f32[5]" in str(results[0])
    assert not isinstance(results[1], BuildError)
    with pytest.raises(BuildError):
        builder.build_many([bad], detect(), tmp_path)
