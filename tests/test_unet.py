"""Encoder and decoder networks: everything that they need has a kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt


class Twice(nn.Sequential):
    """Two convolutions, each normalised."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__(
            nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(),
            nn.Conv2d(filters, filters, 3, padding=1), nn.GroupNorm(4, filters), nn.SiLU(),
        )  # fmt: skip


class UNet(nn.Module):
    """Pools on the way down; on the way up transposed convolutions, or resizing by ``mode``."""

    def __init__(self, mode: str = "", width: int = 16) -> None:
        super().__init__()
        self.mode = mode
        self.down = nn.ModuleList([Twice(3, width), Twice(width, 2 * width), Twice(2 * width, 4 * width)])
        wide = [4 * width, 2 * width]
        self.up = nn.ModuleList([nn.Conv2d(c, c // 2, 1) if mode else nn.ConvTranspose2d(c, c // 2, 2, stride=2) for c in wide])
        self.join = nn.ModuleList([Twice(c, c // 2) for c in wide])
        self.pools = nn.ModuleList([nn.MaxPool2d(2), nn.AvgPool2d(2)])
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for stage, pool in zip(self.down, [*self.pools, nn.Identity()], strict=True):
            kept.append(stage(x))
            x = pool(kept[-1])
        for up, join, skip in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = up(F.interpolate(x, scale_factor=2, mode=self.mode) if self.mode else x)
            x = join(torch.cat([skip, x], 1))
        return self.head(x)


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", ["", "nearest", "bilinear"])
def test_a_u_net_needs_no_library(mode: str, dynamic: bool, tmp_path: Path) -> None:
    net = randomised(UNet(mode))
    compiled = torch.compile(net, backend="graphopt", dynamic=dynamic, options={"strict": True, "cache_dir": str(tmp_path)})
    with torch.no_grad():
        for shape in [(2, 3, 32, 24), (1, 3, 20, 36)][: 1 + dynamic]:
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    assert not graphopt.reports()[-1].fallbacks


def test_a_generator_needs_no_library(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.ConvTranspose2d(20, 32, 4, 1, 0, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 3, 3, 2, 1, 1), nn.Tanh(),
    )  # fmt: skip
    net = randomised(net)
    compiled = torch.compile(net, backend="graphopt", options={"strict": True, "cache_dir": str(tmp_path)})
    with torch.no_grad():
        x = torch.randn(2, 20, 1, 1)
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    assert not [k for k in graphopt.reports()[-1].remarks if k.rule == "FoldBatchNorm" and k.kind == "missed"]
