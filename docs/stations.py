"""Writes the texts of architecture.md from a real run.

    python docs/stations.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from torch import nn

import graphopt

PAGE = Path(__file__).resolve().parent / "architecture.md"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(64, 96), nn.LayerNorm(96)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        y = 0.5 * y * (1.0 + torch.erf(y / 2**0.5))
        return self.norm(y + residual)


MODEL = """class Block(nn.Module):  # fc = nn.Linear(64, 96), norm = nn.LayerNorm(96)
    def forward(self, x, residual):
        y = self.fc(x)
        y = 0.5 * y * (1.0 + torch.erf(y / 2**0.5))
        return self.norm(y + residual)"""


def stations() -> dict[str, tuple[str, str]]:
    """Name -> (language, text)."""
    torch.manual_seed(0)
    model = Block().eval()
    inputs = torch.randn(8, 64), torch.randn(8, 96)
    with torch.no_grad():
        compiled = torch.compile(model, backend="graphopt", options={"name": "block"})
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
    report = graphopt.reports()[-1]
    matmul = next(k for k in report.kernels if k.kind == "matmul")
    kernel = Path(matmul.path).with_suffix(".txt").read_text()
    remarks = [str(r) for r in report.remarks if r.rule in ("ErfGelu", "RecomposeGelu", "fuse", "pack-weights") or r.kind == "missed"]
    return {
        "model": ("text", MODEL),
        "captured": ("text", report.text_before),
        "optimized": ("text", report.text_after),
        "remarks": ("text", "\n".join(remarks[:8])),
        "kernel": ("text", kernel),
        "program": ("text", report.program),
    }


def main() -> int:
    text = PAGE.read_text()
    for name, (language, body) in stations().items():
        block = f"<!-- station: {name} -->\n\n```{language}\n{body.strip()}\n```\n"
        pattern = rf"<!-- station: {name} -->\n(?:\n```.*?\n```\n)?"
        text, count = re.subn(pattern, lambda _, block=block: block, text, count=1, flags=re.DOTALL)
        if count != 1:
            print(f"architecture.md has no place for {name}", file=sys.stderr)
            return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
