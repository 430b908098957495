"""One line: ``torch.compile(model, backend="graphopt")``. No import of graphopt is needed for that."""

import torch
from torch import nn

model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64)).eval()
x = torch.randn(32, 64)

with torch.no_grad():
    compiled = torch.compile(model, backend="graphopt")
    error = (compiled(x) - model(x)).abs().max()
print(f"largest difference to eager: {error:.1e}")
assert error < 1e-5
