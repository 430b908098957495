"""What a call may observe beside values: aliasing, mutation, structure of results, randomness, graph breaks, modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt import reports
from tests.capture.helpers import check, compiled, library_calls


def test_views_of_one_result_share_memory() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = x + 1
        return a, a[0], a.t(), a.split(2)[1]

    with torch.no_grad():
        a, row, t, part = compiled(fn)(torch.zeros(4, 3))
    row.fill_(5)
    part.fill_(7)
    assert a.tolist() == [[5] * 3, [1] * 3, [7] * 3, [7] * 3] and torch.equal(a.t(), t)


def test_a_view_of_an_argument_shares_memory() -> None:
    x = torch.zeros(4, 3)
    view, itself = compiled(lambda x: (x.t()[1:], x))(x)
    x.fill_(3)
    assert view.eq(3).all() and view.stride() == (1, 3) and itself is x


def test_results_are_fresh_tensors() -> None:
    x = torch.zeros(3)
    a, b = compiled(lambda x: (x.clone(), x.clone()))(x)
    a.add_(1)
    assert x.sum() == 0 and b.sum() == 0


@pytest.mark.parametrize("strided", [False, True])
def test_layouts_of_results(strided: bool) -> None:
    x = torch.randn(2, 3, 4, 5)
    x = x.to(memory_format=torch.channels_last) if strided else x
    check(lambda x: (x + 1, (x + 1).permute(0, 2, 3, 1), (x * 2)[:, ::2], x.sum(0).expand(2, 3, 4, 5), x.relu()[1:]), x)
    check(lambda x: (x.t() + 1, x.t().contiguous(), x.t().clone(), (x + 1).t()), torch.randn(3, 4))


def test_mutation_of_arguments() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> Any:
        x.add_(1)
        y[1:].mul_(2)
        y[0] = x.sum()
        return x * 2, y[0]

    check(fn, torch.zeros(3), torch.ones(4))
    check(lambda x: x.t_().add_(1), torch.arange(6.0).reshape(2, 3)[:, :2])


def test_overlapping_arguments_of_which_one_is_written() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return y * 2

    base, other = torch.arange(8.0), torch.arange(8.0)
    want = fn(base[:5], base[3:])
    got = compiled(fn)(other[:5], other[3:])
    assert torch.equal(want, got) and torch.equal(base, other)


def test_structures_and_constants() -> None:
    def fn(x: torch.Tensor, flag: bool, n: int, s: str) -> Any:
        return {"a": [x + n, None, (s, n)], "b": torch.tensor([1.0, 2.0]) * x if flag else 3.0, "c": torch.tensor(2.5)}

    check(fn, torch.ones(2), True, 3, "name")
    check(fn, torch.ones(2), False, 3, "name")


def test_random_operators_draw_from_the_generator_in_order() -> None:
    def fn(x: torch.Tensor) -> Any:
        a = torch.rand_like(x.t())
        b = torch.nn.functional.dropout(x, 0.5, training=True)
        return a, torch.randn(3), b, torch.bernoulli(x.abs().clamp(0, 1))

    x = torch.randn(4, 5)
    torch.manual_seed(3)
    want = fn(x)
    run = compiled(fn)
    torch.manual_seed(3)
    got = run(x)
    again = run(x)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert not torch.equal(got[1], again[1])


def test_graph_breaks() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = (x + 1).t()
        torch._dynamo.graph_break()
        z = y.reshape(-1) if y.sum().item() > 0 else y * 2
        return z + 1

    check(fn, torch.ones(3, 2))
    assert len(reports()) >= 2


def test_user_errors_are_the_users() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.cholesky(x * 1)

    with pytest.raises(torch.linalg.LinAlgError):
        compiled(fn)(-torch.eye(3))
    torch.testing.assert_close(compiled(fn)(torch.eye(3)), torch.eye(3))


def test_inference_mode_and_no_grad() -> None:
    m = torch.nn.Linear(3, 3)
    run = compiled(m)
    x = torch.randn(2, 3)
    with torch.inference_mode():
        torch.testing.assert_close(run(x), m(x))
    with torch.no_grad():
        torch.testing.assert_close(run(x), m(x))
    assert run(x).requires_grad


def test_what_the_ir_cannot_hold_runs_as_a_whole() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    check(fn, torch.ones(3), library=("whole graph",))
    (fallback,) = reports()[-1].fallbacks
    assert "cond" in fallback.reason and "test_calls.py" in fallback.loc


def test_source_lines() -> None:
    check(lambda x: torch.special.i0(x) + 1, torch.ones(3), library=("aten.i0.default",))
    (fallback,) = (f for f in reports()[-1].fallbacks if "i0" in f.op)
    assert "test_calls.py" in fallback.loc and library_calls()


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.plain = torch.ones(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.fc(x))) * self.scale + self.plain


def test_weights_that_change_after_compilation() -> None:
    """In place, replaced, loaded, and through ``data``: each call sees the present values, without a new compilation."""
    m, x = Net().eval(), torch.randn(3, 4)
    run = compiled(m)
    with torch.no_grad():
        torch.testing.assert_close(run(x), m(x))
        count = len(reports())
        m.fc.weight.mul_(2)
        torch.testing.assert_close(run(x), m(x))
        m.fc.weight = torch.nn.Parameter(torch.randn(4, 4))
        torch.testing.assert_close(run(x), m(x))
        m.load_state_dict({k: torch.randn_like(v).abs() if v.is_floating_point() else v for k, v in m.state_dict().items()})
        torch.testing.assert_close(run(x), m(x))
        m.fc.bias.data = torch.randn(4)
        torch.testing.assert_close(run(x), m(x))
        m.scale.zero_()
        torch.testing.assert_close(run(x), m(x))
    assert len(reports()) == count
    assert "weight %fc.weight" in reports()[0].text_before and "weight %plain" in reports()[0].text_before


def test_buffers_that_a_graph_updates_are_no_weights() -> None:
    import copy

    m = Net().train()
    twin, x = copy.deepcopy(m), torch.randn(8, 4)
    run = compiled(m)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(x), twin(x))
    torch.testing.assert_close(m.state_dict(), twin.state_dict())
    assert "weight %norm.running_mean" not in reports()[0].text_before


def test_training() -> None:
    import copy

    m = torch.nn.Sequential(Net(), torch.nn.GELU(), torch.nn.LayerNorm(4), torch.nn.Dropout(0.0), torch.nn.Linear(4, 2)).train()
    twin, x = copy.deepcopy(m), torch.randn(6, 4)
    run = compiled(m)
    for _ in range(2):
        for model, call in ((m, run), (twin, twin)):
            torch.nn.functional.cross_entropy(call(x), torch.tensor([0, 1, 0, 1, 1, 0])).backward()
            with torch.no_grad():
                for p in model.parameters():
                    assert p.grad is not None
                    p -= 0.1 * p.grad
    for a, b in zip(m.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a.grad, b.grad)
        assert a.grad is not None and b.grad is not None and a.grad.stride() == b.grad.stride()


def test_gradients_of_views_and_arguments() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = (x @ w.t()).relu()
        return y[1:], y.t()

    leaves = [torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)]
    twins = [v.detach().clone().requires_grad_() for v in leaves]
    for call, given in ((compiled(fn), leaves), (fn, twins)):
        a, b = call(*given)
        (a.sum() + (b * b).sum()).backward()
    for a, b in zip(leaves, twins, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
