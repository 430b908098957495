"""What was done, what was declined and why: every compilation leaves a report."""

import torch
from torch import nn

import graphopt


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(64, 256), nn.Linear(256, 64), nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # GELU spelled out: recognised by its meaning, not by its name
        y = self.up(x)
        y = 0.5 * y * (1.0 + torch.erf(y / 2**0.5))
        # an operator without a kernel of its own runs through PyTorch, and the report says so
        return torch.linalg.vector_norm(self.norm(x + self.down(y)), ord=3, dim=-1)


with torch.no_grad():
    compiled = torch.compile(Block().eval(), backend="graphopt", options={"name": "block"})
    compiled(torch.randn(32, 64))

report = graphopt.reports()[-1]
print(report.summary(remarks="all"))
print(report.text_after)  # the optimized graph
print(report.program)  # the program that runs
assert [f.op for f in report.fallbacks] == ["aten.linalg_vector_norm.default"]
