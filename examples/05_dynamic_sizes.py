"""Symbolic sizes: compiled once, right at every size."""

import torch
from torch import nn

import graphopt

model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Softmax(dim=-1)).eval()

with torch.no_grad():
    compiled = torch.compile(model, backend="graphopt", dynamic=True)
    for rows in (2, 7, 64, 333):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), model(x))
print(f"4 sizes, {len(graphopt.reports())} compilation")
assert len(graphopt.reports()) == 1
