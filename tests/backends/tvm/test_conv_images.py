"""Convolutions read their image by lines: what holds of the first line has to hold of all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt

IMAGES: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]] = {
    "a line goes on behind a gap": ((1, 2, 7, 32), lambda x: x[:, :, :5].reshape(1, 5, 2, 32).permute(0, 3, 1, 2)),
    "so does one whose channels are apart": ((1, 32, 2, 60), lambda x: x[:, :, :, :48].reshape(1, 32, 3, 32)),
    "ones below the last line": ((1, 6, 7, 32), lambda x: F.pad(x.permute(0, 3, 1, 2), (0, 0, 0, 2), value=1.0)),
    "pixels one behind the other": ((1, 72, 32), lambda x: x.reshape(1, 8, 9, 32).permute(0, 3, 1, 2)),
    "channels first": ((1, 32, 4, 40), lambda x: x),
}

WINDOWS: list[dict[str, Any]] = [{"kernel_size": 1}, {"kernel_size": (3, 1), "padding": (1, 0)}, {"kernel_size": 3, "padding": 1}]


class Image(nn.Module):
    def __init__(self, image: Callable[[torch.Tensor], torch.Tensor], conv: nn.Module) -> None:
        super().__init__()
        self.image, self.conv = image, conv

    def forward(self, x: torch.Tensor) -> Any:
        return self.conv(self.image(x))


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("filters", [3, 24])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_images_that_are_views(name: str, filters: int, window: dict[str, Any]) -> None:
    shape, image = IMAGES[name]
    model, x = Image(image, nn.Conv2d(32, filters, **window)).eval(), torch.randn(shape)
    with torch.no_grad():
        true = copy.deepcopy(model).double()(x.double())
        got = graphopt.compile(model, (x,))(x)
    torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-5)
