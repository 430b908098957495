"""What is claimed of two models that took turns."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from graphopt.before_after import BeforeAfter, KernelTimes, interleaved


def measured(gain: float, noise: float, n: int = 100, seed: int = 0) -> BeforeAfter:
    """Times of a model whose true gain is known, each with noise of its own, on a machine that drifts by a tenth."""
    rng = Random(f"{n}/{seed}")
    drift = [1.0 + 0.1 * i / n for i in range(n)]
    after = tuple(d * (1 + noise * rng.random()) for d in drift)
    return BeforeAfter("model", tuple(gain * d * (1 + noise * rng.random()) for d in drift), after, ())


@pytest.mark.parametrize("n", [9, 100])
def test_the_interval_holds_the_true_gain_as_often_as_it_says(n: int) -> None:
    intervals = [measured(1.1, 0.05, n, seed).gain for seed in range(400)]
    assert all(low <= gain <= high for gain, low, high in intervals)
    held = sum(low <= 1.1 <= high for _, low, high in intervals)
    assert 370 <= held <= 399


def test_a_gain_is_told_from_none_and_noise_is_not() -> None:
    _, low, _ = measured(1.1, 0.05).gain
    assert low > 1.0
    _, low, high = measured(1.0, 0.05).gain
    assert low < 1.0 < high


@pytest.mark.parametrize("n", [1, 2, 9])
def test_of_few_runs_the_interval_is_all_of_them(n: int) -> None:
    m = measured(1.3, 0.2, n)
    ratios = [b / a for b, a in zip(m.before, m.after, strict=True)]
    _, low, high = m.gain
    assert (min(ratios), max(ratios)) == (low, high) or n == 9
    assert low <= 1.3 * 1.2 and high >= 1.3 / 1.2


def test_calls_take_turns() -> None:
    calls: list[str] = []
    times = interleaved((lambda: calls.append("a"), lambda: calls.append("b")), seconds=0.0, rounds=3, waited=float)
    assert [len(t) for t in times] == [3, 3]
    assert calls[:2] == ["a", "b"]
    assert "".join(calls[2:]) == "bbaa" + "aabb" + "bbaa"


def kernel(name: str, after: float, changed: bool = True) -> KernelTimes:
    return KernelTimes(name, 1, 1.0, after, changed, (f"key of {name}",))


def test_what_is_taken_back() -> None:
    """A kernel that is slower by more than noise; where the whole is slower, whatever is not faster, and at last all that changed."""
    kernels = (kernel("faster", 0.8), kernel("a little slower", 1.05), kernel("slower", 1.2), kernel("the same", 1.3, changed=False))

    def back(gain: float, *among: KernelTimes) -> tuple[str, ...]:
        return tuple(key.removeprefix("key of ") for key in replace(measured(gain, 0.05), kernels=among).to_take_back)

    assert back(1.1, *kernels) == ("slower",)
    assert back(0.9, *kernels) == ("a little slower", "slower")
    assert back(0.9, kernels[0], kernels[3]) == ("faster",)
    assert back(1.1, kernels[0], kernels[1], kernels[3]) == back(1.0, kernels[0], kernels[1]) == ()


def test_times_that_claim_nothing_take_nothing_back() -> None:
    kernels = (kernel("slower", 1.2), kernel("faster", 0.8))
    noisy = replace(measured(1.0, 1.0), kernels=kernels)
    assert noisy.noisy and not noisy.slower and noisy.to_take_back == ()
    assert replace(measured(1.0, 0.05), kernels=kernels).to_take_back == ("key of slower",)
    assert replace(measured(0.5, 1.0), kernels=kernels).to_take_back == ("key of slower",), "slower beyond doubt"


@pytest.mark.parametrize(("apart", "back"), [(1.1, ("key of slow",)), (1.5, ())])
def test_where_times_vary_a_kernel_that_is_slower_by_more_than_noise_is_taken_back(apart: float, back: tuple[str, ...]) -> None:
    """A schedule on one thread was 1.8 times as slow in a model that was measured on a busy machine, and was kept."""
    kernels = (kernel("slow", 1.8), kernel("a little slower", 1.3), kernel("the same", apart, changed=False))
    noisy = replace(measured(1.0, 1.0), kernels=kernels)
    assert noisy.noisy and noisy.to_take_back == back
