"""The machine's limits: sizes, the better of two measurements, and a real measurement that is plausible."""

from __future__ import annotations

import pytest

from graphopt.bench.limits import LimitMeter, Limits, available_memory, best_seconds, buffer_bytes
from graphopt.target import Target, detect


def test_the_buffer_is_beyond_the_cache_but_within_memory() -> None:
    def machine(l3: int) -> Target:
        return Target("cpu", "x86_64", cache=(32 << 10, 1 << 20, l3))

    assert buffer_bytes(machine(16 << 20), 64 << 30) == 1 << 30
    assert buffer_bytes(machine(400 << 20), 64 << 30) == 1600 << 20
    assert buffer_bytes(machine(400 << 20), 2 << 30) == 512 << 20  # a quarter of what is free
    assert buffer_bytes(machine(16 << 20), 0) == 1 << 22


def test_the_higher_of_two_measurements() -> None:
    a, b = Limits(400e9, 30e9, 2, 1), Limits(410e9, 28e9, 2, 1)
    assert a.best(b) == Limits(410e9, 30e9, 2, 1)


def test_products_of_thirds_may_be_as_fast_as_tiles() -> None:
    """Six products of bf16 for one of f32: 1000 GFLOP/s where tiles make 6000, and what the vector units make where that is more."""
    machine = Limits(400e9, 30e9, 2, 1, tiles=6e12)
    assert machine.least_seconds(4e9, 0) == pytest.approx(0.01)
    assert machine.least_seconds(4e9, 0, products=6) == pytest.approx(0.004)
    assert machine.least_seconds(4e9, 0, products=3) == pytest.approx(0.002)
    assert Limits(400e9, 30e9, 2, 1).least_seconds(4e9, 0, products=6) == pytest.approx(0.01)


def test_best_seconds_runs_three_times_at_least() -> None:
    calls: list[int] = []
    assert best_seconds(lambda: calls.append(1), 0.0)[0] >= 0.0
    assert len(calls) == 4  # one warms up


def test_available_memory() -> None:
    assert available_memory() > 1 << 20


def test_a_real_measurement_is_plausible() -> None:
    pytest.importorskip("tvm")
    found = LimitMeter(1).measure(seconds=0.0)
    assert 1e9 < found.flops < 1e13  # one core, however slow or busy
    assert 1e8 < found.bytes < 1e12
    assert found.threads == 1
    assert found.tiles > found.flops if detect().f32_thirds else found.tiles == 0.0
