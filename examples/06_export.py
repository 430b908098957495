"""Without Dynamo at run time: ``graphopt.compile`` goes through torch.export and returns a model that is called like the first."""

import torch
from torch import nn

import graphopt

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
x = torch.randn(16, 64)
compiled = graphopt.compile(model, (x,), name="classifier")
with torch.no_grad():
    torch.testing.assert_close(compiled(x), model(x))
print(compiled.report.summary(remarks="none"))
