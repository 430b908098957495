"""Frozen weights stay true: what was folded from a weight is folded again when the weight changes."""

import torch
from torch import nn

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
x = torch.randn(1, 3, 16, 16)

with torch.no_grad():
    compiled = torch.compile(model, backend="graphopt")  # the batch norm is folded into the convolution
    compiled(x)
    model[0].weight.mul_(2.0)  # in place
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    model.load_state_dict({k: torch.rand_like(v) + 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    model[0].weight.data = torch.randn_like(model[0].weight)  # other storage
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
print("true to the weights after three kinds of change")
