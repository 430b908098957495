"""Weights as small integers: the ledger says what it cost, which kernel ran, and whether it became faster."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import graphopt

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).eval()
x = torch.randn(1, 512)

made = graphopt.quantize(model, (x,), scheme="int4-weight-g32", revert=False)  # the model stays as it is
print(made.ledger)
assert all(e.quantized and e.weight_error < 0.1 for e in made.ledger.entries)

with tempfile.TemporaryDirectory() as folder:  # saved and loaded as any module
    torch.save(made, Path(folder) / "model.pt")
    loaded = torch.load(Path(folder) / "model.pt", weights_only=False)

with torch.no_grad():
    compiled = graphopt.compile(loaded, (x,))
    torch.testing.assert_close(compiled(x), made(x), rtol=1e-4, atol=1e-5)  # the kernel is the dequantized weight, not another rounding

    # or as an option, for a model that keeps its floats: the integers follow them
    as_option = graphopt.compile(model, (x,), quantize="int8-weight")
    print("int8 moves the output by", float((as_option(x) - model(x)).norm() / model(x).norm()))
