"""Tuning while compiling: kernels are tuned for a few seconds, what was tried is in the report, and the next compilation uses what won."""

import tempfile

import torch
from torch import nn

import graphopt

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(300, 500), nn.GELU(), nn.Linear(500, 300)).eval()
x = torch.randn(24, 300)

with tempfile.TemporaryDirectory() as folder, torch.no_grad():  # leave cache_dir out to keep kernels and database in ~/.cache/graphopt
    first = graphopt.compile(model, (x,), cache_dir=folder, tune_budget=10)
    for k in first.report.tuning:
        gain = f"{k.default / k.best:.2f}x" if k.default and k.best else "no time yet"
        print(f"{k.name}: {k.trials} tried, {k.failed} failed, {gain}")
    print(first.report.notes[-1])

    again = graphopt.compile(model, (x,), cache_dir=folder)  # tunes nothing: it asks the database
    for kernel in again.report.kernels:
        print(kernel.name, "-", kernel.tuned)  # where its schedule is from

    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
    assert sum(k.trials for k in first.report.tuning) > 0 and "tune" not in again.report.seconds
