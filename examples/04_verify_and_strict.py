"""``verify`` runs every pass before and after against the f64 interpreter; ``strict`` forbids silent library fallbacks."""

import torch
from torch import nn

import graphopt


def cholesky(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.cholesky_ex(x).L


model = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.LayerNorm(64)).eval()
x = torch.randn(8, 64)

with torch.no_grad():
    checked = torch.compile(model, backend="graphopt", options={"verify": "each-pass", "strict": True})
    torch.testing.assert_close(checked(x), model(x))
print("every pass kept the values, and every operation has a kernel")

with torch.no_grad():
    try:
        torch.compile(cholesky, backend="graphopt", options={"strict": True})(torch.eye(3))
    except Exception as error:  # Dynamo wraps errors of a backend
        cause = error.__cause__ or error
        print(f"strict says: {cause}")
        assert "cholesky" in str(cause)
    else:
        raise AssertionError("strict let a fallback pass")
print(f"{len(graphopt.reports())} graph compiled")
assert len(graphopt.reports()) == 1
